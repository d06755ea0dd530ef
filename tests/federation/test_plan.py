"""Laws of plans and of questions' settings: what cannot be is refused before anyone is asked."""

from typing import Any

import pytest
from pydantic import ValidationError
from tests.federation.clients import plan

from fedgraft.errors import FederationError
from fedgraft.federation.task import Task
from fedgraft.training.settings import AdapterSettings

OPTIMISER = {"name": "fedadam", "rate": 0.1}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"departments": {}}, "at least 1 item"),
    ({"departments": {"hr": ()}}, "departments.hr: expected a client at least, found none"),
    ({"departments": {"a": ("x",), "b": ("x",)}}, "x is named twice; a client has one department"),
    ({"departments": {"../etc": ("x",)}}, "should match pattern"),
    ({"departments": {"hr": ("a/b",)}}, "should match pattern"),
    ({"sizes": {"nobody": {"rank": 2}}}, "nobody is no client of a department"),
    ({"sizes": {"hr-1": {"rank": 2}}}, "fedavg needs adapters of one size; take flora or flexlora"),
    ({"rule": "flora", "optimiser": OPTIMISER}, "fedadam steps from the last factors, which flora"),
    ({"rule": "fedex", "robust": {"name": "median"}}, "median is a rule of its own for A and B"),
    ({"robust": {"name": "krum", "num_hostile": 2}}, "krum needs 7 answers to tell 2 hostile ones"),
    ({"robust": {"name": "trimmed_mean", "num_hostile": 9}}, "clients; lower num_hostile, or take"),
    ({"num_rounds": 0}, "greater than 0"),
    ({"quorum": 1.5}, "less than or equal to 1"),
    ({"sampled": 0}, "greater than 0"),
    ({"proximal": -1}, "greater than or equal to 0"),
    ({"wire": "bfloat16"}, "Input should be 'float32' or 'float16'"),
    ({"rule": "mean"}, "Input should be 'fedavg'"),
    ({"shared": True}, "Extra inputs are not permitted"),
    (
        {"training": {"num_tokens": 9, "learning_rate": 1e-3, "seed": 4}},
        "the seed comes from the plan's `seed`",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_plan_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        plan(**fields)
    assert message in str(refused.value)


def test_a_plan_survives_being_written() -> None:
    asked = plan(rule="flexlora", sizes={"hr-1": {"rank": 2, "alpha": 3}}, wire="float16")
    assert type(asked).model_validate_json(asked.model_dump_json()) == asked


def test_a_tasks_settings_are_flat_and_come_out_as_they_went_in() -> None:
    training = AdapterSettings(num_tokens=100, learning_rate=1e-3, rank=4)
    task = Task(
        run="r", model="sha256:a", tokenizer="sha256:b", seed=1, row_length=64, window=64, rank=4,
        alpha=8.0, trained="B", sent="B", training=training, scored="global",
    )  # fmt: skip
    flat = task.settings()
    assert {type(value) for value in flat.values()} <= {str, int, float, bool}
    assert Task.of(flat) == task
    assert task.factors_trained == task.factors_sent == ("B",)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strange": 1}, "strange: Extra inputs"),
        ({"training.num_tokens": -1}, "training.num_tokens: Input should be greater than 0"),
        ({"run": "../elsewhere"}, "run: String should match pattern"),
        ({"run": ".."}, "run: String should match pattern"),
        ({"seed": "x"}, "seed: Input should be a valid integer"),
    ],
)
def test_settings_of_another_version_are_refused(wrong: dict[str, Any], message: str) -> None:
    training = AdapterSettings(num_tokens=100, learning_rate=1e-3)
    task = Task(
        run="r", model="a", tokenizer="b", seed=1, row_length=64, window=64, rank=4, alpha=8.0,
        training=training,
    )  # fmt: skip
    with pytest.raises(FederationError, match=f"found {message}.*one version of fedgraft"):
        Task.of({**task.settings(), **wrong})
