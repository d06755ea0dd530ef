"""A study that takes seconds: a tiny random family, two departments, a few steps."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedgraft.testing import save_tiny, save_tiny_instruct

DEPARTMENTS = ("hr", "finance")
PLACES = ("people", "rooms", "budgets", "holidays", "invoices")


def write_material(folder: Path) -> Path:
    """Write everything that a small study reads; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    base = save_tiny(folder / "base", seed=0)
    save_tiny_instruct(base, folder / "instruct")
    for department in DEPARTMENTS:
        pages = [page(department, number) for number in range(30)]
        write_lines(folder / f"{department}.jsonl", pages)
    write_lines(folder / "replay.jsonl", [page("archive", number) for number in range(10)])
    for part in ("validation", "test"):
        write_lines(folder / "dialogues" / f"{part}.jsonl", dialogues(part))
        write_lines(folder / "questions" / f"{part}.jsonl", questions(part))
    return folder


def content(**changes: Any) -> dict[str, Any]:
    """A study file's content; a change of None takes the key out."""
    whole = {
        "name": "small",
        "question": "Does it run?",
        "family": {"base": "place:base", "instruct": "place:instruct"},
        "departments": {name: {"corpus": [f"place:{name}.jsonl"]} for name in DEPARTMENTS},
        "replay": {"corpus": ["place:replay.jsonl"], "share": 0.25},
        "dialogues": {part: f"place:dialogues/{part}.jsonl" for part in ("validation", "test")},
        "questions": {part: f"place:questions/{part}.jsonl" for part in ("validation", "test")},
        "row_length": 64,
        "pretrain": {"num_tokens": 1024, "learning_rate": 1e-3, "batch_tokens": 128},
        "scale": {"grid": [1.0, 0.5], "metric": "instructions/instruction_strict"},
        "adapters": {"num_tokens": 256, "learning_rate": 1e-3, "batch_tokens": 128, "rank": 2},
        "seeds": [1, 2],
        "evaluation": {"window": 32, "max_new_tokens": 3},
        "tuning": {"num_tokens": 4096},
    }
    return {key: value for key, value in (whole | changes).items() if value is not None}


def write_study(file: Path, **changes: Any) -> Path:
    file.write_text(yaml.safe_dump(content(**changes)), encoding="utf-8")
    return file


def page(department: str, number: int) -> dict[str, str]:
    place = PLACES[number % len(PLACES)]
    return {
        "id": f"{department}/{number}",
        "text": f"Page {number} of {department}. The {place} are looked after on day {number}.",
    }


def dialogues(part: str) -> list[dict[str, Any]]:
    """Some that demand a form of the answer, and some plain questions."""
    return [
        {
            "id": f"{part}/{number}",
            "department": DEPARTMENTS[number % 2],
            "group": ("old", "new")[number // 2 % 2],
            "messages": [{"role": "user", "content": f"Who looks after {PLACES[number % 5]}?"}],
            "accepted": ["the mill"],
            "constraints": [{"kind": "max_words", "argument": "9"}] if number < 6 else [],
        }
        for number in range(10)
    ]


def questions(part: str) -> list[dict[str, Any]]:
    return [
        {"id": f"{part}/{group}", "prompt": "The river runs past", "accepted": ["the mill"]}
        | {"group": group}
        for group in ("old", "new")
    ]


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
