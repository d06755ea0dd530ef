"""Clients that answer what nobody asked for: named, counted, left out; the round goes on without.

Each way to spoil an answer is a client of one federation of real, tiny models, in one department
with honest ones. What is left of the round is, to the bit, what the honest ones alone make.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from benchmarks.hostile import ATTACKS, RULES, Text, held_out_loss
from tests.federation.clients import client, plan

from fedgraft.federation.client import Client
from fedgraft.federation.history import History, Part
from fedgraft.federation.in_process import InProcess
from fedgraft.federation.ledger import Ledger
from fedgraft.federation.message import Answer, Question
from fedgraft.federation.rounds import run_rounds
from fedgraft.federation.standing import Stored
from fedgraft.federation.workplace import Workplace
from fedgraft.pocket import weights
from fedgraft.pocket.company import SEED, pages_of_year
from fedgraft.pocket.entities import Company
from fedgraft.testing import save_tiny
from fedgraft.training.settings import AdapterSettings

Spoil = Callable[[Answer], Answer]
NUM_ROUNDS = 2
HONEST = ("honest-1", "honest-2")


def with_payload(answer: Answer, change: Mapping[str, Any]) -> Answer:
    """An answer with values changed; None takes one out."""
    payload = {k: v for k, v in {**answer.payload, **change}.items() if v is not None}
    return replace(answer, payload=payload)


def some_tensor(answer: Answer) -> str:
    return min(name for name in answer.payload if ".lora_B." in name)


def tensor_changed(change: Callable[[Any], Any]) -> Spoil:
    def spoil(answer: Answer) -> Answer:
        name = some_tensor(answer)
        return with_payload(answer, {name: change(np.array(answer.payload[name]))})

    return spoil


def one_number(value: float) -> Callable[[Any], Any]:
    def change(tensor: Any) -> Any:
        tensor.flat[-1] = value
        return tensor

    return change


def all_tensors(change: Callable[[Any], Any]) -> Spoil:
    return lambda answer: with_payload(
        answer, {k: change(v) for k, v in answer.payload.items() if isinstance(v, np.ndarray)}
    )


SPOILT: dict[str, tuple[Spoil, str]] = {
    "nan": (
        tensor_changed(one_number(np.nan)),
        "expected finite numbers in '.*', found NaN or inf",
    ),
    "infinite": (tensor_changed(one_number(-np.inf)), "expected finite numbers in '.*', found NaN"),
    "renamed": (
        lambda answer: with_payload(
            answer, {some_tensor(answer): None, "x.lora_B.weight": np.ones((2, 2), np.float32)}
        ),
        "expected the tensor '.*', found none of that name",
    ),
    "extra": (
        lambda answer: with_payload(answer, {"backdoor.weight": np.ones(3, np.float32)}),
        "tensors and nothing else, found 'backdoor.weight' too",
    ),
    "lengthy": (
        lambda answer: with_payload(answer, {"a" * 100_000: np.ones(3, np.float32)}),
        "tensors and nothing else, found 'aaa.* too",
    ),
    "short": (
        tensor_changed(lambda tensor: tensor[:-1]),
        r"of shape \[.*\], found \[.*\]; train on",
    ),
    "flat": (tensor_changed(np.ravel), r"of shape \[.*\], found \[\d+\]; train on"),
    "whole": (tensor_changed(lambda tensor: tensor.astype(np.int64)), "as an array of float32"),
    "large": (
        all_tensors(lambda tensor: np.asarray(tensor * np.float32(1e6))),
        "a norm of at most 1000 in '.*', found",
    ),
    "unasked": (
        lambda answer: with_payload(answer, {"text": 7}),
        "adapter: expected only .*, found 'text'",
    ),
    "boastful": (
        lambda answer: with_payload(answer, {"num_examples": 10**9}),
        "a whole number of examples from 1 to 1000000, found 1000000000",
    ),
    "negative": (
        lambda answer: with_payload(answer, {"num_examples": -5}),
        "a whole number of examples from 1 to 1000000, found -5",
    ),
    "immeasurable": (
        lambda answer: with_payload(answer, {"loss": float("nan")}),
        "adapter: expected loss to be finite",
    ),
    "early": (lambda answer: replace(answer, round=answer.round + 1), "an answer to round"),
    "off-topic": (lambda answer: replace(answer, kind="scores"), "scores: expected only"),
    "empty": (lambda answer: replace(answer, payload={}), "a whole number of examples"),
}
"""Client -> what it does to an honest answer, and the words that it is refused with."""


class Spoiling:
    """A program of somebody else: it trains nothing, and answers with what it got, spoilt."""

    def __init__(self, name: str, spoil: Spoil) -> None:
        self.name, self._spoil = name, spoil

    def answer(self, question: Question) -> Answer:
        plain = Answer(client=self.name, kind=question.kind, round=question.round)
        if question.kind != "adapter":
            return replace(plain, payload={"num_examples": 6})
        figures = {"num_examples": 6, "loss": 4.0, "client/nats_per_token": 4.0}
        moved = {k: v + np.float32(0.01) for k, v in question.tensors.items()}
        return self._spoil(replace(plain, payload={**moved, **figures}))


class Replaying(Spoiling):
    """Answers the first question, and sends that answer again and again."""

    _first: Answer | None = None

    def answer(self, question: Question) -> Answer:
        if question.kind == "adapter":
            self._first = self._first or super().answer(question)
            return self._first
        return super().answer(question)


def honestly(answer: Answer) -> Answer:
    return answer


def silently(answer: Answer) -> Answer:
    return replace(answer, payload={}, fault="failed")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(save_tiny(tmp_path_factory.mktemp("model") / "tiny", num_layers=1))


def run(
    workplace: Workplace, place: Path, others: Sequence[Spoiling], **fields: Any
) -> tuple[History, Path]:
    """A run of the honest clients and others, and its folder."""
    clients = [client(name, workplace, place) for name in HONEST]
    clients += cast("Sequence[Client]", others)
    departments = {"hr": [each.name for each in clients]}
    asked = plan(departments=departments, quorum=0.1, **fields)
    out = place / "out"
    return run_rounds(InProcess(clients), asked, workplace._source.path, out), out


def adapter_of(out: Path, number: int = NUM_ROUNDS) -> dict[str, bytes]:
    (file,) = (out / "rounds" / f"{number:04d}" / "hr").glob("adapter-*.safetensors")
    return {name: tensor.tobytes() for name, tensor in Stored(file).items()}


@pytest.fixture(scope="module")
def attacked(
    workplace: Workplace, tmp_path_factory: pytest.TempPathFactory
) -> tuple[History, Path]:
    others = [Spoiling(name, spoil) for name, (spoil, _) in SPOILT.items()]
    place = tmp_path_factory.mktemp("attacked")
    return run(workplace, place, [Replaying("replaying", honestly), *others])


def part(history: History, name: str, number: int) -> Part:
    (found,) = (part for part in history.rounds[number - 1].parts if part.client == name)
    return found


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_answer_is_refused_by_name_in_every_round(
    name: str, attacked: tuple[History, Path]
) -> None:
    for number in range(1, NUM_ROUNDS + 1):
        found = part(attacked[0], name, number)
        assert found.fault is None
        assert found.refused
        assert found.refused.startswith(f"client {name!r}: ")
        assert re.search(SPOILT[name][1], found.refused), found.refused
        assert len(found.refused) < 1000
        assert not found.counted
        assert found.scores == {}  # nothing that it says of itself is believed


def test_an_answer_of_another_round_is_refused(attacked: tuple[History, Path]) -> None:
    assert part(attacked[0], "replaying", 1).counted
    found = part(attacked[0], "replaying", 2)
    assert found.refused
    assert (
        "client 'replaying': expected an answer to round 2, found one to round 1" in found.refused
    )
    assert "it came late or was sent again; drop it" in found.refused


def test_the_rounds_go_on_and_honest_clients_count(attacked: tuple[History, Path]) -> None:
    history, _ = attacked
    assert len(history.rounds) == NUM_ROUNDS
    for done in history.rounds:
        assert done.kept == {}
        assert len(done.parts) == len(SPOILT) + len(HONEST) + 1
        assert {p.client for p in done.parts if p.counted} - {"replaying"} == set(HONEST)
    final = {part.client: part for part in history.final}
    assert all(final[name].counted and final[name].scores for name in HONEST)


def test_what_is_left_is_what_the_others_make_without_them_to_the_bit(
    attacked: tuple[History, Path], workplace: Workplace, tmp_path: Path
) -> None:
    others = [Spoiling(name, silently) for name in SPOILT]
    _, out = run(workplace, tmp_path, [Replaying("replaying", honestly), *others])
    found, first = (adapter_of(out, number) for number in (NUM_ROUNDS, 1))
    assert found == adapter_of(attacked[1])
    assert found != first


def test_what_was_refused_stands_in_the_ledger_too(attacked: tuple[History, Path]) -> None:
    entries = [e for e in Ledger(attacked[1] / "ledger.jsonl").entries if e.phase == "train"]
    for name in SPOILT:
        mine = [entry for entry in entries if entry.client == name]
        assert len(mine) == NUM_ROUNDS
        assert all(entry.bytes_up > 0 for entry in mine)


def test_a_client_cannot_answer_in_anothers_name(workplace: Workplace, tmp_path: Path) -> None:
    def steal(answer: Answer) -> Answer:
        return replace(all_tensors(np.zeros_like)(answer), client="honest-1")

    history, _ = run(workplace, tmp_path, [Spoiling("thief", steal)], num_rounds=1)
    for done in history.rounds:
        assert done.kept == {}
        assert [p.client for p in done.parts] == [*HONEST, "thief"]
        assert all(p.counted for p in done.parts)


@pytest.mark.parametrize("value", ["a word of the text", True, [1, 2]])
def test_an_answer_that_is_no_message_costs_its_client_the_round_and_nobody_else(
    value: object, workplace: Workplace, tmp_path: Path
) -> None:
    def garble(answer: Answer) -> Answer:
        return with_payload(answer, {"num_tokens": value})

    history, _ = run(workplace, tmp_path, [Spoiling("x", garble)], num_rounds=1)
    for done in history.rounds:
        assert done.kept == {}
        assert {p.client for p in done.parts if p.counted} == set(HONEST)
        assert next(p for p in done.parts if p.client == "x").fault == "failed"


@pytest.mark.slow
def test_robust_rules_keep_the_loss_that_fedavg_loses_to_two_of_ten() -> None:
    """A small version of benchmarks/hostile.py, on the company's pages and with one seed.

    Clipping cuts lengths and leaves directions: it loses some of what FedAvg does, no more.
    """
    company = Company.found(SEED)
    pages = pages_of_year(company, 2, SEED)
    text = Text(train=tuple(pages[30:]), held_out=tuple(pages[:30]))
    model = weights.folder / "base"
    training = AdapterSettings(
        num_tokens=1024, batch_tokens=512, learning_rate=6e-3, schedule="constant", warmup=0
    )
    learn = partial(
        held_out_loss, Workplace(model), model, text, training, num_rounds=2, seed=0, first={}
    )
    clean = learn()
    found = {
        rule: learn(robust=robust, factor=ATTACKS["both"]) / clean for rule, robust in RULES.items()
    }
    assert found.pop("FedAvg") > max(1.05, found.pop("clipping"))
    assert all(ratio < 1.05 for ratio in found.values()), found
