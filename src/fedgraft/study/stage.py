"""A stage of a study: a folder, complete when its `fedgraft.json` is there.

A complete stage is not run again while its inputs, its settings and the code are the same. What a
stage makes appears whole or not at all; a stage that was killed is run again, and training inside
it goes on from its last checkpoint. A folder that no stage has begun is never cleared.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import fedgraft
from fedgraft.errors import ArtefactError
from fedgraft.provenance import RECORD, Record, hash_files, hash_json, told_if_unwritable
from fedgraft.weights.checkpoint import Checkpoint

Say = Callable[[str], None]

BEGUN = ".begun"
"""Lies in a stage's folder until its record does: seconds of the attempts before, from whose last
state the one that began when this was written goes on."""


def run_stage(
    folder: Path,
    *,
    title: str,
    inputs: Mapping[str, str],
    settings: Mapping[str, Any],
    make: Callable[[Path], Mapping[str, Any] | None],
    say: Say,
    keep: str = "",
) -> Record:
    """Bring the stage to completion and return its record, with `seconds` among its figures.

    An attempt that was interrupted counts up to the last state that it left.

    Args:
        make: Fills the folder; returns figures for the record.
        say: Tells the person who waits.
        keep: Pattern of what interrupted training has left beside its state and goes on from:
            removed unless that state is there.

    Raises ArtefactError where the folder holds what no stage has made, or cannot be written.
    """
    settings = {**settings, "code": code_hash()}
    done = Record.read(folder)
    if done and done.inputs == dict(inputs) and hash_json(done.settings) == hash_json(settings):
        say(f"{title}: done already")
        return done
    _refuse_what_is_no_stage(folder, done)
    begun = folder / BEGUN
    with told_if_unwritable(folder, left="finished stages are kept"):
        folder.mkdir(parents=True, exist_ok=True)
        interrupted = any(left.name.startswith(".") and left != begun for left in folder.iterdir())
        before = _seconds_before(folder) if interrupted else 0.0
        begun.write_text(f"{before:.2f}", encoding="utf-8")
        (folder / RECORD).unlink(missing_ok=True)
        _clear(folder, hidden=False, keep=keep if interrupted else "")
        say(title)
        started = time.monotonic()
        figures = make(folder) or {}
        seconds = round(before + time.monotonic() - started, 2)
        _clear(folder, hidden=True)
        record = Record.make(
            "stage",
            inputs=dict(inputs),
            settings=settings,
            figures={**figures, "seconds": seconds},
        )
        finished = folder / f".{RECORD}"
        finished.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        finished.rename(folder / RECORD)
        begun.unlink()
    say(f"    {seconds:.1f} s")
    return record


def _refuse_what_is_no_stage(folder: Path, done: Record | None) -> None:
    if done and done.kind == "stage":
        return
    found = f"a {done.kind}" if done else "files of others"
    if done or (folder.is_dir() and any(folder.iterdir()) and not (folder / BEGUN).exists()):
        raise ArtefactError(
            f"{folder}: expected a stage of this study, or nothing, found {found}, which is not "
            "removed; choose another --out"
        )


def _seconds_before(folder: Path) -> float:
    """Of attempts that were interrupted, each up to the last file that it left."""
    begun = folder / BEGUN
    if not begun.exists():
        return 0.0
    last = max(file.stat().st_mtime for file in folder.rglob("*"))
    return float(begun.read_text(encoding="utf-8") or 0) + last - begun.stat().st_mtime


def _clear(folder: Path, *, hidden: bool, keep: str = "") -> None:
    """Remove what is hidden (the state of interrupted training), or what is not."""
    for left in folder.iterdir():
        kept = left.name == BEGUN or fnmatch(left.name, keep)
        if left.name.startswith(".") == hidden and not kept:
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def model_hash(model: Checkpoint, speaker: Checkpoint | None = None) -> str:
    """Hash of a model that no stage made, and of what it is trained and asked with.

    Args:
        speaker: Whose tokenizer and chat template that is; None for the model's own.
    """
    reading = (speaker or model).reading_hash
    return hash_json([model.content_hash, model.reading_hash, reading])


@cache
def code_hash() -> str:
    """Hash of the source between inputs and numbers: other code, other results.

    Display comes after the numbers, and what the pocket family and tests make enters as an input.
    """
    package = Path(str(fedgraft.__file__)).parent
    outside = {package / name for name in ("report", "cli", "pocket", "testing.py")}
    return hash_files(sorted(p for p in package.rglob("*.py") if not outside & {p, *p.parents}))
