"""A tiny federation: real models, clients with a few sentences each, exchanges that misbehave."""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedgraft.federation.client import Client
from fedgraft.federation.in_process import InProcess
from fedgraft.federation.message import Answer, Question
from fedgraft.federation.plan import Plan
from fedgraft.federation.rounds import run_name
from fedgraft.federation.workplace import Workplace
from fedgraft.text.corpus import Document

DEPARTMENTS = {"finance": ("finance-1", "finance-2"), "hr": ("hr-1", "hr-2")}
TEXT = "the mill stands by river and nobody opens a ticket before morning bread is out"
WORDS = TEXT.split()
TRAINING = {"num_tokens": 600, "learning_rate": 5e-3, "batch_tokens": 256, "rank": 4}


def documents(name: str, count: int = 6) -> list[Document]:
    draw = random.Random(name)
    texts = (" ".join(draw.choices(WORDS, k=draw.randint(12, 30))) for _ in range(count))
    return [
        Document(id=f"{name}-{number}", source=name, text=f"{name} {number}: {text}.")
        for number, text in enumerate(texts)
    ]


def client(
    name: str, workplace: Workplace, state: Path, *, num: int = 6, held_out: int = 2
) -> Client:
    found = documents(name, num + held_out)
    return Client(name, workplace, found[:num], found[num:], state / name)


def clients(
    model: Path, state: Path, departments: Mapping[str, tuple[str, ...]] = DEPARTMENTS
) -> list[Client]:
    """Clients of different sizes, so that weights differ."""
    workplace = Workplace(model)
    names = [name for group in departments.values() for name in group]
    return [client(name, workplace, state, num=4 + 3 * n) for n, name in enumerate(names)]


def plan(**fields: Any) -> Plan:
    settings: dict[str, Any] = {
        "name": "tiny",
        "departments": DEPARTMENTS,
        "num_rounds": 2,
        "training": TRAINING,
        "row_length": 64,
        "window": 64,
    }
    return Plan.model_validate(settings | fields)


def kept_by(clients: Path, name: str, out: Path) -> Path:
    """The folder in which a client keeps what is of a run."""
    return clients / name / run_name(out)


class Spoiled(InProcess):
    """An exchange of which some answers are others than the clients gave."""

    def __init__(self, found: list[Client], spoil: Callable[[Answer], Answer]) -> None:
        super().__init__(found)
        self._spoil = spoil

    def ask(self, questions: Mapping[str, Question], timeout: float) -> Iterator[Answer]:
        for answer in super().ask(questions, timeout):
            yield self._spoil(answer)


def silent(*names: str, kind: str = "adapter", number: int | None = None) -> Any:
    """Some clients never answer: in one round, or in all."""

    def spoil(answer: Answer) -> Answer:
        if answer.client in names and answer.kind == kind and number in (None, answer.round):
            return replace(answer, payload={}, fault="late")
        return answer

    return spoil
