"""Laws of where a group stands: changes add up, and what is saved comes back."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.federation.adapters import LAYERS, MODULE, dense, distance, tensors_of

from fedgraft.errors import FederationError
from fedgraft.federation.aggregate import Change, Layer, added_up
from fedgraft.federation.optimiser import State
from fedgraft.federation.standing import (
    Standing,
    Stored,
    change_tensors,
    changes_of,
    factors_of,
    load_standing,
    save_standing,
)
from fedgraft.federation.update import Size, named

SIZE = Size(4, 8.0)


def change(seed: int, rank: int, module: str = MODULE) -> Change:
    generator = np.random.default_rng(seed)
    num_out, num_in = LAYERS[module]
    return Change(
        left=generator.normal(size=(num_out, rank)).astype(np.float32),
        right=generator.normal(size=(rank, num_in)).astype(np.float32),
    )


def weights(standing: Standing, module: str = MODULE) -> NDArray[np.float64]:
    """What is added to a layer's weights in all."""
    tensors = standing.adapters[SIZE]
    a, b = (tensors[named(module, factor)].astype(np.float64) for factor in ("A", "B"))
    found = standing.changes.get(module)
    whole: NDArray[np.float64] = SIZE.scale * b @ a
    return whole + dense(found) if found else whole


@given(ranks=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_changes_add_up_and_their_rank_stays_within_the_layer(ranks: list[int]) -> None:
    standing, expected = Standing(adapters={SIZE: tensors_of(0)}), np.zeros(LAYERS[MODULE])
    for number, rank in enumerate(ranks):
        one = change(number, rank)
        expected = expected + dense(one)
        standing = standing.advanced([Layer(module=MODULE, change=one)])
    found = standing.changes[MODULE]
    assert distance(dense(found), expected) < 1e-6
    assert found.left.shape[1] <= max(min(LAYERS[MODULE]), ranks[0])


def test_one_change_alone_is_itself() -> None:
    one = change(3, 2)
    same = added_up([], one)
    assert np.array_equal(same.left, one.left)
    assert np.array_equal(same.right, one.right)


def test_an_adapter_and_a_change_are_one_adapter_of_a_higher_rank() -> None:
    standing = Standing(
        adapters={SIZE: tensors_of(0)}, changes={m: change(5, 3, m) for m in LAYERS}
    )
    merged = standing.as_one_adapter(SIZE)
    for module in LAYERS:
        a, b = (merged[named(module, factor)].astype(np.float64) for factor in ("A", "B"))
        assert a.shape[0] == b.shape[1] == 4 + 3
        assert distance(SIZE.scale * b @ a, weights(standing, module)) < 1e-6


def test_factors_that_a_rule_does_not_name_stay_or_begin_anew() -> None:
    old, fresh = tensors_of(0), tensors_of(1)
    standing = Standing(adapters={SIZE: old})
    name = named(MODULE, "B")
    layer = Layer(module=MODULE, adapters={SIZE: {name: fresh[name]}})
    stayed = standing.advanced([layer]).adapters[SIZE]
    assert np.array_equal(stayed[name], fresh[name])
    assert all(np.array_equal(stayed[other], old[other]) for other in old if other != name)
    anew = standing.advanced([], {SIZE: fresh}).adapters[SIZE]
    assert all(np.array_equal(anew[other], fresh[other]) for other in old)
    assert np.array_equal(standing.adapters[SIZE][name], old[name])


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    other = Size(2, 3.0)
    standing = Standing(
        adapters={SIZE: tensors_of(0), other: tensors_of(1, rank=2)},
        changes={MODULE: change(2, 5)},
        optimiser=State(step=7, momentum=tensors_of(3)),
    )
    save_standing(tmp_path, standing)
    found = load_standing(tmp_path)
    assert list(found.adapters) == [SIZE, other]
    for size, tensors in standing.adapters.items():
        assert found.adapters[size].keys() == tensors.keys()
        assert all(np.array_equal(found.adapters[size][n], t) for n, t in tensors.items())
    assert np.array_equal(found.changes[MODULE].left, standing.changes[MODULE].left)
    assert found.optimiser.step == 7
    assert all(np.array_equal(found.optimiser.momentum[n], t) for n, t in tensors_of(3).items())


def test_a_question_carries_both_and_they_are_told_apart() -> None:
    standing = Standing(adapters={SIZE: tensors_of(0)}, changes={MODULE: change(2, 5)})
    sent = standing.sent(SIZE)
    assert factors_of(sent).keys() == tensors_of(0).keys()
    assert changes_of(sent).keys() == {MODULE}
    half = {k: v for k, v in change_tensors(standing.changes).items() if "left" in k}
    with pytest.raises(FederationError, match=r"expected .*change.right beside"):
        changes_of(half)


def test_stored_tensors_are_a_mapping(tmp_path: Path) -> None:
    standing = Standing(adapters={SIZE: tensors_of(0)})
    save_standing(tmp_path, standing)
    stored = Stored(tmp_path / "adapter-0.safetensors")
    assert len(stored) == len(tensors_of(0)) + 2
    with pytest.raises(KeyError, match="nobody"):
        stored["nobody"]
    with pytest.raises(FederationError, match=r"gone.safetensors: expected tensors in safetensors"):
        Stored(tmp_path / "gone.safetensors")
