"""Two of ten clients are hostile, and the result stays with the honest eight; FedAvg does not."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from tests.federation.adapters import tensors_of, update_of

from fedgraft.errors import FederationError
from fedgraft.federation.aggregate import Layer, adapter, aggregate
from fedgraft.federation.robust import clipped, krum, median, trimmed_mean
from fedgraft.federation.update import Size, Update
from fedgraft.weights.arithmetic import Floats

SIZE = Size(4, 8.0)
START = tensors_of(1000)
Attack = Callable[[Floats], Floats]
ATTACKS: dict[str, Attack] = {
    "scaled": lambda tensor: tensor * np.float32(1e3),
    "a million": lambda tensor: tensor * np.float32(1e6),
    "sign-flipped": lambda tensor: -tensor,
    "both": lambda tensor: tensor * np.float32(-1e3),
}


def honest(count: int = 8, spread: float = 0.1) -> list[Update]:
    """Clients that trained from START on about the same data."""
    shared = tensors_of(2000)
    updates = []
    for n in range(count):
        own = tensors_of(n)
        tensors = {k: v + shared[k] / 2 + np.float32(spread) * own[k] for k, v in START.items()}
        updates.append(update_of(f"honest-{n}", tensors=tensors, num_examples=10 + n))
    return updates


def attacked(attack: Attack, num_hostile: int = 2) -> list[Update]:
    """Eight honest clients, and two whose changes are not what they trained."""
    hostile = [
        replace(
            update,
            client=f"hostile-{update.client}",
            tensors={k: START[k] + attack(v - START[k]) for k, v in update.tensors.items()},
        )
        for update in honest(8 + num_hostile)[8:]
    ]
    return hostile + honest()


def vector(tensors: dict[str, Floats]) -> NDArray[np.float64]:
    return np.concatenate([tensors[name].ravel().astype(np.float64) for name in sorted(tensors)])


def vectors(updates: Iterable[Update]) -> NDArray[np.float64]:
    return np.stack([vector(dict(update.tensors)) for update in updates])


def fedavg(updates: Iterable[Update]) -> NDArray[np.float64]:
    return vector(adapter(aggregate(updates, "fedavg"), SIZE))


MEANS: dict[str, Callable[[list[Update]], Iterator[Layer]]] = {
    "trimmed mean": lambda updates: trimmed_mean(updates, 2),
    "median": median,
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("rule", MEANS)
def test_the_result_stays_within_the_honest_hull(rule: str, attack: str) -> None:
    updates, good = attacked(ATTACKS[attack]), vectors(honest())
    found = vector(adapter(MEANS[rule](updates), SIZE))
    assert (good.min(axis=0) <= found).all()
    assert (found <= good.max(axis=0)).all()
    spread = np.linalg.norm(good - good.mean(axis=0), axis=1).max()
    assert np.linalg.norm(found - good.mean(axis=0)) < spread
    assert np.linalg.norm(fedavg(updates) - good.mean(axis=0)) > 2 * spread


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("num_kept", [1, 5])
def test_krum_keeps_honest_clients_alone(num_kept: int, attack: str) -> None:
    kept = krum(attacked(ATTACKS[attack]), 2, num_kept)
    assert len(kept) == num_kept
    assert all(update.client.startswith("honest") for update in kept)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("bound", [None, 12.0])
def test_clipping_bounds_what_hostile_clients_add(bound: float | None, attack: str) -> None:
    """With k of c hostile by weight h, the mean moves by at most h times what two norms span."""
    updates, good = attacked(ATTACKS[attack]), honest()
    start = vector(START)
    norms = np.linalg.norm(vectors(updates) - start, axis=1)
    limit = bound or float(np.median(norms))
    cut = clipped(updates, bound, START)
    assert (np.linalg.norm(vectors(cut) - start, axis=1) <= limit * (1 + 1e-6)).all()
    honest_cut = clipped(good, limit, START)
    share = sum(u.num_examples for u in updates[:2]) / sum(u.num_examples for u in updates)
    moved = np.linalg.norm(fedavg(cut) - fedavg(honest_cut))
    assert moved <= share * 2 * limit * (1 + 1e-6)
    if attack != "sign-flipped":  # its length is honest: clipping alone does not see it
        assert np.linalg.norm(fedavg(updates) - fedavg(good)) > 20 * limit


@settings(max_examples=50)
@given(
    stack=st.integers(3, 9).flatmap(
        lambda count: arrays(np.float32, (count, 3, 4), elements=st.floats(-1e6, 1e6, width=32))
    ),
    data=st.data(),
)
def test_whatever_the_hostile_send_each_number_is_between_honest_ones(
    stack: NDArray[np.float32], data: st.DataObject
) -> None:
    most = (len(stack) - 1) // 2
    num_hostile = data.draw(st.integers(0, most))
    hostile = data.draw(st.permutations(range(len(stack))))[:num_hostile]
    good = np.delete(stack, hostile, axis=0)
    updates = [
        update_of(f"{n}", size=Size(3, 1.0), tensors={"m.lora_A.weight": tensor})
        for n, tensor in enumerate(stack)
    ]
    for layers in (trimmed_mean(updates, num_hostile), median(updates)):
        found = adapter(layers, Size(3, 1.0))["m.lora_A.weight"]
        assert found.dtype == np.float32
        assert (good.min(axis=0) <= found).all()
        assert (found <= good.max(axis=0)).all()


def test_nothing_trimmed_is_the_plain_mean_and_all_but_one_the_median() -> None:
    updates = [replace(update, num_examples=10) for update in honest(7)]
    found = vector(adapter(trimmed_mean(updates, 0), SIZE))
    np.testing.assert_allclose(found, fedavg(updates), rtol=1e-6, atol=1e-7)
    one, other = (vector(adapter(x, SIZE)) for x in (trimmed_mean(updates, 3), median(updates)))
    assert (one == other).all()


def test_krum_scores_as_its_paper_does() -> None:
    """The sum of squared distances to the c - k - 2 nearest others, a pair at a time."""
    updates = honest(9, spread=1.0)
    points, num_hostile = vectors(updates), 2
    scores = []
    for i, point in enumerate(points):
        others = sorted(float(np.sum((point - q) ** 2)) for j, q in enumerate(points) if j != i)
        scores.append(sum(others[: 9 - num_hostile - 2]))
    for num_kept in range(1, 8):
        best = sorted(sorted(range(9), key=lambda i: scores[i])[:num_kept])
        kept = krum(updates, num_hostile, num_kept)
        assert [update.client for update in kept] == [updates[i].client for i in best]


def test_flower_trims_and_chooses_the_same_where_it_is_installed() -> None:
    flower = pytest.importorskip("flwr.serverapp.strategy")
    updates = honest(9, spread=1.0)
    trimmed = flower.fedtrimmedavg.trim_mean(vectors(updates), 2 / 9)
    found = vector(adapter(trimmed_mean(updates, 2), SIZE))
    np.testing.assert_allclose(found, trimmed, rtol=1e-6, atol=1e-7)
    app = import_module("flwr.app")
    answers = [
        app.RecordDict(
            {
                "arrays": app.ArrayRecord({k: app.Array(v) for k, v in update.tensors.items()}),
                "client": app.ConfigRecord({"name": update.client}),
            }
        )
        for update in updates
    ]
    for num_kept in (1, 4):
        kept = flower.multikrum.select_multikrum(answers, 2, num_kept)
        names = sorted(answer["client"]["name"] for answer in kept)
        assert [update.client for update in krum(updates, 2, num_kept)] == names


def test_what_is_short_enough_is_not_touched_and_lines_are_kept() -> None:
    updates = honest(5, spread=1.0)
    start = vector(START)
    norms = np.linalg.norm(vectors(updates) - start, axis=1)
    cut = clipped(updates, start=START)
    assert sum(one is other for one, other in zip(cut, updates, strict=True)) == 3
    for before, after, norm in zip(vectors(updates), vectors(cut), norms, strict=True):
        share = min(1, float(np.median(norms)) / norm)
        np.testing.assert_allclose(after - start, share * (before - start), atol=1e-5)


def test_updates_of_other_ranks_are_clipped_from_zero() -> None:
    updates = [update_of("a", 0), update_of("b", 1, size=Size(2, 4.0))]
    for update in clipped(updates, 3.0):
        assert np.linalg.norm(vector(dict(update.tensors))) == pytest.approx(3.0, rel=1e-6)
        assert len(update.tensors) == 4
    assert len(list(aggregate(clipped(updates, 3.0), "flora"))) == 2


@pytest.mark.parametrize("rule", MEANS)
def test_order_of_arrival_does_not_matter_to_the_bit(rule: str) -> None:
    updates = attacked(ATTACKS["both"])
    expected = vector(adapter(MEANS[rule](updates), SIZE))
    assert (vector(adapter(MEANS[rule](updates[::-1]), SIZE)) == expected).all()
    assert [u.client for u in krum(updates[::-1], 2, 3)] == [u.client for u in krum(updates, 2, 3)]


@pytest.mark.parametrize(("count", "num_trimmed"), [(10, 5), (4, 2), (1, 1), (3, -1)])
def test_too_many_to_trim_is_refused(count: int, num_trimmed: int) -> None:
    message = (
        f"at most {(count - 1) // 2} of {count} updates to be trimmed at each end, found "
        f"{num_trimmed}; trim fewer, or wait for at least {2 * num_trimmed + 1} clients"
    )
    with pytest.raises(FederationError, match=message):
        trimmed_mean(honest(count), num_trimmed)


def test_too_few_for_krum_are_refused() -> None:
    message = "at least 7 updates to tell 2 hostile ones by their distances, found 6; wait for more"
    with pytest.raises(FederationError, match=message):
        krum(honest(6), 2)
    with pytest.raises(FederationError, match="from 1 to 5 updates to be kept, found 6; of 7"):
        krum(honest(7), 2, 6)
    with pytest.raises(FederationError, match="from 1 to 5 updates to be kept, found 0"):
        krum(honest(7), 2, 0)


def test_a_norm_that_is_none_and_a_start_of_another_adapter_are_refused() -> None:
    for bound in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(FederationError, match=f"a norm above zero to clip to, found {bound}"):
            clipped(honest(2), bound)
    for start, found in ((tensors_of(0, rank=2), r"\[2, 16\]"), ({}, "none")):
        message = rf"client 'honest-0': expected '.*' of the adapter that .* found {found}; give"
        with pytest.raises(FederationError, match=message):
            clipped(honest(2), 1.0, start)


def test_adapters_of_several_sizes_cannot_be_compared() -> None:
    updates = [update_of("a"), update_of("b", size=Size(2, 4.0)), update_of("c")]
    message = "client 'b': expected the tensors of 'a', an adapter of rank 4 with alpha 8, found"
    for rule in (median, lambda found: trimmed_mean(found, 1), lambda found: krum(found, 0)):
        with pytest.raises(FederationError, match=message):
            rule(updates)
