"""Continued pre-training: a checkpoint reads on, all its parameters move, or low-rank ones (LoRA).

One run can leave checkpoints on the way, at smaller budgets: beside `out`, named by their tokens.
Instruction tuning is the same call on the rows of dialogues, whose labels leave out the prompts.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedgraft.errors import ArtefactError, TrainingError
from fedgraft.models import open_model, open_tokenizer, save_model
from fedgraft.progress import is_first
from fedgraft.provenance import Record
from fedgraft.text.packing import Rows, mix
from fedgraft.training.processes import artefact_of_the_first
from fedgraft.training.settings import PretrainSettings, TrainingSettings
from fedgraft.training.state import Tensors, remove_work, whole_tensors, work_directory
from fedgraft.training.trainer import steps_of, train
from fedgraft.training.watch import Watcher
from fedgraft.weights.checkpoint import CONFIG_DTYPES, Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def continue_pretraining(
    model: str | Path,
    rows: Rows,
    out: Path,
    settings: TrainingSettings,
    *,
    replay: Rows | None = None,
    replay_share: float = 0.0,
    overwrite: bool = False,
    label: str = "pre-training",
    sharded: bool = False,
    watchers: tuple[Watcher, ...] = (),
) -> Path:
    """Train a checkpoint on packed rows and write the result to `out`, in the checkpoint's dtype.

    `replay` are rows of old text; they take `replay_share` of the budget. For each of
    `settings.budgets` there is a checkpoint beside `out`, see `budget_path`. A run that was killed
    leaves its state beside `out`, and the same call goes on from there, with any number of
    processes: on a CPU in float32 and with as many processes as before with the same weights, bit
    for bit, as if it had never stopped.

    Raises ArtefactError where `out` exists, TrainingError and NonFiniteError as `train` does.
    """
    settings = PretrainSettings.model_validate(settings.model_dump())
    _check_share(replay, replay_share)
    source = Checkpoint.open(model)
    if replay is not None:
        num_rows = max(2, round(settings.num_tokens * len(rows) / rows.num_tokens))
        rows = mix(
            [(rows, 1 - replay_share), (replay, replay_share)],
            num_rows=num_rows,
            seed=settings.seed,
        )
    _check_budgets(rows, settings)
    _dtype(source)  # or an error, now and not after the training
    if settings.lora and sharded:
        raise TrainingError(
            "expected all parameters to be trained where they are shared out among processes, "
            "found LoRA; leave out one of the two"
        )
    run = _Run(source, rows, out, settings, replay_share, overwrite)
    with artefact_of_the_first(out, overwrite=overwrite) as partial:
        workdir = work_directory(out, run.inputs, settings)
        trained = run.opened()
        outcome = train(
            trained,
            rows,
            settings,
            workdir,
            label=label,
            leave={budget: run.leave(budget) for budget in settings.budgets},
            sharded=sharded,
            watchers=watchers,
        )
        run.write(trained, partial, asdict(outcome))
    if is_first():
        remove_work(out)
    return out


def budget_path(out: Path, budget: int) -> Path:
    """Where the checkpoint for a budget below the last stands: `out-100000` beside `out`."""
    return out.with_name(f"{out.name}-{budget}")


@dataclass(frozen=True, slots=True)
class _Run:
    """One run: what its checkpoints have in common."""

    source: Checkpoint
    rows: Rows
    out: Path
    settings: PretrainSettings
    replay_share: float
    overwrite: bool

    @property
    def inputs(self) -> dict[str, str]:
        return {"model": self.source.content_hash, "rows": self.rows.content_hash}

    def opened(self) -> "PreTrainedModel":
        model = open_model(self.source.path)
        if self.settings.lora is None:
            return model
        from fedgraft.training.adapter import add_factors

        return add_factors(model, self.settings.lora, self.settings.seed)

    def leave(self, budget: int) -> "Any":
        """What writes the checkpoint of a budget; one that is there already is of this run."""
        place = budget_path(self.out, budget)
        mine = self._record(budget, {})
        found = Record.read(place)
        if found and (found.inputs, found.settings) == (mine.inputs, mine.settings):
            return lambda _model, _tokens: None
        if place.exists() and not self.overwrite:
            raise ArtefactError(f"{place} exists already; remove it or choose another --out")

        def write(model: "PreTrainedModel", num_tokens: int) -> None:
            with artefact_of_the_first(place, overwrite=self.overwrite) as partial:
                self.write(model, partial, {"num_tokens": num_tokens}, budget)

        return write

    def write(
        self,
        model: "PreTrainedModel",
        folder: Path | None,
        figures: Mapping[str, Any],
        budget: int | None = None,
    ) -> None:
        """Write the model as it stands; every process calls it, the first one has a folder."""
        if self.settings.lora:
            from fedgraft.training.adapter import merged_tensors

            plain, tensors = model.get_base_model(), merged_tensors(model)
        else:
            plain, tensors = model, whole_tensors(model)
        if folder is None:
            return
        dtype = _dtype(self.source)
        narrowed: Tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        save_model(plain, open_tokenizer(self.source.path), folder, tensors=narrowed)
        self._record(budget, dict(figures)).write(folder)

    def _record(self, budget: int | None, figures: dict[str, Any]) -> Record:
        record = self.source.record
        settings = {**self.settings.model_dump(mode="json"), "replay_share": self.replay_share}
        return Record.make(
            "checkpoint",
            inputs=self.inputs,
            ancestors=(*(record.ancestors if record else ()), self.source.content_hash),
            residuals=record.residuals if record else (),
            settings={**settings, "budget": budget or self.settings.num_tokens},
            figures=figures,
        )


def _check_share(replay: Rows | None, share: float) -> None:
    if not 0 <= share < 1 or bool(share) != (replay is not None):
        raise TrainingError(
            "expected a share of replay from 0 to below 1, and old text where it is above 0; found "
            f"{share} and {'old text' if replay else 'none'}"
        )


def _check_budgets(rows: Rows, settings: PretrainSettings) -> None:
    """Refuse budgets that are no points on the way of this run."""
    steps = [
        steps_of(budget, rows, settings) for budget in (*settings.budgets, settings.num_tokens)
    ]
    if settings.budgets and (
        settings.budgets[-1] >= settings.num_tokens or len(set(steps)) < len(steps)
    ):
        raise TrainingError(
            f"expected budgets below {settings.num_tokens} tokens and at least a step of "
            f"{settings.batch_tokens} apart, found {list(settings.budgets)}; leave out some"
        )


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    found = {info.dtype for info in checkpoint.tensors.values()} & CONFIG_DTYPES.keys()
    if len(found) != 1:
        raise TrainingError(
            f"{checkpoint.path}: expected weights of one dtype, found {', '.join(sorted(found))}; "
            "save the checkpoint in one of them first"
        )
    dtype = getattr(torch, CONFIG_DTYPES[found.pop()])
    assert isinstance(dtype, torch.dtype)
    return dtype
