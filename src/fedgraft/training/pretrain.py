"""Continued pre-training: a checkpoint reads on, all its parameters move.

Instruction tuning is the same call on the rows of dialogues, whose labels leave out the prompts.
"""

import glob
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from fedgraft.errors import TrainingError
from fedgraft.models import open_model, open_tokenizer, save_model
from fedgraft.provenance import Record, hash_json, new_artefact
from fedgraft.text.packing import Rows, mix
from fedgraft.training.trainer import TrainingSettings, train
from fedgraft.weights.checkpoint import CONFIG_DTYPES, Checkpoint


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
) -> Path:
    """Train a checkpoint on packed rows and write the result to `out`, in the checkpoint's dtype.

    `replay` are rows of old text; they take `replay_share` of the budget. A run that was killed
    leaves its state beside `out`, and the same call goes on from there: on a CPU in float32 with
    the same weights, bit for bit, as if it had never stopped.

    Raises ArtefactError where `out` exists, TrainingError and NonFiniteError as `train` does.
    """
    if not 0 <= replay_share < 1 or bool(replay_share) != (replay is not None):
        raise TrainingError(
            "expected a share of replay from 0 to below 1, and old text where it is above 0; found "
            f"{replay_share} and {'old text' if replay else 'none'}"
        )
    source = Checkpoint.open(model)
    if replay is not None:
        num_rows = max(2, round(settings.num_tokens * len(rows) / rows.num_tokens))
        rows = mix(
            [(rows, 1 - replay_share), (replay, replay_share)],
            num_rows=num_rows,
            seed=settings.seed,
        )
    inputs = {"model": source.content_hash, "rows": rows.content_hash}
    with new_artefact(out, overwrite=overwrite) as partial:
        workdir = work_directory(out, inputs, settings)
        trained = open_model(source.path)
        outcome = train(trained, rows, settings, workdir, label=label)
        tokenizer = open_tokenizer(source.path)
        save_model(trained.to(_dtype(source)), tokenizer, partial)
        record = source.record
        Record.make(
            "checkpoint",
            inputs=inputs,
            ancestors=(*(record.ancestors if record else ()), source.content_hash),
            residuals=record.residuals if record else (),
            settings={**settings.model_dump(), "replay_share": replay_share},
            figures=asdict(outcome),
        ).write(partial)
    remove_work(out)
    return out


def work_directory(out: Path, inputs: dict[str, str], settings: TrainingSettings) -> Path:
    """Where a run keeps what it needs to go on; other inputs or settings, another directory."""
    key = hash_json([inputs, settings.model_dump()]).removeprefix("sha256:")[:12]
    return out.absolute().with_name(f".{out.name}.training-{key}")


def remove_work(out: Path) -> None:
    """Remove what runs kept beside `out` to go on from, those with other settings included."""
    for left in out.absolute().parent.glob(f".{glob.escape(out.name)}.training-*"):
        shutil.rmtree(left, ignore_errors=True)


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
