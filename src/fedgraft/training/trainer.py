"""Rows to weights: one loop, transformers' Trainer, for pre-training, tuning and adapters.

The order of the rows is fixed before the first step (each pass over them in new order, by the
seed), so a run that was killed goes on from its last checkpoint with the very rows that come next,
and ends with the same weights as a run that was never killed.
"""

import ctypes
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from fedgraft.errors import NonFiniteError, TrainingError
from fedgraft.models import device, saving, training_precision
from fedgraft.progress import Advance, progress
from fedgraft.provenance import derive_seed
from fedgraft.text.packing import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_LOSSES = 100
"""Points of the loss curve that are kept."""


class TrainingSettings(BaseModel):
    """How long and how hard to train."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_tokens: int = Field(gt=0)
    """Budget in tokens that are not padding; the rows are repeated until it is used up."""
    learning_rate: float = Field(gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    final_learning_rate: float = Field(default=0.1, ge=0, le=1)
    """Where a cosine ends, as a share of the highest learning rate."""
    batch_tokens: int = Field(default=4096, gt=0)
    """Row space of one step."""
    micro_batch_rows: int | None = Field(default=None, gt=0)
    """Rows in one forward pass; all rows of a step where None."""
    weight_decay: float = Field(default=0.0, ge=0)
    max_gradient_norm: float = Field(default=1.0, gt=0)
    checkpoint_every: int = Field(default=200, gt=0)
    """Steps between checkpoints that an interrupted run goes on from."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOutcome:
    """What a run did."""

    num_steps: int
    num_tokens: int
    """Tokens seen that are not padding, repetitions included."""
    seconds: float
    """Time of this call; an earlier part of a resumed run does not count."""
    tokens_per_second: float
    flops: float
    """6 x parameters x tokens (arXiv 2410.10739, appendix)."""
    losses: tuple[tuple[int, float], ...]
    """Step and mean loss since the step before, nats per target."""


def train(
    model: "PreTrainedModel", rows: Rows, settings: TrainingSettings, workdir: Path, *, label: str
) -> TrainingOutcome:
    """Train the model's trainable parameters in place; resumes from `workdir` where it can.

    Documents in a row stay apart (see `text.packing`). The loss is the mean over the targets of a
    step, however it is cut into forward passes.

    Raises NonFiniteError where the loss turns NaN or Inf (naming the step), TrainingError where
    there is nothing to learn or a token or a position that the model does not have, ArtefactError
    where `workdir` cannot be written.
    """
    _check(model, rows)
    keep_freed_memory()
    rows_per_step = max(1, settings.batch_tokens // rows.row_length)
    micro = min(settings.micro_batch_rows or rows_per_step, rows_per_step)
    if rows_per_step % micro:
        raise TrainingError(
            f"expected micro_batch_rows to divide the {rows_per_step} rows of a step, found "
            f"{micro}; choose a divisor"
        )
    num_steps = max(1, round(settings.num_tokens * len(rows) / rows.num_tokens / rows_per_step))
    order = _order(len(rows), num_steps * rows_per_step, settings.seed)
    arguments = TrainingArguments(
        output_dir=str(workdir),
        max_steps=num_steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=rows_per_step // micro,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=settings.max_gradient_norm,
        warmup_steps=math.ceil(settings.warmup * num_steps),
        **_schedule(settings),
        optim="adamw_torch_fused",
        bf16=training_precision() == "bfloat16",
        use_cpu=device().type == "cpu",
        save_steps=settings.checkpoint_every,
        save_total_limit=2,
        logging_steps=max(1, num_steps // NUM_LOSSES),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        use_cache=False,
        dataloader_pin_memory=device().type == "cuda",
        seed=settings.seed,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several would multiply the batch (DataParallel)
    started = time.monotonic()
    use_cache = model.config.use_cache
    tokens_per_step = rows.num_tokens / len(rows) * rows_per_step
    last = _last_whole_checkpoint(workdir)
    done = int(last.rpartition("-")[2]) if last else 0
    label = f"{label}, on from step {done}" if done else label
    with progress(label, (num_steps - done) * tokens_per_step, "tokens") as advance:
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=_Ordered(rows, order),
            data_collator=_collate,
            callbacks=[_Watch(advance, tokens_per_step)],
        )
        for unwanted in ("PrinterCallback", "ProgressCallback"):
            _remove_callback(trainer, unwanted)
        trainer.train(resume_from_checkpoint=last)
    model.config.use_cache = use_cache
    model.eval()
    seconds = time.monotonic() - started
    num_tokens = int(rows.lengths[order].sum())
    return TrainingOutcome(
        num_steps=num_steps,
        num_tokens=num_tokens,
        seconds=round(seconds, 3),
        tokens_per_second=round(num_tokens / seconds, 1),
        flops=6.0 * model.num_parameters() * num_tokens,
        losses=tuple(
            (int(entry["step"]), round(float(entry["loss"]), 5))
            for entry in trainer.state.log_history
            if "loss" in entry
        ),
    )


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks instead of handing them back to the kernel.

    Each step frees and takes the same hundreds of megabytes; mapping them anew costs a page fault
    for every 4 KB (1.15 times the tokens a second with, see docs/performance.md).
    """
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another C library, e.g. musl: nothing to tell
        return
    m_trim_threshold, m_mmap_max = -1, -4
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


class _Trainer(Trainer):  # type: ignore[misc]
    """The Trainer, with rows in the order given and a loss that must stay finite."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            loss: torch.Tensor = super().training_step(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"expected memory for a step of {self.args.per_device_train_batch_size} rows at a "
                f"time, found {str(error).split('. ')[0]}; set a smaller micro_batch_rows (the "
                "result is the same) or shorter rows"
            ) from error
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"expected a finite loss, found {loss.item()} at step "
                f"{self.state.global_step + 1} of {self.state.max_steps}; try a learning rate "
                f"below {self.args.learning_rate:g} or a longer warm-up. Nothing was written"
            )
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with saving(Path(self.args.output_dir)):
            super()._save_checkpoint(*args, **kwargs)


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Moves the progress bar."""

    def __init__(self, advance: Advance, tokens_per_step: float) -> None:
        self._advance = advance
        self._tokens_per_step = tokens_per_step
        self._note = ""

    def on_step_end(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        self._advance(self._tokens_per_step, self._note)

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any, **_: Any) -> None:
        if "loss" in logs:
            self._note = f"loss {float(logs['loss']):.3f}"


class _Ordered(Dataset[Any]):
    """Rows in a fixed order, some of them more than once."""

    def __init__(self, rows: Rows, order: "np.ndarray[Any, Any]") -> None:
        self._rows = rows
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> Any:
        return self._rows[self._order[place]]


def _order(num_rows: int, count: int, seed: int) -> "np.ndarray[Any, Any]":
    rng = np.random.default_rng(derive_seed(seed, "row order"))
    passes = math.ceil(count / num_rows)
    return np.concatenate([rng.permutation(num_rows) for _ in range(passes)])[:count]


def _collate(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(np.stack([example[name] for example in examples])).long()
        for name in examples[0]
    }


def _schedule(settings: TrainingSettings) -> dict[str, Any]:
    match settings.schedule:
        case "cosine":
            return {
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr_rate": settings.final_learning_rate},
            }
        case "linear":
            return {"lr_scheduler_type": "linear"}
        case "constant":
            return {"lr_scheduler_type": "constant_with_warmup"}


def _check(model: "PreTrainedModel", rows: Rows) -> None:
    if not rows.num_targets:
        raise TrainingError("expected rows with targets to learn, found none; check the text")
    highest, known = rows.highest_id, model.get_input_embeddings().num_embeddings
    if highest >= known:
        raise TrainingError(
            f"expected token ids below the {known} rows of the model's embedding, found {highest}; "
            "pack the text with the tokenizer of this model"
        )
    num_positions = getattr(model.config, "max_position_embeddings", None)
    if num_positions is not None and rows.num_positions > num_positions:
        raise TrainingError(
            f"expected positions below the model's {num_positions}, found {rows.num_positions} of "
            "them; pack into rows no longer than that, with num_positions"
        )


def _last_whole_checkpoint(workdir: Path) -> str | None:
    """The newest checkpoint that a kill did not cut short; Trainer writes its state file last."""
    while workdir.is_dir() and (found := get_last_checkpoint(str(workdir))):
        try:
            json.loads((Path(found) / "trainer_state.json").read_bytes())
        except (OSError, ValueError):
            shutil.rmtree(found)
        else:
            return str(found)
    return None


def _remove_callback(trainer: Trainer, name: str) -> None:
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == name:
            trainer.remove_callback(callback)
