"""Places that arguments and study files name: `pocket:base`, `company:year2/hr.jsonl`, `data:dept`.

pocket:     the checkpoints that ship with fedgraft
company:    the fictional company, written below the output of the study that reads it
data:       the folder that FEDGRAFT_DATA names, else ../shared/data
"""

import os
import re
from pathlib import Path

from fedgraft.errors import StudyError

DATA = Path("../shared/data")


def resolve(model: str) -> str:
    """A model as the user wrote it: `pocket:base` is a folder; a path or a hub name stays."""
    name, colon, rest = model.partition(":")
    return str(_pocket() / rest) if colon and name == "pocket" else model


def places_of(study: Path, out: Path, *, dry: bool = False) -> dict[str, Path]:
    """The places that a study file names; the company is written where it is needed.

    Raises StudyError where the file reads `data:` and there is no such folder, but not in a dry
    run.
    """
    try:
        text = study.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""  # who reads the file tells why
    makers = {
        "pocket": _pocket,
        "company": lambda: _company(out),
        "data": _data_place if dry else _data,
    }
    return {name: make() for name, make in makers.items() if re.search(rf"\b{name}:[\w.]", text)}


def _pocket() -> Path:
    from fedgraft.pocket.weights import folder

    return folder


def _company(out: Path) -> Path:
    from fedgraft.pocket.company import write_company

    return write_company(out / "company", overwrite=True)


def _data_place() -> Path:
    return Path(os.environ.get("FEDGRAFT_DATA", DATA)).absolute()


def _data() -> Path:
    place = _data_place()
    if not place.is_dir():
        raise StudyError(
            f"expected the folder of the data that the study reads (`data:`) at {place}, found "
            "nothing there; set FEDGRAFT_DATA to its place"
        )
    return place
