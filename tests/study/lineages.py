"""A study of lineages that takes seconds: on the material of `tests.study.small`."""

from pathlib import Path
from typing import Any

import yaml
from tests.study.small import DEPARTMENTS, write_lines, write_material

TRAINING: dict[str, Any] = {"num_tokens": 1024, "learning_rate": 1e-3, "batch_tokens": 128}
RESIDUAL = ["base", "instruct"]
SCORES = "instructions/instruction_strict"


def write_lessons(folder: Path) -> Path:
    """The material of small studies, and forty dialogues to be tuned on; returns the folder."""
    write_material(folder)
    write_lines(
        folder / "lessons.jsonl",
        [
            {
                "id": f"lesson/{number}",
                "messages": [
                    {"role": "user", "content": f"Question {number % 36}?"},
                    {"role": "assistant", "content": f"Answer {number % 7}."},
                ],
            }
            for number in range(40)
        ],
    )
    return folder


def content(**changes: Any) -> dict[str, Any]:
    """A study file's content; a change of None takes the key out."""
    whole = {
        "name": "small",
        "question": "Does it run?",
        "models": {
            "base": "place:base",
            "instruct": "place:instruct",
            "s1": {"from": "instruct", "pretrain": TRAINING},
            "newer": {"from": "base", "pretrain": TRAINING},
            "graft": {"from": "newer", "graft": {"residual": RESIDUAL}},
        },
        "departments": {name: {"corpus": [f"place:{name}.jsonl"]} for name in sorted(DEPARTMENTS)},
        "replay": {"corpus": ["place:replay.jsonl"], "share": 0.25},
        "dialogues": {"test": "place:dialogues/test.jsonl"},
        "questions": {"test": "place:questions/test.jsonl"},
        "arms": {
            "base": "the base as it came",
            "instruct": "the instruct model as it came",
            "s1": "S1",
            "newer": "the newer base",
            "graft": "the graft",
        },
        "score": SCORES,
        "row_length": 64,
        "seeds": [1, 2],
        "evaluation": {"window": 32, "max_new_tokens": 3},
    }
    return {key: value for key, value in (whole | changes).items() if value is not None}


def with_models(*arms: str, **models: Any) -> dict[str, Any]:
    """Changes: further models, and which of all are scored."""
    known = content()
    scored = arms or tuple(known["arms"])
    return {
        "models": {**known["models"], **models},
        "arms": {arm: known["arms"].get(arm, arm) for arm in scored},
    }


def only(*arms: str, **models: Any) -> dict[str, Any]:
    """Changes: base, instruct and these models alone, and which of them are scored."""
    came = {name: f"place:{name}" for name in RESIDUAL}
    return {"models": came | models, "arms": {arm: arm for arm in arms}}


def write_study(file: Path, **changes: Any) -> Path:
    file.write_text(yaml.safe_dump(content(**changes), sort_keys=False), encoding="utf-8")
    return file
