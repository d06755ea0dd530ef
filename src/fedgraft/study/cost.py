"""What training costs: floating-point operations by the paper's formula, beside measured seconds.

arXiv 2410.10739, appendix: FLOPs = 6 x parameters x tokens x epochs (2 for the forward pass, 4 for
the backward pass, per parameter and token). Grafting itself is one multiplication and one addition
a parameter.

The finer count knows that an embedding is looked up and not multiplied, that attention grows with
the row, and that gradient checkpointing computes the layers twice (`operations`).

    estimated, before a run     operations / (measured rate of the machine * share that is reached)
    measured, after it          seconds on the clock, stage by stage
    both                        * watts = energy;  * price of an hour, + energy * its price = money
"""

from dataclasses import dataclass
from math import prod
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedgraft.study.shape import Shape

PAPER_PARAMETERS, PAPER_EPOCHS = 8_000_000_000, 5
"""Of the paper's example: 8B parameters, five epochs over the tokens."""


TRAINING, ADAPTERS = "training", "adapters"
"""Kinds of work, as plan and report tell them."""


class StageCost(BaseModel):
    """What one stage took."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    work: str = ""
    """`training` or `adapters`, as in `Estimate`; empty where nothing was trained."""
    seconds: float
    num_tokens: int = 0
    flops: float = 0.0


class Estimate(BaseModel):
    """What training of one kind was thought to take, before it began."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    work: str
    """`training` (of checkpoints) or `adapters`."""
    machine: str
    rate: float
    """FLOP/s of its matrix products, measured then."""
    num_runs: int
    paper_flops: float
    """6 N T of all runs."""
    operations: float
    """The finer count."""
    seconds: float
    """Of all runs, one after the other."""

    def share_reached(self, seconds: float) -> float:
        """Of the machine's rate, by a run that took so many seconds."""
        return self.operations / (self.rate * seconds)


class Prices(BaseModel):
    """What a device costs; a rented one has an hour's price, one's own has watts and their price.

    An hour's price and that of energy are added where both are given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    currency: str = Field(min_length=1)
    per_hour: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Of one device."""
    per_kwh: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    watts: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """That one device draws while it trains, its share of the machine and of cooling included."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.per_kwh is not None and self.watts is None:
            raise ValueError("per_kwh needs `watts`, what one device draws")
        if self.per_hour is None and self.watts is None:
            raise ValueError("give `per_hour`, or `watts` and `per_kwh`")
        return self

    def kwh(self, seconds: float, num_devices: int = 1) -> float | None:
        """Energy; None where nobody said what a device draws."""
        return None if self.watts is None else self.watts * num_devices * seconds / 3.6e6

    def money(self, seconds: float, num_devices: int = 1) -> float | None:
        """In `currency`; None where no price is given."""
        if self.per_hour is None and self.per_kwh is None:
            return None
        energy = self.kwh(seconds, num_devices) or 0.0
        hours = num_devices * seconds / 3600
        return (self.per_hour or 0.0) * hours + (self.per_kwh or 0.0) * energy


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
