"""Departments keep what is theirs, take what is common, and are told apart by what they do."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from tests.federation.adapters import LAYERS, change_of, tensors_of, update_of
from tests.federation.clients import TRAINING, Spoiled, clients, plan, silent

from fedgraft.errors import FederationError
from fedgraft.federation.aggregate import adapter, aggregate
from fedgraft.federation.hierarchy import Mixing, clustered, mix, mixed, similarities
from fedgraft.federation.history import History
from fedgraft.federation.in_process import InProcess
from fedgraft.federation.rounds import run_rounds
from fedgraft.federation.standing import Stored
from fedgraft.federation.update import Size, Tensors, named
from fedgraft.testing import save_tiny
from fedgraft.weights.arithmetic import Floats

Wide = NDArray[np.float64]
DEPARTMENTS = ("engineering", "finance", "hr", "it")
WEIGHTS = {"engineering": 10.0, "finance": 25.0, "hr": 5.0, "it": 60.0}
WHOLE = (DEPARTMENTS,)


def departments(spread: float = 1.0) -> dict[str, dict[str, Floats]]:
    """Adapters of one start, each moved its own way."""
    start = tensors_of(1000)
    return {
        name: {k: v + np.float32(spread) * tensors_of(n)[k] for k, v in start.items()}
        for n, name in enumerate(DEPARTMENTS)
    }


def same(one: Tensors, other: Tensors) -> bool:
    """To the bit."""
    return one.keys() == other.keys() and all(
        one[name].tobytes() == other[name].tobytes() for name in one
    )


def dense(tensors: Tensors) -> Wide:
    """The changes of all layers as one vector."""
    return np.concatenate([change_of(tensors, module, 2.0).ravel() for module in sorted(LAYERS)])


def cosine(one: Wide, other: Wide) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_a_cosine_is_that_of_the_dense_changes() -> None:
    adapters = departments(0.5)
    found = similarities(adapters)
    for i, one in enumerate(DEPARTMENTS):
        for j, other in enumerate(DEPARTMENTS):
            expected = cosine(dense(adapters[one]), dense(adapters[other]))
            assert found[i, j] == pytest.approx(expected, abs=1e-9)


def test_ranks_may_differ_and_an_adapter_is_like_itself_at_another_rank() -> None:
    narrow = tensors_of(0, rank=2)
    wide = {
        name: np.concatenate([tensor, tensor], axis=0 if ".lora_A." in name else 1)
        for name, tensor in narrow.items()
    }
    found = similarities({"narrow": narrow, "wide": wide, "other": tensors_of(1, rank=3)})
    assert found[0, 2] == pytest.approx(1.0)  # narrow, other, wide
    assert abs(found[0, 1]) < 0.5


def test_turned_factors_make_the_same_change_and_are_told_to_be_alike() -> None:
    one = tensors_of(0)
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(4, 4)))[0]
    other = {}
    for module in LAYERS:
        a, b = named(module, "A"), named(module, "B")
        other[a] = (turn @ one[a]).astype(np.float32)
        other[b] = (one[b] @ turn.T).astype(np.float32)
    assert similarities({"one": one, "other": other})[0, 1] == pytest.approx(1.0, abs=1e-6)
    flipped = {k: -v if ".lora_B." in k else v for k, v in one.items()}
    assert similarities({"one": one, "other": flipped})[0, 1] == pytest.approx(-1.0)


def test_departments_that_share_their_first_a_alone_are_not_alike() -> None:
    first = tensors_of(7)
    adapters = {
        str(n): {k: v if ".lora_A." in k else tensors_of(n)[k] for k, v in first.items()}
        for n in range(3)
    }
    found = similarities(adapters)
    assert np.abs(found - np.eye(3)).max() < 0.5


def test_a_fresh_adapter_is_like_none_but_itself() -> None:
    fresh = {k: np.zeros_like(v) if ".lora_B." in k else v for k, v in tensors_of(0).items()}
    found = similarities({"fresh": fresh, "other": tensors_of(0)})
    assert (found == np.eye(2)).all()


@st.composite
def cosine_matrices(draw: st.DrawFn) -> Wide:
    """Of random vectors: all cosines differ."""
    count, seed = draw(st.integers(1, 9)), draw(st.integers(0, 2**32 - 1))
    vectors = np.random.default_rng(seed).normal(size=(count, 4))
    vectors /= np.linalg.norm(vectors, axis=1)[:, None]
    found: Wide = vectors @ vectors.T
    return found


@settings(max_examples=60, deadline=None)
@given(cosines=cosine_matrices(), data=st.data())
def test_clusters_are_those_of_scipy_where_it_is_installed(
    cosines: Wide, data: st.DataObject
) -> None:
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    distance = pytest.importorskip("scipy.spatial.distance")
    names = [f"d{n}" for n in range(len(cosines))]
    if len(names) == 1:
        assert clustered(names, cosines, threshold=0.5) == (("d0",),)
        return
    condensed = distance.squareform(1 - cosines, checks=False)
    tree = hierarchy.linkage(condensed, "average")
    num_clusters = data.draw(st.integers(1, len(names)))
    threshold = data.draw(st.floats(-1, 1))
    by_number = hierarchy.fcluster(tree, num_clusters, "maxclust")
    assert clustered(names, cosines, num_clusters=num_clusters) == _groups(names, by_number)
    by_distance = hierarchy.fcluster(tree, 1 - threshold, "distance")
    assert clustered(names, cosines, threshold=threshold) == _groups(names, by_distance)


def _groups(names: list[str], labels: NDArray[np.int32]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        sorted(
            tuple(name for name, label in zip(names, labels, strict=True) if label == one)
            for one in set(labels)
        )
    )


@given(cosines=cosine_matrices(), data=st.data())
def test_clusters_do_not_depend_on_the_order_of_departments(
    cosines: Wide, data: st.DataObject
) -> None:
    names = [f"d{n}" for n in range(len(cosines))]
    order = data.draw(st.permutations(range(len(names))))
    expected = clustered(names, cosines, threshold=0.2)
    turned = clustered([names[n] for n in order], cosines[np.ix_(order, order)], threshold=0.2)
    assert turned == expected
    assert sorted(name for cluster in expected for name in cluster) == names


def test_of_equal_pairs_the_first_by_name_is_joined() -> None:
    for names in (["a", "b", "c", "d"], ["d", "b", "a", "c"]):
        found = clustered(names, np.full((4, 4), 0.5), num_clusters=3)
        assert found == (("a", "b"), ("c",), ("d",))


def test_two_families_of_departments_are_found() -> None:
    one, other = tensors_of(1), tensors_of(2)
    adapters = {
        name: {k: v + np.float32(0.2) * tensors_of(n + 10)[k] for k, v in family.items()}
        for n, (name, family) in enumerate({"a": one, "b": other, "c": one, "d": other}.items())
    }
    for mixing in (Mixing(share=0.5, threshold=0.5), Mixing(share=0.5, num_clusters=2)):
        found, clusters = mix(adapters, dict.fromkeys("abcd", 1.0), mixing)
        assert clusters == (("a", "c"), ("b", "d"))
        assert same(found["a"], mixed(adapters, dict.fromkeys("abcd", 1), 0.5, clusters)["a"])
        assert cosine(dense(found["a"]), dense(found["b"])) < 0.5
    assert clustered(sorted("abcd"), similarities(adapters), threshold=0.9999) == (
        ("a",),
        ("b",),
        ("c",),
        ("d",),
    )


def test_a_share_of_zero_changes_nothing_to_the_bit() -> None:
    adapters = departments()
    adapters["hr"]["layers.0.q_proj.lora_A.weight"][0, 0] = -0.0
    found = mixed(adapters, WEIGHTS, 0.0, WHOLE)
    assert all(same(found[name], adapters[name]) for name in DEPARTMENTS)


def test_a_department_alone_stays_as_it_is() -> None:
    adapters = departments()
    found = mixed(adapters, WEIGHTS, 0.7, (("engineering", "hr"), ("finance",), ("it",)))
    assert all(same(found[name], adapters[name]) for name in ("finance", "it"))
    assert not any(same(found[name], adapters[name]) for name in ("engineering", "hr"))


def test_a_share_of_one_gives_all_of_a_cluster_its_weighted_mean() -> None:
    adapters = departments()
    found = mixed(adapters, WEIGHTS, 1.0, WHOLE)
    assert all(same(found[name], found["hr"]) for name in DEPARTMENTS)
    updates = [
        update_of(name, num_examples=int(WEIGHTS[name]), tensors=adapters[name])
        for name in DEPARTMENTS
    ]
    expected = adapter(aggregate(updates, "fedavg"), Size(4, 8.0))
    for name, tensor in expected.items():
        np.testing.assert_allclose(found["hr"][name], tensor, rtol=1e-6, atol=1e-7)


def test_all_departments_mixed_in_whole_are_one_group_of_all_clients() -> None:
    """A federation that shares by department, mixed with a share of 1, = one that shares all."""
    clients = {f"{d}-{n}": tensors_of(10 * i + n) for i, d in enumerate("ab") for n in range(3)}
    counts = {name: 3 + 2 * n for n, name in enumerate(clients)}
    updates = [
        update_of(name, num_examples=counts[name], tensors=tensors)
        for name, tensors in clients.items()
    ]
    size = Size(4, 8.0)
    whole = adapter(aggregate(updates, "fedavg"), size)
    apart = {
        d: adapter(aggregate([u for u in updates if u.client[0] == d], "fedavg"), size)
        for d in "ab"
    }
    weights = {d: float(sum(v for k, v in counts.items() if k[0] == d)) for d in "ab"}
    found, clusters = mix(apart, weights, Mixing(share=1.0, num_clusters=1))
    assert clusters == (("a", "b"),)
    for name, tensor in whole.items():
        np.testing.assert_allclose(found["a"][name], tensor, rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0, 1), weights=st.lists(st.floats(0.1, 1e6), min_size=4, max_size=4))
def test_equal_adapters_stay_whatever_the_share_and_weights(
    share: float, weights: list[float]
) -> None:
    adapters = {name: tensors_of(3) for name in DEPARTMENTS}
    found = mixed(adapters, dict(zip(DEPARTMENTS, weights, strict=True)), share, WHOLE)
    assert all(same(found[name], adapters[name]) for name in DEPARTMENTS)


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.01, 0.99))
def test_a_share_moves_each_department_that_part_of_its_way_and_keeps_the_mean(
    share: float,
) -> None:
    adapters = departments()
    found, mean = (mixed(adapters, WEIGHTS, part, WHOLE) for part in (share, 1.0))
    for name in DEPARTMENTS:
        for key, own in adapters[name].items():
            expected = own + share * (mean[name][key] - own)
            np.testing.assert_allclose(found[name][key], expected, atol=1e-5)
    again = mixed(found, WEIGHTS, 1.0, WHOLE)
    for key, tensor in again["hr"].items():
        np.testing.assert_allclose(tensor, mean["hr"][key], atol=1e-5)


def test_with_one_frozen_a_mixing_factors_is_mixing_changes() -> None:
    first = tensors_of(7)
    adapters = {
        name: {k: first[k] if ".lora_A." in k else v for k, v in tensors.items()}
        for name, tensors in departments().items()
    }
    found = mixed(adapters, WEIGHTS, 0.4, WHOLE)
    total = sum(WEIGHTS.values())
    mean = sum(WEIGHTS[name] / total * dense(adapters[name]) for name in DEPARTMENTS)
    for name in DEPARTMENTS:
        expected = 0.6 * dense(adapters[name]) + 0.4 * mean
        np.testing.assert_allclose(dense(found[name]), expected, atol=1e-4)
        assert all(same({k: found[name][k]}, {k: first[k]}) for k in first if ".lora_A." in k)


def test_mixing_leaves_its_arguments_as_they_are() -> None:
    adapters, untouched = departments(), departments()
    mix(adapters, WEIGHTS, Mixing(share=0.5, num_clusters=1))
    assert all(same(adapters[name], untouched[name]) for name in DEPARTMENTS)


@pytest.mark.parametrize("given", [{}, {"threshold": 0.5, "num_clusters": 2}])
def test_a_threshold_or_a_number_of_clusters_is_given_and_not_both(
    given: Mapping[str, float],
) -> None:
    found = "both" if given else "neither"
    message = f"expected either threshold or num_clusters, found {found}; give num_clusters: 1"
    with pytest.raises(ValidationError, match=message):
        Mixing.model_validate({"share": 0.5, **given})


@pytest.mark.parametrize("change", [{"share": 0}, {"share": 1.1}, {"num_clusters": 0}])
def test_settings_that_mix_nothing_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Mixing.model_validate({"share": 0.5, "num_clusters": 1} | change)


def test_more_clusters_than_departments_are_refused() -> None:
    message = "at most 2 clusters of a, b, found 3; ask for fewer, or leave mixing out"
    with pytest.raises(FederationError, match=message):
        clustered(["a", "b"], np.eye(2), num_clusters=3)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(FederationError, match=r"a share from 0 \(its own\) to 1 .*, found"):
        mixed(departments(), WEIGHTS, share, WHOLE)


@pytest.mark.parametrize("clusters", [(), (("hr",),), (DEPARTMENTS, ("hr",))])
def test_clusters_of_other_departments_are_refused(clusters: tuple[tuple[str, ...], ...]) -> None:
    message = "expected clusters of engineering, finance, hr, it, each once, found"
    with pytest.raises(FederationError, match=message):
        mixed(departments(), WEIGHTS, 0.5, clusters)


@pytest.mark.parametrize("weight", [None, 0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight: float | None) -> None:
    weights = {k: v for k, v in {**WEIGHTS, "hr": weight}.items() if v is not None}
    shown = "none" if weight is None else str(weight)
    message = f"a weight above zero for the department 'hr', found {shown}; give the examples"
    with pytest.raises(FederationError, match=message):
        mixed(departments(), weights, 0.5, WHOLE)


def test_adapters_of_other_layers_or_ranks_are_refused() -> None:
    one = tensors_of(0)
    fewer = {k: v for k, v in one.items() if "q_proj" in k}
    message = "department 'b': expected the tensors of 'a', found '.*' in one of them alone; give"
    both = ({"a": one, "b": fewer}, {"a": fewer, "b": one})
    for adapters in both:
        with pytest.raises(FederationError, match=message):
            similarities(adapters)
        with pytest.raises(FederationError, match=message):
            mixed(adapters, {"a": 1, "b": 1}, 0.5, (("a", "b"),))
    other = tensors_of(0, layers={**LAYERS, "layers.0.q_proj": (24, 17)})
    message = r"'b': expected '.*A.weight' of shape \[4, 16\] as in 'a', found \[4, 17\]; give dep"
    with pytest.raises(FederationError, match=message):
        similarities({"a": one, "b": other})
    message = (
        r"'b': expected '.*' of shape .* as in 'a', found .*; give departments adapters of one"
    )
    with pytest.raises(FederationError, match=message):
        mixed({"a": one, "b": tensors_of(0, rank=2)}, {"a": 1, "b": 1}, 0.5, (("a", "b"),))
    with pytest.raises(FederationError, match="the adapter of at least one department, found none"):
        similarities({})


# ── in rounds ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "graft", num_layers=1)


Made = tuple[dict[str, dict[str, Floats]], History]
QUICK = TRAINING | {"num_tokens": 128, "batch_tokens": 128, "warmup": 0}


def run(model: Path, folder: Path, spoil: Any = None, **fields: Any) -> Made:
    """Department -> its adapter after one round, and the history."""
    found = clients(model, folder / "state")
    exchange = Spoiled(found, spoil) if spoil else InProcess(found)
    asked = plan(num_rounds=1, training=QUICK, **fields)
    history = run_rounds(exchange, asked, model, folder / "out")
    adapters = {}
    for group in ("finance", "hr"):
        file = folder / "out" / "rounds" / "0001" / group / "adapter-0.safetensors"
        adapters[group] = {k: v for k, v in Stored(file).items() if ".lora_" in k}
    return adapters, history


@pytest.fixture(scope="module")
def apart(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Floats]]:
    """What departments make that are not mixed."""
    found, history = run(model, tmp_path_factory.mktemp("apart"))
    assert history.rounds[0].clusters == ()
    return found


def test_rounds_mix_departments_as_the_plan_says_and_name_the_clusters(
    model: Path, apart: dict[str, dict[str, Floats]], tmp_path: Path
) -> None:
    found, history = run(model, tmp_path, mixing=Mixing(share=0.25, num_clusters=1))
    (done,) = history.rounds
    assert done.clusters == (("finance", "hr"),)
    weights = {
        group: sum(part.num_examples for part in done.parts if part.department == group)
        for group in apart
    }
    expected = mixed(apart, weights, 0.25, done.clusters)
    assert all(same(found[group], expected[group]) for group in apart)
    assert not any(same(found[group], apart[group]) for group in apart)


@pytest.mark.slow
def test_departments_unlike_each_other_are_left_alone(
    model: Path, apart: dict[str, dict[str, Floats]], tmp_path: Path
) -> None:
    found, history = run(model, tmp_path, mixing=Mixing(share=0.5, threshold=1.0))
    assert history.rounds[0].clusters == (("finance",), ("hr",))
    assert all(same(found[group], apart[group]) for group in apart)


def test_a_department_below_quorum_is_not_mixed(
    model: Path, apart: dict[str, dict[str, Floats]], tmp_path: Path
) -> None:
    gone = silent("hr-1", "hr-2")
    found, history = run(model, tmp_path, gone, mixing=Mixing(share=0.5, num_clusters=1))
    assert list(history.rounds[0].kept) == ["hr"]
    assert history.rounds[0].clusters == ()
    assert same(found["finance"], apart["finance"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": "organisation"}, "mixing: expected at least two departments with an adapter"),
        ({"departments": {"hr": ["hr-1"]}}, "mixing: expected at least two departments with an"),
        ({"rule": "fedsa"}, "mixing: factors of fedsa mean nothing to another department; take"),
        (
            {"mixing": {"share": 0.5, "num_clusters": 2}},
            "mixing.num_clusters: expected fewer than the 2 departments, found 2; with one each",
        ),
    ],
)
def test_plans_that_cannot_mix_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        plan(**{"mixing": {"share": 0.5, "num_clusters": 1}, **change})
