"""What training costs: floating-point operations by the paper's formula, beside measured seconds.

arXiv 2410.10739, appendix: FLOPs = 6 x parameters x tokens x epochs (2 for the forward pass, 4 for
the backward pass, per parameter and token). Grafting itself is one multiplication and one addition
a parameter.

The finer count knows that an embedding is looked up and not multiplied, that attention grows with
the row, and that gradient checkpointing computes the layers twice (`operations`).
"""

from dataclasses import dataclass
from math import prod

from pydantic import BaseModel, ConfigDict

from fedgraft.study.shape import Shape


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Operations:
    """Floating-point operations of a run, by what they are spent on."""

    matrices: float
    """Products of tokens and the layers' matrices, adapters included."""
    attention: float
    output: float
    """Products with the vocabulary's matrix, for logits."""
    recomputed: float
    """The layers' second forward pass under gradient checkpointing."""

    @property
    def total(self) -> float:
        return self.matrices + self.attention + self.output + self.recomputed


def operations(
    shape: Shape,
    num_tokens: int,
    row_length: int,
    *,
    gradient_checkpointing: bool = False,
    rank: int | None = None,
) -> Operations:
    """Count the products of a run (after arXiv 2204.02311, appendix B, and 2205.05198, appendix A).

    For each of T tokens in rows of t, with w numbers in a layer's matrices, l layers, a the width
    of all heads, v x h the output matrix, r numbers in LoRA's factors:

                 forward                 backward, all parameters    backward, LoRA
        matrices 2 l w (+ 2 r)           4 l w                       2 l w + 4 r
        attention 4 l a t                8 l a t                     8 l a t
        output   2 v h                   4 v h                       2 v h

    so 6 l w + 12 l a t + 6 v h where all parameters move. Checkpointing adds the layers' forward
    pass once more, without the last product of each, whose result nobody asks for again (with LoRA
    its factors come after it). Attention is counted over whole rows, what a masked product
    computes; kernels that skip the blocks between documents, or above the diagonal, do less of it.
    """
    layers = shape.num_hidden_layers
    factors = 0 if rank is None else shape.adapter_parameters(rank)
    weights, backward = layers * shape.layer_weights, 4 if rank is None else 2
    attention = 4.0 * layers * shape.attention_size * row_length
    forward = 2.0 * (weights + factors)
    unasked = 2.0 * layers * prod(shape.matrices["mlp.down_proj"]) if rank is None else 0.0
    return Operations(
        matrices=num_tokens * (forward + backward * weights + 4.0 * factors),
        attention=num_tokens * 3 * attention,
        output=num_tokens * (2.0 + backward) * shape.output_weights,
        recomputed=num_tokens * (forward - unasked + attention) if gradient_checkpointing else 0.0,
    )


def graft_flops(num_parameters: int) -> float:
    """target + scale * residual: 2 N."""
    return 2.0 * num_parameters


def tuning_ratio(tuning: Tuning, num_pretraining_tokens: int, epochs: int = 1) -> float:
    """How many times the continued pre-training the tuning costs on top of it, in FLOPs.

    The paper's example: 25M samples of 8,192 tokens against 100M tokens, 5 epochs each, is 2,048.
    """
    return tuning.num_tokens * tuning.epochs / (num_pretraining_tokens * epochs)
