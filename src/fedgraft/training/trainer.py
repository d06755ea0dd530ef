"""Rows to weights: one loop, transformers' Trainer, for pre-training, tuning and adapters.

The order of the rows is fixed before the first step (each pass over them in new order, by the
seed), so a run that was killed goes on from its last checkpoint with the very rows that come next,
and ends with the same weights as a run that was never killed. Several processes (`torchrun`) share
the rows of each step; where `sharded`, parameters, gradients and optimizer state too (FSDP2).
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from fedgraft.errors import NonFiniteError, TrainingError
from fedgraft.models import device, keep_freed_memory, saving, training_precision
from fedgraft.progress import is_first, progress
from fedgraft.provenance import derive_seed
from fedgraft.text.rows import IGNORED, Rows
from fedgraft.training.processes import num_processes, wait_for_all
from fedgraft.training.settings import TrainingSettings
from fedgraft.training.state import last_whole, load_optimizer, load_tensors, save_optimizer
from fedgraft.training.watch import (
    MEASURED_FROM,
    Watch,
    Watcher,
    check_watchers,
    flops_per_token,
    matrix_rate,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_LOSSES = 100
"""Points of the loss curve that are kept."""
TILE = 8
"""Rows are cut to a multiple of it, as matrix kernels like."""


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
    share_of_machine: float | None
    """Of the rate of a large matrix product, measured; None for runs of seconds."""
    losses: tuple[tuple[int, float], ...]
    """Step and mean loss since the step before, nats per target."""
    learning_rates: tuple[tuple[int, float], ...]


Leave = Callable[["PreTrainedModel", int], None]
"""Called with the model and the tokens seen, at a step on the way; by every process."""


def train(
    model: "PreTrainedModel",
    rows: Rows,
    settings: TrainingSettings,
    workdir: Path,
    *,
    label: str,
    leave: Mapping[int, Leave] = MappingProxyType({}),
    sharded: bool = False,
    watchers: tuple[Watcher, ...] = (),
    proximal: float = 0.0,
) -> TrainingOutcome:
    """Train the model's trainable parameters in place; resumes from `workdir` where it can.

    Documents in a row stay apart (see `text.packing`). The loss is the mean over the targets of a
    step, however it is cut into forward passes and processes.

    Args:
        leave: Tokens -> what to do when so many have been seen, rounded to a step.
        sharded: Share out parameters, gradients and optimizer state (FSDP2) among the processes
            that `torchrun` started.
        watchers: Where else losses and learning rates are reported to.
        proximal: Minimise loss + proximal / 2 ||w - start||^2 (FedProx, arXiv 1812.06127). The pull
            is added behind the clipping of gradients, so that it is never clipped away.

    Raises NonFiniteError where the loss turns NaN or Inf (naming the step), TrainingError where it
    rises far above where it began, where there is nothing to learn, a budget is below one row, or a
    token or a position is one that the model does not have, ArtefactError where `workdir` cannot be
    written.
    """
    _check(model, rows)
    check_watchers(watchers)
    keep_freed_memory()
    rows_per_step, micro = _batches(rows, settings)
    num_steps = steps_of(settings.num_tokens, rows, settings)
    order = _order(len(rows), num_steps * rows_per_step, settings.seed)
    arguments = _arguments(settings, workdir, num_steps, rows_per_step // micro, micro, sharded)
    arguments.report_to = [name for name in watchers if name != "tensorboard"]
    started = time.monotonic()
    use_cache = model.config.use_cache
    tokens_per_step = rows.num_tokens / len(rows) * rows_per_step
    flops, limit = flops_per_token(model, rows.row_length), 0.0
    if flops * tokens_per_step * num_steps > MEASURED_FROM:
        dtype = torch.bfloat16 if arguments.bf16 else torch.float32
        limit = matrix_rate(device().type, dtype) * num_processes()
    if is_first():
        last_whole(workdir)
    wait_for_all()
    last = last_whole(workdir)
    done = int(last.name.rpartition("-")[2]) if last else 0
    label = f"{label}, on from step {done}" if done else label
    with progress(label, (num_steps - done) * tokens_per_step, "tokens") as advance:
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=_Ordered(rows, order),
            data_collator=_collate,
        )
        for unwanted in ("PrinterCallback", "ProgressCallback"):
            _remove_callback(trainer, unwanted)
        trainer.add_callback(Watch(advance, tokens_per_step, flops, limit))
        seen = np.add.accumulate(rows.lengths[order].reshape(num_steps, -1).sum(1))
        at = {steps_of(tokens, rows, settings): act for tokens, act in leave.items()}
        trainer.add_callback(_Leave({step: (act, int(seen[step - 1])) for step, act in at.items()}))
        if proximal:
            trainer.add_callback(_Pull(model, proximal))
        if "tensorboard" in watchers and is_first():
            trainer.add_callback(_board(workdir))
        with _only_new_garbage():
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    model.config.use_cache = use_cache
    model.eval()
    seconds = time.monotonic() - started
    num_tokens = int(seen[-1])
    new_tokens = num_tokens - (int(seen[done - 1]) if done else 0)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return TrainingOutcome(
        num_steps=num_steps,
        num_tokens=num_tokens,
        seconds=round(seconds, 3),
        tokens_per_second=round(new_tokens / seconds, 1),
        flops=6.0 * model.num_parameters() * num_tokens,
        share_of_machine=round(new_tokens / seconds * flops / limit, 4) if limit else None,
        losses=tuple((int(e["step"]), round(float(e["loss"]), 5)) for e in history),
        learning_rates=tuple((int(e["step"]), float(e["learning_rate"])) for e in history),
    )


def _arguments(
    settings: TrainingSettings,
    workdir: Path,
    num_steps: int,
    num_passes: int,
    micro: int,
    sharded: bool,
) -> TrainingArguments:
    """What the Trainer is told; `num_passes` forward passes make a step, in all processes."""
    precision = training_precision() if settings.precision == "auto" else settings.precision
    arguments = TrainingArguments(
        output_dir=str(workdir),
        max_steps=num_steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=num_passes // num_processes(),
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=settings.max_gradient_norm,
        # the first of them has a rate of zero, so a run of one step must have none
        warmup_steps=min(math.ceil(settings.warmup * num_steps), num_steps - 1),
        **_schedule(settings, num_steps),
        optim="adamw_torch_fused",
        bf16=precision == "bfloat16",
        use_cpu=device().type == "cpu",
        activation_checkpointing=settings.gradient_checkpointing and not sharded,
        fsdp=sharded,
        fsdp_config={"activation_checkpointing": settings.gradient_checkpointing},
        ddp_find_unused_parameters=False,
        # the Trainer leaves one at the end too: a write as long as the few steps of a client
        save_strategy="steps" if num_steps > settings.checkpoint_every else "no",
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
    return arguments


def steps_of(num_tokens: int, rows: Rows, settings: TrainingSettings) -> int:
    """Return how many steps a budget is, at least one.

    Raises TrainingError where the budget is below one row.
    """
    per_row = rows.num_tokens / len(rows)
    if num_tokens < per_row:
        raise TrainingError(
            f"expected a budget of at least one row, {math.ceil(per_row)} tokens, found "
            f"{num_tokens}; give more tokens or pack into shorter rows"
        )
    return max(1, round(num_tokens / per_row / _batches(rows, settings)[0]))


def _batches(rows: Rows, settings: TrainingSettings) -> tuple[int, int]:
    """Rows of a step, and rows of a forward pass in one process."""
    rows_per_step = max(1, settings.batch_tokens // rows.row_length)
    micro = min(settings.micro_batch_rows or rows_per_step, rows_per_step)
    if settings.micro_batch_rows is None and not rows_per_step % num_processes():
        micro = rows_per_step // num_processes()
    if rows_per_step % (micro * num_processes()):
        of_all = f" in each of {num_processes()} processes" if num_processes() > 1 else ""
        raise TrainingError(
            f"expected micro_batch_rows to divide the {rows_per_step} rows of a step, found "
            f"{micro}{of_all}; choose a divisor"
        )
    return rows_per_step, micro


@contextmanager
def _only_new_garbage() -> Iterator[None]:
    """Collect garbage among what is made inside alone: the Trainer ends with a collection, which
    takes 0.3 s over all that torch and transformers have imported, as long as a client's round on a
    tiny model."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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

    def floating_point_ops(self, _inputs: Any) -> int:
        """Not counted here: the Trainer counts all parameters anew at each step for it."""
        return 0

    def create_accelerator_and_postprocess(self) -> None:
        """Shard on CPUs too: accelerate does so on accelerators alone, torch with any of them."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is not None:
            plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            for state in (PartialState(), self.accelerator.state):
                state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = plugin
            self.is_fsdp_enabled = True

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with saving(Path(self.args.output_dir)):
            super()._save_checkpoint(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_optimizer(Path(output_dir), self.model, self.optimizer.optimizer, self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint:
            optimizer = self.optimizer.optimizer
            load_optimizer(Path(checkpoint), self.model, optimizer, self.lr_scheduler)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            load_tensors(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


class _Leave(TrainerCallback):  # type: ignore[misc]
    """Does something with the model at some steps on the way."""

    def __init__(self, at: Mapping[int, tuple[Leave, int]]) -> None:
        self._at = at

    def on_step_end(self, _args: Any, state: Any, _control: Any, model: Any, **_: Any) -> None:
        if state.global_step in self._at:
            act, num_tokens = self._at[state.global_step]
            act(model, num_tokens)


class _Pull(TrainerCallback):  # type: ignore[misc]
    """Pulls what is trained towards where it stood before the first step."""

    def __init__(self, model: "PreTrainedModel", strength: float) -> None:
        self._strength = strength
        self._starts = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        with torch.no_grad():
            for parameter, start in self._starts:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - start, alpha=self._strength)


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
    """Rows of a forward pass, up to the last target of any: no loss depends on what comes after."""
    labels = np.stack([example["labels"] for example in examples])
    num_used = int(np.flatnonzero((labels != IGNORED).any(0)).max(initial=0)) + 1
    length = min(labels.shape[1], -(-num_used // TILE) * TILE)
    return {
        name: torch.from_numpy(np.stack([example[name][:length] for example in examples])).long()
        for name in examples[0]
    }


def _schedule(settings: TrainingSettings, num_steps: int) -> dict[str, Any]:
    match settings.schedule:
        case "wsd":
            return {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {
                    "num_decay_steps": max(1, round(settings.decay * num_steps)),
                    "min_lr_ratio": settings.final_learning_rate,
                },
            }
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


def _board(workdir: Path) -> TrainerCallback:
    """TensorBoard's files stand beside the output, and stay when the work directory goes."""
    from torch.utils.tensorboard import SummaryWriter

    name = workdir.name.removeprefix(".").partition(".training-")[0]
    return TensorBoardCallback(SummaryWriter(str(workdir.with_name(f"{name}-logs"))))


def _remove_callback(trainer: Trainer, name: str) -> None:
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == name:
            trainer.remove_callback(callback)
