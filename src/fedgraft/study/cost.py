"""What training costs: floating-point operations by the paper's formula, beside measured seconds.

arXiv 2410.10739, appendix: FLOPs = 6 x parameters x tokens x epochs (2 for the forward pass, 4 for
the backward pass, per parameter and token). Grafting itself is one multiplication and one addition
a parameter.
"""

from pydantic import BaseModel, ConfigDict


class StageCost(BaseModel):
    """What one stage took."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    seconds: float
    num_tokens: int = 0
    flops: float = 0.0


class Tuning(BaseModel):
    """Instruction tuning as it would have to be repeated without a residual."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_tokens: int
    """Tokens of the instruction data."""
    epochs: int = 1


def training_flops(num_parameters: int, num_tokens: int, epochs: int = 1) -> float:
    """6 N T E."""
    return 6.0 * num_parameters * num_tokens * epochs


def graft_flops(num_parameters: int) -> float:
    """target + scale * residual: 2 N."""
    return 2.0 * num_parameters


def tuning_ratio(tuning: Tuning, num_pretraining_tokens: int, epochs: int = 1) -> float:
    """How many times the continued pre-training the tuning costs on top of it, in FLOPs.

    The paper's example: 25M samples of 8,192 tokens against 100M tokens, 5 epochs each, is 2,048.
    """
    return tuning.num_tokens * tuning.epochs / (num_pretraining_tokens * epochs)
