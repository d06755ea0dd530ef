"""A curve of forgetting, tiny and real: its points are comparable, and nothing is done twice."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.study.small import page, write_lines, write_material, write_study

from fedgraft.study.forgetting import (
    run,
)
from fedgraft.study.result import Forgetting
from fedgraft.study.study import Study

BUDGETS = (256, 512, 1024)
CURVE: dict[str, Any] = {
    "scale": None,
    "adapters": None,
    "tuning": None,
    "pretrain": {
        "num_tokens": 1024,
        "budgets": list(BUDGETS[:-1]),
        "learning_rate": 1e-3,
        "batch_tokens": 128,
        "schedule": "constant",
        "warmup": 0,
    },
    "evaluation": {"window": 32, "max_new_tokens": 3, "max_dialogues": 8},
    "curve": {
        "learning_rates": [5e-4, 1e-3],
        "domains": {"num_tokens": 512, "texts": {"far away": {"corpus": ["place:far.jsonl"]}}},
    },
}


def curve(**changes: Any) -> dict[str, Any]:
    return CURVE | {"curve": {**CURVE["curve"], **changes}}


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A curve that was run, and what was said on the way."""

    out: Path
    result: Forgetting
    said: list[str] = field(default_factory=list)

    @property
    def stages_done(self) -> list[str]:
        titles = [line for line in self.said if not line.startswith(" ")]
        return [title for title in titles if not title.endswith(": done already")]


def run_small(material: Path, out: Path, **changes: Any) -> Ran:
    file = write_study(out.with_suffix(".yaml"), **{**CURVE, **changes})
    said: list[str] = []
    result = run(Study.load(file, {"place": material}), out, say=said.append)
    return Ran(out=out, result=result, said=said)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_material(tmp_path_factory.mktemp("material"))
    write_lines(folder / "far.jsonl", [page("far away", number) for number in range(30)])
    return folder


@pytest.fixture(scope="module")
def ran(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return run_small(material, tmp_path_factory.mktemp("study") / "out")


def test_it_runs(ran: Ran) -> None:
    print(ran.result.verdict)
    print(ran.said)
