"""Laws of messages: what goes in comes out, and nothing else is read."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import save

from fedgraft.errors import FederationError
from fedgraft.federation.message import (
    FAULTS,
    Answer,
    Question,
    answer_bytes,
    answer_from,
    narrowed,
    question_bytes,
    question_from,
    widened,
)

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20)
FLOATS = arrays.arrays(
    np.float32,
    arrays.array_shapes(max_dims=3, max_side=4),
    elements=st.floats(-1e3, 1e3, width=32),
)
TENSORS = st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), FLOATS, max_size=4)
SCALARS = st.text(max_size=9) | st.integers(-(2**53), 2**53) | st.booleans() | st.floats(-1e9, 1e9)


@given(settings=st.dictionaries(NAMES, SCALARS, max_size=4), tensors=TENSORS)
def test_a_question_comes_out_as_it_went_in(
    settings: dict[str, str | int | float | bool], tensors: dict[str, np.ndarray]
) -> None:
    asked = Question(kind="adapter", round=3, phase="train", settings=settings, tensors=tensors)
    found = question_from(question_bytes(asked))
    assert (found.kind, found.round, found.phase) == ("adapter", 3, "train")
    assert found.settings == settings
    assert {k: type(v) for k, v in found.settings.items()} == {
        k: type(v) for k, v in settings.items()
    }
    _assert_same(found.tensors, tensors)


@given(tensors=TENSORS, count=st.integers(0, 2**40), figure=st.floats(-1e6, 1e6))
def test_an_answer_comes_out_as_it_went_in(
    tensors: dict[str, np.ndarray], count: int, figure: float
) -> None:
    tensors = {f"t {name}": tensor for name, tensor in tensors.items()}
    payload: dict[str, Any] = {**tensors, "num_examples": count, "loss": figure}
    found = answer_from(
        answer_bytes(Answer(client="hr-1", kind="adapter", round=2, payload=payload))
    )
    assert (found.client, found.kind, found.round, found.fault) == ("hr-1", "adapter", 2, None)
    assert (found.payload["num_examples"], found.payload["loss"]) == (count, figure)
    _assert_same({k: found.payload[k] for k in tensors}, tensors)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_comes_out_as_it_went_in(fault: str) -> None:
    answer = Answer(client="a", kind="sizes", round=0, fault=fault)  # type: ignore[arg-type]
    assert answer_from(answer_bytes(answer)) == answer


def _assert_same(found: object, expected: dict[str, np.ndarray]) -> None:
    assert isinstance(found, dict)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert np.array_equal(found[name], tensor)


def forged(**about: object) -> bytes:
    return save({}, metadata={"message": json.dumps(about)})  # type: ignore[no-any-return]


QUESTION = {"kind": "sizes", "round": 1, "phase": "train", "settings": {}}
ANSWER = {"client": "a", "kind": "sizes", "round": 1, "scalars": {}, "fault": None}
BROKEN = [b"", b"hello", bytes(8), b"\x80\x04pickle" * 3, save({}), forged(), forged(kind="sizes")]


@pytest.mark.parametrize("data", [*BROKEN, forged(**ANSWER)])
def test_bytes_that_are_no_question_are_refused(data: bytes) -> None:
    with pytest.raises(FederationError, match="expected a message of fedgraft's federation"):
        question_from(data)


@pytest.mark.parametrize("data", [*BROKEN, forged(**QUESTION)])
def test_bytes_that_are_no_answer_are_refused(data: bytes) -> None:
    with pytest.raises(FederationError, match="one version of fedgraft everywhere"):
        answer_from(data)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "text"},
        {"round": "1"},
        {"phase": "talk"},
        {"settings": {"a": [1]}},
        {"settings": 1},
    ],
)
def test_a_question_with_other_values_is_refused(wrong: dict[str, object]) -> None:
    question_from(forged(**QUESTION))
    with pytest.raises(FederationError, match="fields of a question with other values"):
        question_from(forged(**{**QUESTION, **wrong}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"client": 1},
        {"kind": "text"},
        {"round": 1.0},
        {"scalars": {"note": "all our salaries"}},
        {"scalars": {"yes": True}},
        {"scalars": []},
        {"fault": "all our salaries"},
    ],
)
def test_an_answer_with_other_values_is_refused(wrong: dict[str, object]) -> None:
    answer_from(forged(**ANSWER))
    with pytest.raises(FederationError, match="fields of an answer with other values"):
        answer_from(forged(**{**ANSWER, **wrong}))


def test_an_answer_that_names_a_thing_twice_is_refused() -> None:
    about = json.dumps({**ANSWER, "scalars": {"loss": 1.0}})
    twice = save({"loss": np.ones(1, np.float32)}, metadata={"message": about})
    with pytest.raises(FederationError, match="fields of an answer with other values"):
        answer_from(twice)


def test_numbers_too_large_for_float16_are_refused_by_tensor() -> None:
    tensors = {"small": np.ones(3, np.float32), "large": np.full(2, 1e5, np.float32)}
    with pytest.raises(FederationError, match="numbers in 'large' that float16 holds"):
        narrowed(tensors, "float16")
    found = widened(narrowed({"small": tensors["small"]}, "float16"))
    assert found["small"].dtype == np.float32
    assert narrowed(tensors, "float32")["large"][0] == 1e5
