"""A stage of a study: a folder, complete when its `fedgraft.json` is there.

A complete stage is not run again while its inputs, its settings and the code are the same. What a
stage makes appears whole or not at all; a stage that was killed is run again, and training inside
it goes on from its last checkpoint.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import fedgraft
from fedgraft.provenance import RECORD, Record, hash_files, hash_json

Say = Callable[[str], None]


def run_stage(
    folder: Path,
    *,
    title: str,
    inputs: Mapping[str, str],
    settings: Mapping[str, Any],
    make: Callable[[Path], Mapping[str, Any] | None],
    say: Say,
) -> Record:
    """Bring the stage to completion and return its record, with `seconds` among its figures.

    Args:
        make: Fills the folder; returns figures for the record.
        say: Tells the person who waits.
    """
    settings = {**settings, "code": code_hash()}
    done = Record.read(folder)
    if done and done.inputs == dict(inputs) and hash_json(done.settings) == hash_json(settings):
        say(f"{title}: done already")
        return done
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    for left in folder.iterdir():
        if not left.name.startswith("."):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    say(title)
    started = time.monotonic()
    figures = make(folder) or {}
    seconds = round(time.monotonic() - started, 2)
    record = Record.make(
        "stage",
        inputs=dict(inputs),
        settings=settings,
        figures={**figures, "seconds": seconds},
    )
    finished = folder / f".{RECORD}.{os.getpid()}"
    finished.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    finished.rename(folder / RECORD)
    return record


@cache
def code_hash() -> str:
    """Hash of the source that makes numbers (not of its display): other code, other results."""
    package = Path(str(fedgraft.__file__)).parent
    shown = {package / "report", package / "cli"}
    return hash_files(sorted(p for p in package.rglob("*.py") if not shown & set(p.parents)))
