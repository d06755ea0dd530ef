"""Laws of a client: the same question gets the same answer, and reasons stay at home."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.federation.clients import TRAINING, client, documents

from fedgraft.federation.aggregate import Change
from fedgraft.federation.client import Client
from fedgraft.federation.message import Answer, Question
from fedgraft.federation.standing import change_tensors
from fedgraft.federation.task import Task
from fedgraft.federation.update import Size
from fedgraft.federation.workplace import Workplace
from fedgraft.testing import save_tiny
from fedgraft.training.settings import AdapterSettings

RUN = "tiny-1"
SIZE = Size(4, 16.0)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    torch.set_num_threads(1)
    return Workplace(save_tiny(tmp_path_factory.mktemp("models") / "graft", num_layers=1))


def question(
    workplace: Workplace, *, kind: Any = "adapter", number: int = 1, **task: Any
) -> Question:
    fields: dict[str, Any] = {
        "run": RUN,
        "model": workplace.content_hash,
        "tokenizer": workplace.tokenizer_hash,
        "seed": 0,
        "row_length": 64,
        "window": 64,
        "rank": SIZE.rank,
        "alpha": SIZE.alpha,
        "training": AdapterSettings.model_validate(TRAINING),
    }
    settings = Task.model_validate(fields | task).settings()
    tensors = workplace.fresh(SIZE, 3)
    return Question(kind=kind, round=number, phase="train", settings=settings, tensors=tensors)


def assert_same(one: Answer, other: Answer) -> None:
    assert one.fault is other.fault is None
    assert one.payload.keys() == other.payload.keys()
    for name, value in one.payload.items():
        if not name.startswith("seconds"):
            assert np.array_equal(value, other.payload[name]), name


def test_the_same_question_gets_the_same_answer(workplace: Workplace, tmp_path: Path) -> None:
    asked = question(workplace)
    one = client("hr-1", workplace, tmp_path)
    first = one.answer(asked)
    client("hr-2", workplace, tmp_path).answer(asked)  # in between, at the same workplace
    assert_same(first, one.answer(asked))
    assert_same(first, client("hr-1", workplace, tmp_path / "elsewhere").answer(asked))


def test_clients_and_rounds_draw_differently(workplace: Workplace, tmp_path: Path) -> None:
    found = documents("text", 8)
    answers = [
        Client(name, workplace, found[:6], found[6:], tmp_path / name).answer(
            question(workplace, number=number)
        )
        for name, number in (("a", 1), ("b", 1), ("a", 2))
    ]
    made = [
        np.concatenate([v.ravel() for v in one.payload.values() if isinstance(v, np.ndarray)])
        for one in answers
    ]
    assert not np.array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])


def test_factors_that_a_question_lacks_are_the_clients_own_of_an_earlier_round(
    workplace: Workplace, tmp_path: Path
) -> None:
    one = client("hr-1", workplace, tmp_path)
    first = one.answer(question(workplace))
    asked = question(workplace, number=2)
    kept_b = {k: v for k, v in first.payload.items() if ".lora_B." in k}
    only_a = {k: v for k, v in asked.tensors.items() if ".lora_A." in k}
    whole = replace(asked, tensors={**only_a, **kept_b})  # type: ignore[dict-item]
    without = replace(asked, tensors=only_a)
    assert_same(one.answer(without), one.answer(whole))
    assert_same(one.answer(without), one.answer(whole))  # its own of round 2 are not of before


def test_a_client_that_lost_its_factors_refuses(
    workplace: Workplace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = question(workplace)
    only_a = {k: v for k, v in asked.tensors.items() if ".lora_A." in k}
    found = client("hr-1", workplace, tmp_path).answer(replace(asked, tensors=only_a))
    assert found.fault == "refused"
    assert "expected factors of a round before 1" in caplog.text


@pytest.mark.parametrize(
    ("fields", "fault", "logged"),
    [
        ({"model": "sha256:other"}, "other model", "expected the model sha256:other of the"),
        ({"tokenizer": "sha256:other"}, "other tokenizer", "expected the tokenizer sha256:other"),
        ({"training": None}, "refused", "expected settings of training, found none"),
        ({"kind": "centroids"}, "refused", "expected settings of a selection, found none"),
        ({"kind": "scores"}, "refused", "expected the name of what is to be scored"),
        ({"rank": 2}, "refused", "of another rank"),
    ],
)
def test_a_reason_stays_in_the_clients_log(
    fields: dict[str, Any],
    fault: str,
    logged: str,
    workplace: Workplace,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    found = client("hr-1", workplace, tmp_path).answer(question(workplace, **fields))
    assert found.fault == fault
    assert dict(found.payload) == {}
    assert logged in caplog.text


@pytest.mark.parametrize(
    "leak",
    [
        {"note": "all our salaries"},
        {"num_examples": "all our salaries"},
        {"hr-1.text": np.frombuffer(b"all our salaries", np.uint8)},
        {"base_model.model.other": np.zeros(3, np.float32)},
    ],
)
def test_what_is_no_answer_does_not_pass_the_gate(
    leak: dict[str, Any], workplace: Workplace, tmp_path: Path
) -> None:
    class Leaking(Client):
        def _sizes(self, task: Task) -> Any:
            return {**super()._sizes(task), **leak}

    found = documents("hr-1", 8)
    asked = question(workplace, kind="sizes")
    one = Leaking("hr-1", workplace, found[:6], found[6:], tmp_path).answer(asked)
    assert (one.fault, dict(one.payload)) == ("refused", {})


def test_a_diverging_client_says_so(workplace: Workplace, tmp_path: Path) -> None:
    training = AdapterSettings.model_validate({**TRAINING, "learning_rate": 1e30})
    found = client("hr-1", workplace, tmp_path).answer(question(workplace, training=training))
    assert found.fault == "diverged"


def test_a_client_without_examples_says_so(workplace: Workplace, tmp_path: Path) -> None:
    one = client("hr-1", workplace, tmp_path, num=0, held_out=2)
    assert one.answer(question(workplace, kind="sizes")).fault == "no data"


def test_a_client_that_holds_nothing_out_trains_and_scores_nothing(
    workplace: Workplace, tmp_path: Path
) -> None:
    scored, silent = (
        client("hr-1", workplace, tmp_path / str(held_out), num=3, held_out=held_out).answer(
            question(workplace, scored="graft")
        )
        for held_out in (2, 0)
    )
    assert silent.fault is None
    assert {"num_scored", "graft/nats_per_token", "client/nats_per_token"} == (
        scored.payload.keys() - silent.payload.keys()
    )
    for name, value in silent.payload.items():
        if not name.startswith("seconds"):
            assert np.array_equal(value, scored.payload[name]), name


def test_a_change_is_put_on_and_taken_off_to_the_bit(workplace: Workplace, tmp_path: Path) -> None:
    one = client("hr-1", workplace, tmp_path)
    asked = question(workplace, kind="scores", scored="graft")
    module = next(iter(asked.tensors)).rpartition(".lora_")[0]
    num_out = asked.tensors[f"{module}.lora_B.weight"].shape[0]
    num_in = asked.tensors[f"{module}.lora_A.weight"].shape[1]
    generator = np.random.default_rng(0)
    change = Change(
        left=generator.normal(size=(num_out, 3)).astype(np.float32),
        right=generator.normal(size=(3, num_in)).astype(np.float32),
    )
    before = one.answer(asked)
    with_change = replace(asked, tensors={**asked.tensors, **change_tensors({module: change})})
    changed = one.answer(with_change)
    assert before.payload["graft/nats_per_token"] != changed.payload["graft/nats_per_token"]
    assert_same(before, one.answer(asked))
    assert_same(changed, one.answer(with_change))
    workplace.fresh(Size(2, 4.0), 0)  # another size in between
    assert_same(changed, one.answer(with_change))


def test_half_a_change_is_refused(
    workplace: Workplace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = question(workplace, kind="scores", scored="graft")
    half = {**asked.tensors, "layer.change.left": np.ones((2, 2), np.float32)}
    found = client("hr-1", workplace, tmp_path).answer(replace(asked, tensors=half))
    assert found.fault == "refused"
    assert "expected layer.change.right beside layer.change.left" in caplog.text


def test_a_client_keeps_two_rounds_of_its_own(workplace: Workplace, tmp_path: Path) -> None:
    one = client("hr-1", workplace, tmp_path)
    for number in (1, 2, 3):
        assert one.answer(question(workplace, number=number)).fault is None
    names = sorted(file.name for file in (tmp_path / "hr-1" / RUN).iterdir())
    assert names == ["adapter-0002.safetensors", "adapter-0003.safetensors"]
