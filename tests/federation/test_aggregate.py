"""Each rule keeps its promise: exact ones give the ideal update, one client is itself, and so on.

Layers are not square, and weights, ranks and alphas differ wherever the rule allows it.
"""

import random
import tracemalloc
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.federation.adapters import (
    LAYERS,
    MODULE,
    Wide,
    change_of,
    dense,
    distance,
    ideal,
    tensors_of,
    update_of,
)

from fedgraft.errors import FederationError
from fedgraft.federation import aggregate as aggregation
from fedgraft.federation.aggregate import Layer, Rule, adapter, aggregate, mean_b
from fedgraft.federation.update import Factor, Size, Update, named
from fedgraft.weights.arithmetic import Floats

RULES: tuple[Rule, ...] = get_args(Rule)
SIZE = Size(4, 8.0)
A, B = named(MODULE, "A"), named(MODULE, "B")


def frozen(update: Update) -> Update:
    """The update with the A that all clients of FFA-LoRA have."""
    shared = {k: v for k, v in tensors_of(99, update.rank).items() if ".lora_A." in k}
    return replace(update, tensors={**update.tensors, **shared})


def clients(
    rule: Rule, count: int = 3, ranks: tuple[int, ...] = (4,), alphas: tuple[float, ...] = (8.0,)
) -> list[Update]:
    """Clients that a rule takes, with unequal weights, and the ranks and alphas in turn."""
    updates = [
        update_of(
            f"client-{n}",
            n,
            num_examples=3 + 17 * n,
            size=Size(ranks[n % len(ranks)], alphas[n % len(alphas)]),
        )
        for n in range(count)
    ]
    return [frozen(update) for update in updates] if rule == "ffa" else updates


def change_by(layer: Layer, size: Size) -> Wide:
    """What a layer of a client of that size gains by a rule, in its adapter and in the base."""
    tensors = layer.adapters.get(size)
    total = np.zeros(LAYERS[layer.module])
    if tensors:
        total = total + change_of(tensors, layer.module, size.scale)
    if layer.change:
        total = total + dense(layer.change)
    return total


def bits(layers: Iterator[Layer]) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for layer in layers:
        for size, tensors in layer.adapters.items():
            found += [(size, name, tensor.tobytes()) for name, tensor in tensors.items()]
        if layer.change:
            found += [(layer.change.left.tobytes(), layer.change.right.tobytes())]
    return found


EXACT: list[tuple[Rule, tuple[int, ...], tuple[float, ...]]] = [
    ("ffa", (4,), (8.0, 16.0, 5.0)),
    ("flora", (4, 2, 7), (8.0, 16.0, 5.0)),
    ("flora", (3, 1), (8.0,)),
    ("fedex", (4,), (8.0, 16.0, 5.0)),
]


@pytest.mark.parametrize(("rule", "ranks", "alphas"), EXACT)
@settings(max_examples=25)
@given(count=st.integers(1, 9))
def test_exact_rules_give_the_ideal_update(
    rule: Rule, ranks: tuple[int, ...], alphas: tuple[float, ...], count: int
) -> None:
    updates = clients(rule, count, ranks, alphas)
    size = Size(ranks[0], 12.0)  # of the result: of another alpha than any client's
    for layer in aggregate(updates, rule, None if rule == "flora" else [size]):
        assert distance(change_by(layer, size), ideal(updates, layer.module)) < 1e-6


@given(seed=st.integers(0, 10**6))
def test_exact_rules_are_exact_for_any_weights(seed: int) -> None:
    generator = random.Random(seed)
    for rule, ranks, alphas in EXACT:
        updates = [
            replace(update, num_examples=generator.choice([1, 7, 1000, 10**6]))
            for update in clients(rule, 3, ranks, alphas)
        ]
        for layer in aggregate(updates, rule, None if rule == "flora" else [SIZE]):
            assert distance(change_by(layer, SIZE), ideal(updates, layer.module)) < 1e-6


# Faults of public code, planted: the law above has to see each of them.


def transposed(updates: list[Update]) -> Wide:
    """The residual of FedEx-LoRA, added the other way round: fits where layers are square."""
    layer = next(aggregate(updates, "fedex", [SIZE]))
    return change_of(layer.adapters[SIZE], MODULE, SIZE.scale) + dense(layer.change).T


def weighted_on_both_sides(updates: list[Update]) -> Wide:
    total = sum(update.num_examples for update in updates)
    return np.asarray(
        sum(
            (update.num_examples / total) ** 2
            * change_of(update.tensors, MODULE, update.size.scale)
            for update in updates
        )
    )


def of_the_first_client_alone(updates: list[Update]) -> Wide:
    total = sum(update.num_examples for update in updates)
    tensors = updates[0].tensors
    return updates[0].num_examples / total * change_of(tensors, MODULE, SIZE.scale)


def without_alpha(updates: list[Update]) -> Wide:
    same = [update_of(u.client, num_examples=u.num_examples, tensors=u.tensors) for u in updates]
    return ideal(same)


def test_the_law_sees_a_transposed_residual_even_where_shapes_fit() -> None:
    square = {MODULE: (16, 16)}
    updates = [update_of(f"client-{n}", n, layers=square) for n in range(3)]
    assert distance(transposed(updates), ideal(updates)) > 0.5
    (layer,) = aggregate(updates, "fedex", [SIZE])
    right = change_of(layer.adapters[SIZE], MODULE, SIZE.scale) + dense(layer.change)
    assert distance(right, ideal(updates)) < 1e-6


def test_the_law_sees_weights_on_both_sides_dropped_clients_and_a_forgotten_alpha() -> None:
    updates = clients("flora", 5, alphas=(8.0, 16.0))
    for fault in (weighted_on_both_sides, of_the_first_client_alone, without_alpha):
        assert distance(fault(updates), ideal(updates)) > 0.1, fault.__name__


def test_errors_on_random_factors_are_those_of_theory_and_reference() -> None:
    """Five clients, rank 4, 24 x 16. The reference saw, on one draw: FedAvg 0.75, FlexLoRA 0.37,
    weights on both sides 0.60. With S_k the sum of p^k, expected squares are in closed form.
    """
    counts = (45, 25, 15, 10, 5)
    s2, s3, s4 = (sum((n / 100) ** k for n in counts) for k in (2, 3, 4))
    errors = defaultdict[str, list[float]](list)
    for trial in range(20):
        updates = [
            update_of(f"client-{n}", 100 * trial + n, num_examples=count, layers={MODULE: (24, 16)})
            for n, count in enumerate(counts)
        ]
        expected = ideal(updates)
        for rule in ("fedavg", "flexlora", "flora", "fedex"):
            (layer,) = aggregate(updates, rule)
            errors[rule].append(distance(change_by(layer, SIZE), expected))
        errors["both sides"].append(distance(weighted_on_both_sides(updates), expected))
    mean = {rule: float(np.sqrt(np.mean(np.square(found)))) for rule, found in errors.items()}
    assert mean["fedavg"] == pytest.approx(np.sqrt(1 + s2 - 2 * s3 / s2), rel=0.05)
    assert mean["both sides"] == pytest.approx(np.sqrt(1 - 2 * s3 / s2 + s4 / s2), rel=0.05)
    assert mean["fedavg"] == pytest.approx(0.75, abs=0.05)
    assert mean["both sides"] == pytest.approx(0.60, abs=0.05)
    assert mean["flexlora"] == pytest.approx(0.40, abs=0.05)
    assert max(errors["flora"] + errors["fedex"]) < 1e-6


def cancelling(rule: Rule) -> list[Update]:
    """Clients of which two nearly cancel: what is left depends on when they meet in a sum."""
    updates = [replace(update, num_examples=10) for update in clients(rule, 5)]
    factor = ".lora_B." if rule == "ffa" else ".lora_"
    large = {
        k: np.float32(2**60) * np.sign(v) if factor in k else v
        for k, v in updates[0].tensors.items()
    }
    opposed = {k: -v if factor in k else v for k, v in large.items()}
    return [replace(updates[0], tensors=large), *updates[1:4], replace(updates[4], tensors=opposed)]


@pytest.mark.parametrize("rule", RULES)
def test_order_of_clients_does_not_matter_to_the_bit(rule: Rule) -> None:
    for updates in (clients(rule, 3), clients(rule, 7), cancelling(rule)):
        expected = bits(aggregate(updates, rule))
        assert expected
        for seed in range(5):
            arrived = random.Random(seed).sample(updates, len(updates))
            assert bits(aggregate(arrived, rule)) == expected


@given(count=st.integers(1, 8), seed=st.integers(0, 99), weights=st.data())
def test_equal_updates_average_to_themselves_to_the_bit(
    count: int, seed: int, weights: st.DataObject
) -> None:
    tensors = tensors_of(seed)
    updates = [
        update_of(f"client-{n}", num_examples=weights.draw(st.integers(1, 10**6)), tensors=tensors)
        for n in range(count)
    ]
    means: tuple[Rule, ...] = ("fedavg", "ffa", "fedsa", "fedex")
    for rule in means:
        for name, tensor in adapter(aggregate(updates, rule), SIZE).items():
            assert tensor.tobytes() == tensors[name].tobytes()
    sums: tuple[Rule, ...] = ("flora", "flexlora", "fedex")
    for rule in sums:
        for layer in aggregate(updates, rule):
            assert distance(change_by(layer, SIZE), ideal(updates, layer.module)) < 1e-6


@pytest.mark.parametrize("rule", ["fedavg", "ffa", "fedsa", "fedex"])
def test_one_client_is_itself_to_the_bit(rule: Rule) -> None:
    (update,) = updates = clients(rule, 1)
    layers = list(aggregate(updates, rule))
    for name, tensor in adapter(layers, SIZE).items():
        assert tensor.dtype == np.float32
        assert tensor.tobytes() == update.tensors[name].tobytes()
    assert all(layer.change is None or layer.change.left.shape[1] == 0 for layer in layers)


def test_one_client_is_itself_for_rules_that_give_changes() -> None:
    for rule in ("flora", "flexlora"):
        updates = clients(rule, 1)
        for layer in aggregate(updates, rule):
            assert distance(change_by(layer, SIZE), ideal(updates, layer.module)) < 1e-6


def test_fedavg_brings_b_to_the_alpha_of_the_result() -> None:
    tensors = tensors_of(0)
    one = update_of("a", tensors=tensors, size=Size(4, 8.0))
    other = update_of("b", tensors=tensors, size=Size(4, 32.0))
    layer = next(iter(aggregate([one, other], "fedavg", [Size(4, 16.0)])))
    assert distance(change_by(layer, Size(4, 16.0)), ideal([one, other], layer.module)) < 1e-6


def test_fedsa_shares_a_and_leaves_b_with_its_client() -> None:
    updates = clients("fedsa", 3, alphas=(8.0, 16.0))
    for layer in aggregate(updates, "fedsa"):
        assert set(layer.adapters) == {Size(4, 8.0), Size(4, 16.0)}
        for tensors in layer.adapters.values():
            assert list(tensors) == [named(layer.module, "A")]
    expected = np.average([u.tensors[A] for u in updates], 0, [u.num_examples for u in updates])
    np.testing.assert_allclose(adapter(aggregate(updates, "fedsa"), SIZE)[A], expected, 1e-5, 1e-6)


def test_a_new_client_starts_from_its_departments_mean_b() -> None:
    updates = clients("fedsa", 3)
    found = dict(mean_b(updates))
    assert list(found) == [named(module, "B") for module in sorted(LAYERS)]
    expected = adapter(aggregate(updates, "fedavg"), SIZE)
    assert all(found[name].tobytes() == expected[name].tobytes() for name in found)
    with pytest.raises(FederationError, match="one size, found rank 4 with alpha 8 and rank 4 wit"):
        list(mean_b(clients("fedsa", 3, alphas=(8.0, 16.0))))


HALVES: list[tuple[Rule, Factor]] = [("ffa", "B"), ("fedsa", "A")]


@pytest.mark.parametrize(("rule", "factor"), HALVES)
def test_half_of_the_factors_are_enough_where_the_rule_takes_half(
    rule: Rule, factor: Factor
) -> None:
    names = [named(module, factor) for module in sorted(LAYERS)]
    whole = clients(rule)
    halves = [replace(u, tensors={name: u.tensors[name] for name in names}) for u in whole]
    found, expected = (adapter(aggregate(updates, rule), SIZE) for updates in (halves, whole))
    assert list(found) == names
    assert all(found[name].tobytes() == expected[name].tobytes() for name in names)
    with pytest.raises(FederationError, match=r"expected '.*', found none; fedavg needs it from"):
        aggregate(halves, "fedavg")


@settings(max_examples=40)
@given(
    count=st.integers(1, 12),
    ranks=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    rank=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_flexlora_is_the_truncated_svd_of_the_dense_ideal(
    count: int, ranks: list[int], rank: int, seed: int
) -> None:
    """On stacks below and above the layers' shorter side, for ranks of the result of any kind."""
    updates = [
        update_of(f"{n:02}", seed + n, num_examples=1 + n, size=Size(ranks[n % len(ranks)], 5.0))
        for n in range(count)
    ]
    size = Size(rank, 3.0)
    for layer in aggregate(updates, "flexlora", [size]):
        whole = ideal(updates, layer.module)
        u, values, v = np.linalg.svd(whole, full_matrices=False)
        best = (u[:, :rank] * values[:rank]) @ v[:rank]
        tensors = layer.adapters[size]
        assert tensors[named(layer.module, "A")].shape == (rank, whole.shape[1])
        assert tensors[named(layer.module, "B")].shape == (whole.shape[0], rank)
        found = change_of(tensors, layer.module, size.scale)
        error = np.linalg.norm(found - whole) ** 2
        least = float(np.square(values[rank:]).sum())
        assert error <= least + 1e-9 * np.linalg.norm(whole) ** 2
        if len(values) == rank or values[rank] < 0.99 * values[rank - 1]:  # the best is unique
            assert distance(found, best) < 1e-5


def test_flexlora_gives_each_client_its_rank_and_alpha() -> None:
    updates = clients("flexlora", 3, (2, 4, 6), (8.0, 16.0))
    for layer in aggregate(updates, "flexlora"):
        assert set(layer.adapters) == {update.size for update in updates}
        errors = [
            distance(change_by(layer, size), ideal(updates, layer.module))
            for size in sorted(layer.adapters)
        ]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("seed", range(6))
def test_flexlora_gives_one_answer_where_the_decomposition_has_two(seed: int) -> None:
    """Of each pair of vectors the signs are free: the largest number of A is positive."""
    updates = [update_of(f"client-{n}", 10 * seed + n) for n in range(3)]
    resigned = [  # the same changes, written otherwise
        replace(u, tensors={k: v * (-2 if ".lora_A." in k else -0.5) for k, v in u.tensors.items()})
        for u in updates
    ]
    one, other = (adapter(aggregate(found, "flexlora"), SIZE) for found in (updates, resigned))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-5)
    for row in one[A]:
        assert row[np.abs(row).argmax()] > 0


def test_flexlora_leaves_no_direction_that_cannot_learn() -> None:
    """Where both factors were zero, so would be both gradients."""
    zeros = {k: v if ".lora_A." in k else np.zeros_like(v) for k, v in tensors_of(0).items()}
    for updates in ([update_of("a", tensors=zeros)], [update_of("a", size=Size(1, 2.0))]):
        for layer in aggregate(updates, "flexlora", [SIZE]):
            a = layer.adapters[SIZE][named(layer.module, "A")]
            assert np.linalg.norm(a, axis=1).min() > 0.1
            whole = ideal(updates, layer.module)
            assert np.linalg.norm(change_by(layer, SIZE) - whole) <= 1e-6 * np.linalg.norm(whole)


def test_factors_of_a_change_never_outgrow_the_layer() -> None:
    for rule in ("flora", "fedex"):
        updates = clients(rule, 20)
        for layer in aggregate(updates, rule):
            assert layer.change
            assert layer.change.left.shape[1] == min(LAYERS[layer.module])
            assert distance(change_by(layer, SIZE), ideal(updates, layer.module)) < 1e-6


def test_fedex_misses_one_clients_rank_less_than_its_paper() -> None:
    for layer in aggregate(clients("fedex", 2, ranks=(2,)), "fedex"):
        assert layer.change
        assert layer.change.left.shape[1] == 2


class Drawn(Mapping[str, Floats]):
    """Tensors that are made when they are asked for, and counted."""

    def __init__(self, seed: int, shapes: Mapping[str, tuple[int, int]]) -> None:
        self.seed, self.shapes, self.num_reads = seed, shapes, 0

    def __getitem__(self, name: str) -> Floats:
        self.num_reads += 1
        generator = np.random.default_rng([self.seed, *name.encode()])
        return generator.standard_normal(self.shapes[name], np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def drawn(count: int, layers: int, side: int = 400) -> list[Update]:
    shapes: dict[str, tuple[int, int]] = {}
    for n in range(layers):
        shapes |= {named(f"m.{n}", "A"): (4, side), named(f"m.{n}", "B"): (side, 4)}
    return [update_of(f"{n:03}", tensors=Drawn(n, shapes)) for n in range(count)]


def peak_bytes(updates: list[Update], rule: Rule) -> int:
    tracemalloc.start()
    for _ in aggregate(updates, rule):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "ffa"])
def test_memory_is_that_of_one_layer(rule: Rule) -> None:
    peak_bytes(drawn(2, 1), rule)  # what is loaded once
    assert peak_bytes(drawn(4, 6), rule) < 1.2 * peak_bytes(drawn(4, 1), rule) + 20_000


@pytest.mark.parametrize("rule", ["fedavg", "fedsa"])
def test_memory_of_means_does_not_grow_with_clients(rule: Rule) -> None:
    peak_bytes(drawn(2, 1), rule)
    assert peak_bytes(drawn(40, 1), rule) < 1.1 * peak_bytes(drawn(4, 1), rule) + 20_000


@pytest.mark.parametrize("rule", ["flora", "flexlora", "fedex"])
def test_memory_of_changes_is_bounded_by_the_layer(rule: Rule) -> None:
    peak_bytes(drawn(2, 1), rule)
    assert peak_bytes(drawn(60, 1, 64), rule) < 1.3 * peak_bytes(drawn(30, 1, 64), rule)


def test_flexlora_forms_no_dense_matrix() -> None:
    side = 1500
    assert peak_bytes(drawn(3, 1, side), "flexlora") < side * side * 8 / 4


def test_flexlora_multiplies_nothing_out_while_factors_fit_the_longer_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As for keys and values: 128 x 896 numbers, 100 clients of rank 8."""
    shapes = {named("m", "A"): (4, 50), named("m", "B"): (6, 4)}
    updates = [update_of(f"{n:02}", tensors=Drawn(n, shapes)) for n in range(13)]
    multiplied = []
    added = aggregation._added

    def counted(*terms: Any) -> Any:
        multiplied.append(1)
        return added(*terms)

    monkeypatch.setattr(aggregation, "_added", counted)
    kept = list(aggregate(updates[:12], "flexlora"))
    assert not multiplied
    list(aggregate(updates, "flexlora"))
    assert multiplied
    monkeypatch.setattr(aggregation, "max", min, raising=False)
    for layer, other in zip(kept, aggregate(updates[:12], "flexlora"), strict=True):
        (found,), (wanted,) = layer.adapters.values(), other.adapters.values()
        np.testing.assert_allclose(
            found[named("m", "B")] @ found[named("m", "A")],
            wanted[named("m", "B")] @ wanted[named("m", "A")],
            rtol=1e-5,
            atol=1e-6,
        )


def test_means_read_each_tensor_once() -> None:
    updates = drawn(3, 2)
    list(aggregate(updates, "fedavg"))
    reads = [update.tensors.num_reads for update in updates if isinstance(update.tensors, Drawn)]
    assert reads == [4, 4, 4]


@pytest.mark.parametrize("rule", ["fedavg", "ffa", "fedsa", "fedex"])
def test_ranks_that_differ_are_refused_where_a_rule_needs_one(rule: Rule) -> None:
    message = f"adapters of one rank for {rule}, found 2, 4; give clients one rank, or use flora or"
    with pytest.raises(FederationError, match=message):
        aggregate(clients(rule, 2, ranks=(4, 2)), rule)


@pytest.mark.parametrize("rule", ["fedavg", "ffa", "fedex"])
def test_alphas_that_differ_need_a_size_of_the_result(rule: Rule) -> None:
    updates = clients(rule, 2, alphas=(8.0, 16.0))
    message = (
        f"expected one size of rank 4 for the result of {rule}, found rank 4 with alpha 8 and rank "
        "4 with alpha 16; name one, such as rank 4 with alpha 8"
    )
    with pytest.raises(FederationError, match=message):
        aggregate(updates, rule)
    for sizes, found in (([Size(2, 8.0)], "rank 2 with alpha 8"), ([], "none")):
        with pytest.raises(FederationError, match=f"of rank 4 .*, found {found}; name one"):
            aggregate(updates, rule, sizes)


def test_sizes_that_a_rule_cannot_give_are_refused() -> None:
    message = "at least one size for the result of flexlora, found none; name one, such as rank 4"
    with pytest.raises(FederationError, match=message):
        aggregate(clients("flexlora"), "flexlora", [])
    for sizes, found in (([Size(4, 8.0), Size(2, 8.0)], "rank 2 with alpha 8 and"), ([], "none")):
        message = f"sizes of rank 4 for the result of fedsa, found {found}"
        with pytest.raises(FederationError, match=message):
            aggregate(clients("fedsa"), "fedsa", sizes)


def test_an_a_that_is_not_frozen_is_refused() -> None:
    updates = clients("ffa")
    moved = dict(updates[1].tensors)
    moved[A] = moved[A].copy()
    moved[A][0, 0] = np.nextafter(moved[A][0, 0], np.float32(9))
    updates[1] = update_of("client-1", tensors=moved)
    message = (
        r"client 'client-1': expected '.*q_proj.lora_A.weight' to be that of 'client-0', found"
    )
    with pytest.raises(FederationError, match=message):
        list(aggregate(updates, "ffa"))


def test_a_rank_above_the_layer_is_refused() -> None:
    message = r"a rank of at most 7, the shorter side of 'layers.0.down_proj', found 8; choose a sm"
    with pytest.raises(FederationError, match=message):
        list(aggregate(clients("flexlora"), "flexlora", [Size(8, 8.0)]))


def test_clients_with_other_tensors_are_refused() -> None:
    other = update_of("b", layers={MODULE: LAYERS[MODULE]})
    message = "client 'b': expected the tensors of 'a', found 'layers.0.down_proj.lora_A.weight' in"
    with pytest.raises(FederationError, match=message):
        aggregate([update_of("a"), other], "fedavg")


@pytest.mark.parametrize("rule", RULES)
def test_no_client_is_refused_before_the_first_layer(rule: Rule) -> None:
    with pytest.raises(FederationError, match="at least one update"):
        aggregate([], rule)


def test_inputs_are_left_as_they_are() -> None:
    for rule in RULES:
        updates = clients(rule)
        before = [{k: v.copy() for k, v in update.tensors.items()} for update in updates]
        list(aggregate(updates, rule))
        for update, held in zip(updates, before, strict=True):
            assert all(update.tensors[k].tobytes() == v.tobytes() for k, v in held.items())


def test_a_sum_of_products_is_the_same_stacked_and_multiplied_out() -> None:
    generator = np.random.default_rng(0)
    for num_out, num_in in ((5, 9), (9, 5)):
        terms: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = [
            (generator.normal(size=(num_out, 2)), generator.normal(size=(2, num_in)))
            for _ in range(6)
        ]
        for count in range(1, 7):
            left, right = aggregation._summed(terms[:count])
            assert left.shape[1] == len(right) == min(2 * count, 5)
            expected = sum(a @ b for a, b in terms[:count])
            np.testing.assert_allclose(left @ right, expected, atol=1e-12)
