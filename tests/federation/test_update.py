"""An update that is not what was asked for is refused, by client and tensor, with the remedy."""

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays
from tests.federation.adapters import BASE, LAYERS, MODULE, template, tensors_of, update_of

from fedgraft.errors import FederationError
from fedgraft.federation.update import Size, Template, Update, check, layers_of, named, ordered

A, B = named(MODULE, "A"), named(MODULE, "B")


def test_what_was_asked_for_passes() -> None:
    check(update_of("hr-1"), template())
    check(update_of("hr-1", size=Size(2, 4)), template(Size(4, 8), Size(2, 4)))


def test_half_of_the_factors_pass_where_they_are_asked_for() -> None:
    b_alone = {name: tensor for name, tensor in tensors_of(0).items() if ".lora_B." in name}
    asked = dataclasses.replace(template(), sent=("B",))
    check(update_of("hr-1", tensors=b_alone), asked)
    with pytest.raises(FederationError, match=r"expected 2 tensors and nothing else, found '.*_A"):
        check(update_of("hr-1"), asked)


def test_the_layers_of_an_adapter_are_read_off_its_tensors() -> None:
    assert layers_of(tensors_of(0)) == LAYERS


def test_tensors_are_named_as_peft_names_them() -> None:
    assert named("base_model.model.model.layers.0.self_attn.q_proj", "A") == (
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    )


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"client": ""}, "expected a client's name, found ''; give each client one of its own"),
    ({"client": 3}, "expected a client's name, found 3"),
    (
        {"base": "sha256:feedfeedfeedfeed"},
        "client 'hr-1': expected an update for the model sha256:0123456789ab, found one for "
        "sha256:feedfeedfeed; give the client the model of this federation",
    ),
    ({"base": None}, "found one for None"),
    ({"round": 2}, "expected an answer to round 3, found one to round 2; it came late or was sent"),
    ({"rank": 5}, "expected an adapter of rank 4 with alpha 8, found rank 5 with alpha 8.0; set"),
    ({"rank": "4"}, "found rank '4'"),
    ({"alpha": 8e9}, "found rank 4 with alpha 8000000000.0"),
    ({"tensors": [1, 2]}, "expected tensors by name, found list; send a state dict"),
    ({"alpha": math.nan}, "with alpha nan"),
    *(
        ({"num_examples": n}, f"a whole number of examples from 1 to 1000000, found {n!r}; have")
        for n in (0, -5, True, math.nan, math.inf, 12.0, 10**9, "12", None, np.int64(3))
    ),
]


@pytest.mark.parametrize(("fields", "message"), FIELDS)
def test_a_field_that_is_not_what_was_asked_for_is_refused(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(FederationError) as refusal:
        check(dataclasses.replace(update_of("hr-1"), **fields), template())
    assert message in str(refusal.value)


def test_true_is_no_number_where_one_was_asked_for() -> None:
    asked = dataclasses.replace(template(Size(1, 8.0)), round=1)
    update = dataclasses.replace(update_of("hr-1", size=Size(1, 8.0)), round=1)
    check(update, asked)
    fields: list[dict[str, Any]] = [{"round": True}, {"rank": True}, {"num_examples": True}]
    for field in fields:
        with pytest.raises(FederationError, match=r"found .*True"):
            check(dataclasses.replace(update, **field), asked)


def with_value(name: str, value: float) -> Callable[[dict[Any, Any]], None]:
    def spoil(tensors: dict[Any, Any]) -> None:
        tensors[name].flat[-1] = value

    return spoil


TENSORS: list[tuple[Callable[[dict[Any, Any]], Any], str]] = [
    (lambda t: t.pop(A), f"expected the tensor '{A}', found none of that name among 3; train"),
    (
        lambda t: t.update(notes=t[A]),
        "expected 4 tensors and nothing else, found 'notes' too; send the factors",
    ),
    (lambda t: t.update({3: t[A]}), "expected 4 tensors and nothing else, found 3 too"),
    (lambda t: t.update({A: t[A].tolist()}), f"'{A}' as an array of float32, found list of list"),
    (lambda t: t.update({A: t[A].astype(np.float64)}), "found ndarray of float64; cast it before"),
    (lambda t: t.update({A: t[A].astype(np.float16)}), "found ndarray of float16"),
    (lambda t: t.update({A: t[A].astype(">f4")}), "found ndarray of >f4"),
    (lambda t: t.update({A: t[A].astype(object)}), "found ndarray of object"),
    (lambda t: t.update({A: np.ma.masked_array(t[A])}), "found MaskedArray of float32"),
    (
        lambda t: t.update({B: t[B].T.copy()}),
        f"expected '{B}' of shape [24, 4], found [4, 24]; train on the model and at the rank",
    ),
    (lambda t: t.update({B: t[B].ravel()}), "of shape [24, 4], found [96]"),
    (lambda t: t.update({B: t[B][:, :3]}), "of shape [24, 4], found [24, 3]"),
    (with_value(A, math.nan), f"finite numbers in '{A}', found NaN or infinity; the client's"),
    (with_value(B, -math.inf), f"finite numbers in '{B}', found NaN or infinity"),
    (
        with_value(B, 1e9),
        f"expected a norm of at most 1000 in '{B}', found 1e+09; lower the client's learning rate",
    ),
    (with_value(B, 1001), f"expected a norm of at most 1000 in '{B}', found 1001."),
    (with_value(B, 3e38), "found 3e+38"),
]


@pytest.mark.parametrize(("spoil", "message"), TENSORS)
def test_a_tensor_that_is_not_what_was_asked_for_is_refused(
    spoil: Callable[[dict[Any, Any]], Any], message: str
) -> None:
    tensors = tensors_of(0)
    spoil(tensors)
    with pytest.raises(FederationError) as refusal:
        check(update_of("hr-1", tensors=tensors), template())
    assert str(refusal.value).startswith("client 'hr-1': expected ")
    assert message in str(refusal.value)


@given(tensor=arrays(np.float32, (4, 16)))
def test_what_passes_is_finite_and_within_the_bound(tensor: np.ndarray[Any, Any]) -> None:
    update = update_of("hr-1", tensors=tensors_of(0) | {A: tensor})
    fits = bool(np.isfinite(tensor).all()) and np.linalg.norm(tensor.astype(np.float64)) <= 1e3
    if fits:
        check(update, template())
        return
    with pytest.raises(FederationError):
        check(update, template())


def test_a_tensor_whose_memory_is_not_in_order_is_read_as_it_is_meant() -> None:
    check(
        update_of("hr-1", tensors=tensors_of(0) | {A: np.ones((16, 4), np.float32).T}), template()
    )
    spoilt = np.ones((16, 4), np.float32).T
    spoilt[2, 3] = np.nan
    with pytest.raises(FederationError, match="NaN"):
        check(update_of("hr-1", tensors=tensors_of(0) | {A: spoilt}), template())


def test_an_update_has_no_room_for_anything_else() -> None:
    fields = [field.name for field in dataclasses.fields(Update)]
    assert fields == ["client", "num_examples", "tensors", "rank", "alpha", "base", "round"]
    with pytest.raises((AttributeError, TypeError)):
        update_of("hr-1").text = "secret"  # type: ignore[attr-defined]


def test_order_of_arrival_is_forgotten() -> None:
    updates = [update_of(f"client-{n}") for n in range(9)]
    arrived = random.Random(0).sample(updates, 9)
    assert [u.client for u in ordered(arrived)] == [u.client for u in updates]


def test_two_updates_of_one_client_are_refused() -> None:
    with pytest.raises(
        FederationError, match="client 'a': expected one update a round, found a se"
    ):
        ordered([update_of("a"), update_of("b"), update_of("a", seed=1)])


def test_no_update_is_refused() -> None:
    with pytest.raises(FederationError, match="at least one update, found none; keep the last ada"):
        ordered([])


@pytest.mark.parametrize(("rank", "alpha"), [(0, 8.0), (-1, 8.0), (4, 0.0), (4, math.nan)])
def test_an_impossible_size_is_refused(rank: int, alpha: float) -> None:
    with pytest.raises(FederationError, match=f"rank and an alpha above zero, found {rank} and"):
        Size(rank, alpha)


def test_a_template_that_asks_for_nothing_is_refused() -> None:
    with pytest.raises(FederationError, match="found 0 layers, 1 sizes and 2 factors; an adapter"):
        Template(base=BASE, round=0, layers={}, sizes=[Size(4, 8)], max_norm=1.0)


@pytest.mark.parametrize("bounds", [{"max_norm": math.nan}, {"max_norm": 0}, {"max_examples": 0}])
def test_bounds_that_bound_nothing_are_refused(bounds: dict[str, Any]) -> None:
    with pytest.raises(FederationError, match="expected bounds above zero, found a max_norm of"):
        dataclasses.replace(template(), **bounds)
