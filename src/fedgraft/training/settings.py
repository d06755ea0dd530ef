"""How a model is trained: what study files and commands set, checked, without torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class TrainingSettings(BaseModel):
    """How long and how hard to train."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_tokens: int = Field(gt=0)
    """Budget in tokens that are not padding; the rows are repeated until it is used up."""
    learning_rate: float = Field(gt=0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """After the warm-up: down along a cosine or a line, on as it is, or on and then down (warm-up,
    stable, decay)."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    decay: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps in which it falls at the end of `wsd`."""
    final_learning_rate: float = Field(default=0.1, ge=0, le=1)
    """Where `cosine` and `wsd` end, as a share of the highest learning rate."""
    batch_tokens: int = Field(default=4096, gt=0)
    """Row space of one step."""
    micro_batch_rows: int | None = Field(default=None, gt=0)
    """Rows in one forward pass; all rows of a step where None."""
    weight_decay: float = Field(default=0.0, ge=0)
    max_gradient_norm: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What passes are computed in; weights and optimizer stay in float32. See models.py."""
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass: less memory, about a third more time."""
    checkpoint_every: int = Field(default=200, gt=0)
    """Steps between checkpoints that an interrupted run goes on from."""
    seed: int = 0

    @model_validator(mode="after")
    def _room_to_fall(self) -> "TrainingSettings":
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                f"warmup and decay are shares of one run, found {self.warmup} + {self.decay}; "
                "choose a sum of at most 1"
            )
        return self


class Lora(BaseModel):
    """The size of an adapter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(default=8, gt=0)
    alpha: float = Field(default=16.0, gt=0)
    """The change is `alpha / rank * B A`."""
    dropout: float = Field(default=0.0, ge=0, lt=1)


class PretrainSettings(TrainingSettings):
    """Training on text, and what it leaves."""

    budgets: tuple[int, ...] = ()
    """Tokens, ascending and below `num_tokens`, at which a checkpoint is left on the way. The
    learning rate follows the whole run's schedule; with `constant` a checkpoint is what a run of so
    many tokens gives, after its warm-up."""
    lora: Lora | None = None
    """Train low-rank factors and add them to the weights at the end; all parameters where None."""

    @field_validator("budgets")
    @classmethod
    def _ascending(cls, budgets: tuple[int, ...]) -> tuple[int, ...]:
        if any(budget <= 0 for budget in budgets) or list(budgets) != sorted(set(budgets)):
            raise ValueError(f"budgets ascend and are above zero, found {list(budgets)}")
        return budgets


class AdapterSettings(Lora, TrainingSettings):
    """Training, and the size of the adapter."""
