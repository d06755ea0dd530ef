"""What is chosen belongs to who is asked, covers what the clients have, and is the paper's."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from tests.selection.topics import at, clients

from fedgraft.errors import NonFiniteError, SelectionError
from fedgraft.selection.clusters import Clustering, Clusters, cells, cluster, k_centre
from fedgraft.selection.coreset import (
    DENSE,
    Chosen,
    Method,
    Selection,
    Summary,
    check,
    choose,
    client_seed,
    coreset,
    grouped,
    pick,
    take,
    tell,
)
from fedgraft.selection.features import Encoding
from fedgraft.selection.privacy import CentroidPrivacy, centres
from fedgraft.selection.projection import Points, Projection

NOISY = CentroidPrivacy(
    noise_multiplier=0.3, delta=1e-5, max_norm=3.0, num_cells=6, min_count=2, repeatable=True
)
ANCHORS = np.concatenate(list(clients(99)[0].values()))
CENTRES = centres(ANCHORS, 6, seed=0)
WAYS: dict[str, dict[str, Any]] = {
    "all": {"method": "all"},
    "random": {"method": "random", "budget": 0.05},
    "local": {"method": "local"},
    "local, a share": {"method": "local", "budget": 0.05},
    "points": {"method": "points"},
    "points, a share": {"method": "points", "budget": 0.05},
    "points, covered": {"method": "points", "budget": 0.05, "server": "k_centre"},
    "federated": {},
    "federated, a share": {"budget": 0.05},
    "k_centre": {"budget": 0.05, "server": "k_centre"},
    "facility_location": {"budget": 0.05, "server": "facility_location"},
    "singletons": {
        "clustering": Clustering(noise="singletons"),
        "server_clustering": Clustering(min_cluster_size=2, min_samples=1, noise="singletons"),
    },
    "worst left out": {"budget": 0.1, "quality": 0.4},
    "paper's noise": {"paper_noise": 0.01},
    "privacy": {"budget": 0.05, "privacy": NOISY},
}
way = pytest.mark.parametrize("settings_", WAYS.values(), ids=WAYS.keys())
SHARED = pytest.mark.parametrize(
    "name", ["random", "local, a share", "points, a share", "federated, a share", "k_centre"]
)


def gains_of(points: Mapping[str, Points]) -> dict[str, NDArray[np.float32]]:
    """A gain of each example that depends on the example alone."""
    return {client: np.sin(own.sum(axis=1) * 7) for client, own in points.items()}


def chosen_of(points: Mapping[str, Points], selection: Selection, *, seed: int = 0) -> list[Chosen]:
    gains = gains_of(points) if selection.quality else None
    return coreset(points, selection, seed=seed, gains=gains, centres=CENTRES)


def places(chosen: list[Chosen]) -> list[tuple[str, int]]:
    return [(one.client, one.index) for one in chosen]


# ── the paper ────────────────────────────────────────────────────────────────────────────────────


def by_the_paper(points: Mapping[str, Points], min_cluster_size: int) -> list[tuple[str, int]]:
    """FedHDS in plain loops, with its own call of HDBSCAN.

    HDBSCAN's tree has ties by design (points share their reach), so that other orders of the same
    points give other clusters: both here and there they are in the order of their coordinates.
    """
    from sklearn.cluster import HDBSCAN

    def dense(rows: list[Any], size: int) -> tuple[list[int], list[Any]]:
        if len(rows) <= size:
            return [-1] * len(rows), []
        order = sorted(range(len(rows)), key=lambda n: tuple(rows[n]))
        fit = HDBSCAN(min_cluster_size=size, min_samples=size + 1, copy=True)
        fit.fit(np.array([rows[n] for n in order], np.float64))
        labels, middles = [-1] * len(rows), []
        for number in range(max(fit.labels_) + 1):
            total, weight = np.zeros(len(rows[0])), 0.0
            for n, label, strength in zip(order, fit.labels_, fit.probabilities_, strict=True):
                if label == number:
                    labels[n] = number
                    total, weight = total + strength * np.float64(rows[n]), weight + strength
            middles.append(np.float32(total / weight))
        return labels, middles

    def distance(one: Any, other: Any) -> float:
        return math.sqrt(sum((float(a) - float(b)) ** 2 for a, b in zip(one, other, strict=True)))

    labels, told = {}, []
    for client, own in points.items():
        labels[client], middles = dense(list(own), min_cluster_size)
        told += [(client, number, middle) for number, middle in enumerate(middles)]
    at_server, centres_ = dense([middle for _, _, middle in told], 2)
    found = []
    for number, centre in enumerate(centres_):
        members = [row for row, label in zip(told, at_server, strict=True) if label == number]
        client, own_number, middle = min(members, key=lambda row: distance(row[2], centre))
        inside = [n for n, label in enumerate(labels[client]) if label == own_number]
        nearest = min(inside, key=lambda n: distance(points[client][n], middle))
        found.append((client, nearest))
    return sorted(found)


@pytest.mark.parametrize("seed", range(5))
def test_the_papers_algorithm_is_what_plain_loops_give(seed: int) -> None:
    points, _ = clients(seed, num_clients=8, num_dimensions=2, apart=6.0)
    selection = Selection.paper(5).model_copy(update={"projection": Projection()})
    found = places(coreset(points, selection, seed=seed))
    assert found == by_the_paper(points, 5)
    assert len(found) > 0


def test_the_papers_settings_are_the_papers() -> None:
    paper = Selection.paper(2)
    assert (paper.method, paper.server, paper.budget, paper.every_round) == (
        "federated",
        "hdbscan",
        None,
        True,
    )
    assert paper.encoding == Encoding(encoder=None, layers="all", pooling="last")
    assert (paper.projection.name, paper.projection.num_dimensions) == ("tsne", 2)
    assert paper.projection.scaling == "none"
    assert paper.clustering == Clustering(min_cluster_size=2, noise="drop")
    assert paper.server_clustering == Clustering(min_cluster_size=2, noise="drop")
    assert (paper.quality, paper.privacy, paper.paper_noise) == (0, None, None)
    assert paper.num_exchanges(40) == 40
    once = paper.model_copy(update={"every_round": False})
    assert [once.num_exchanges(rounds) for rounds in (0, 1, 40)] == [0, 1, 1]


def test_topics_that_clients_share_are_one_server_cluster_and_one_example() -> None:
    points, topics = clients(0, num_clients=12, alpha=50.0, num_topics=3, apart=30.0)
    found = coreset(points, Selection(), seed=0)
    assert sorted(int(topics[one.client][one.index]) for one in found) == [0, 1, 2]
    assert len({one.server_cluster for one in found}) == 3


# ── whatever the way ─────────────────────────────────────────────────────────────────────────────


@way
def test_chosen_places_are_of_the_client_and_of_the_cluster_that_is_named(
    settings_: dict[str, Any],
) -> None:
    points, _ = clients(1)
    selection = Selection(**settings_)
    found = chosen_of(points, selection)
    assert found
    assert len(set(places(found))) == len(found)
    assert places(found) == sorted(places(found))
    for one in found:
        own = grouped(points[one.client], selection, centres=CENTRES)
        number = int(own.labels[one.index])
        assert one.cluster == (own.cells[number] if selection.privacy else number)
        assert one.cluster_size == own.counts[number] == (own.labels == number).sum()
        gap = points[one.client][one.index] - own.centroids[number]
        assert one.distance == pytest.approx(float(np.linalg.norm(gap)), rel=1e-5)
        assert one.server_cluster >= 0


@way
def test_numbers_of_clusters_are_not_places_of_examples(settings_: dict[str, Any]) -> None:
    """What is asked of cluster j is taken from the examples in it, not from example j's cluster."""
    points, _ = clients(2)
    selection = Selection(**settings_)
    seed = 3
    own = {client: grouped(rows, selection, centres=CENTRES) for client, rows in points.items()}
    if selection.method in ("local", "federated"):
        assert any(
            (c.labels[: c.num_clusters] != np.arange(c.num_clusters)).any() for c in own.values()
        )
    told = {
        client: tell(c, points[client], selection, seed=client_seed(seed, client), centres=CENTRES)
        for client, c in own.items()
    }
    asked = choose(told, selection, seed=seed)
    taken = Counter((one.client, one.cluster) for one in chosen_of(points, selection, seed=seed))
    for client, counts in asked.items():
        for number, count in enumerate(counts):
            if selection.privacy:  # by noisy counts: as many as there are
                (held,) = np.nonzero(own[client].cells == number)
                count = min(int(count), int(own[client].counts[held].sum()))
            assert taken[client, number] == count


@way
def test_the_same_seed_chooses_the_same(settings_: dict[str, Any]) -> None:
    points, _ = clients(3)
    selection = Selection(**settings_)
    assert chosen_of(points, selection, seed=5) == chosen_of(points, selection, seed=5)


@way
def test_the_order_of_clients_does_not_matter(settings_: dict[str, Any]) -> None:
    points, _ = clients(4)
    selection = Selection(**settings_)
    turned = {client: points[client] for client in reversed(points)}
    assert chosen_of(points, selection) == chosen_of(turned, selection)


@way
def test_the_order_of_examples_does_not_matter(settings_: dict[str, Any]) -> None:
    """`random` draws places: there it changes which examples, and not how many of whom."""
    selection = Selection(**settings_)
    points, _ = clients(5)
    rng = np.random.default_rng(0)
    order = {client: rng.permutation(len(own)) for client, own in points.items()}
    turned = {client: own[order[client]] for client, own in points.items()}
    found = chosen_of(turned, selection)
    if selection.method == "random":
        drawn = chosen_of(points, selection)
        assert Counter(one.client for one in found) == Counter(one.client for one in drawn)
        return
    back = sorted((one.client, int(order[one.client][one.index])) for one in found)
    assert back == places(chosen_of(points, selection))


@way
def test_summaries_choose_take_is_the_choice_at_one_place(settings_: dict[str, Any]) -> None:
    """Each client sees its own points and its own answer alone, and forgets all in between."""
    points, _ = clients(6)
    selection = Selection(**settings_)
    seed = 11
    told = {}
    for client in reversed(points):
        own = points[client].copy()
        summary = tell(
            grouped(own, selection, centres=CENTRES),
            own,
            selection,
            seed=client_seed(seed, client),
            centres=CENTRES,
        )
        told[client] = replace(
            summary, centroids=summary.centroids.copy(), counts=summary.counts.copy()
        )
    asked = choose(told, selection, seed=seed)
    found = []
    for client, counts in asked.items():
        own = points[client].copy()
        gains = gains_of(points)[client] if selection.quality else None
        chosen = take(
            grouped(own, selection, centres=CENTRES),
            own,
            counts,
            selection,
            seed=client_seed(seed, client),
            gains=gains,
        )
        found += [(client, int(place)) for place in chosen]
    assert found == places(chosen_of(points, selection, seed=seed))


@way
def test_a_client_tells_centroids_and_counts_and_neither_where_none_are_compared(
    settings_: dict[str, Any],
) -> None:
    points = clients(7)[0]["client-0"]
    selection = Selection(**settings_)
    told = tell(
        grouped(points, selection, centres=CENTRES), points, selection, seed=0, centres=CENTRES
    )
    assert told.centroids.dtype == np.float32
    assert told.counts.dtype == np.int64
    assert (told.centroids.shape[1] == 0) == (selection.method in ("all", "random", "local"))
    if not selection.privacy:
        assert told.num_examples == len(points)
    check("client-0", told)


# ── odd clients ──────────────────────────────────────────────────────────────────────────────────


def few(count: int, *, all_at: float = 0.0) -> Points:
    return np.full((count, 6), all_at, np.float32)


@way
@pytest.mark.parametrize(
    "odd",
    [few(0), few(1), few(2), few(1, all_at=3.0), few(40), at(np.eye(6)[:3]) * 1e3],
    ids=["none", "one", "two", "another", "identical", "noise"],
)
def test_odd_clients_are_no_crash_and_spoil_nothing_of_the_others(
    settings_: dict[str, Any], odd: Points
) -> None:
    points, _ = clients(8)
    selection = Selection(**settings_)
    found = chosen_of({**points, "odd": odd}, selection)
    assert {one.client for one in found} & set(points)
    assert all(one.index < len(odd) for one in found if one.client == "odd")
    alone = chosen_of({"odd": odd}, selection)
    assert len(alone) <= len(odd)
    if selection.method == "all":
        assert len(alone) == len(odd)


@way
@pytest.mark.parametrize("names", [(), ("one",), ("one", "two")])
def test_where_all_clients_are_empty_the_choice_is_empty(
    settings_: dict[str, Any], names: tuple[str, ...]
) -> None:
    assert chosen_of(dict.fromkeys(names, few(0)), Selection(**settings_)) == []


def test_where_all_is_noise_nothing_is_chosen() -> None:
    points = {name: at(np.eye(6)) * size for name, size in (("a", 10), ("b", 1e4))}
    for budget in (None, 0.5):
        assert coreset(points, Selection(budget=budget), seed=0) == []
        summaries = {"a": Summary(centroids=few(0), counts=np.zeros(0, int), num_examples=6)}
        assert choose(summaries, Selection(budget=budget), seed=0)["a"].shape == (0,)


def test_one_centroid_alone_is_noise_at_the_server_unless_noise_stays() -> None:
    told = {"a": Summary(centroids=few(1, all_at=2.0), counts=np.array([7]), num_examples=9)}
    assert choose(told, Selection(), seed=0)["a"].tolist() == [0]
    stays = Selection(server_clustering=Clustering(noise="singletons"))
    assert choose(told, stays, seed=0)["a"].tolist() == [1]
    covered = Selection(server="k_centre", budget=0.3)
    assert choose(told, covered, seed=0)["a"].tolist() == [3]


# ── the budget ───────────────────────────────────────────────────────────────────────────────────


@SHARED
@pytest.mark.parametrize("budget", [0.0002, 0.015, 0.1])
def test_the_budget_is_met_exactly(name: str, budget: float) -> None:
    points, _ = clients(9, num_clients=10)
    selection = Selection(**WAYS[name] | {"budget": budget})
    assert len(chosen_of(points, selection)) == max(1, math.floor(budget * 600 + 0.5))


@pytest.mark.parametrize("name", ["federated", "federated, a share", "k_centre"])
def test_clusters_of_no_example_are_as_if_they_were_not_told(name: str) -> None:
    """So a client that hides small cells tells of all cells, and the server is none the wiser."""
    points, _ = clients(18)
    selection = Selection(**WAYS[name])
    told = {c: tell(cluster(own, DENSE), own, selection, seed=0) for c, own in points.items()}
    padded = {
        client: Summary(
            centroids=np.concatenate([one.centroids[:1], one.centroids, ANCHORS[:9]]),
            counts=np.concatenate([[0], one.counts, np.zeros(9, np.int64)]),
            num_examples=one.num_examples,
        )
        for client, one in told.items()
    }
    expected, found = (choose(every, selection, seed=0) for every in (told, padded))
    for client, counts in expected.items():
        assert found[client].tolist() == [0, *counts, *[0] * 9]


def test_where_too_few_examples_are_clustered_all_of_them_are_chosen() -> None:
    points, _ = clients(10)
    found = coreset(points, Selection(method="local", budget=1.0), seed=0)
    clustered = sum((cluster(own, DENSE).labels >= 0).sum() for own in points.values())
    assert len(found) == clustered < 360


def test_a_larger_budget_leaves_every_cluster_what_it_had() -> None:
    points, _ = clients(11)
    told = {c: tell(cluster(own, DENSE), own, Selection(), seed=0) for c, own in points.items()}
    before = None
    for budget in np.arange(0.01, 1.0, 0.02):
        asked = choose(told, Selection(budget=budget), seed=0)
        counts = np.concatenate(list(asked.values()))
        assert (counts <= np.concatenate([one.counts for one in told.values()])).all()
        assert before is None or (counts >= before).all()
        before = counts


def test_shares_are_in_proportion_to_what_server_clusters_stand_for() -> None:
    """Three topics of 400, 200 and 100 examples, each at four clients."""
    rng = np.random.default_rng(0)
    middles = np.eye(3, 6, dtype=np.float32) * 50
    sizes = (100, 50, 25)
    points = {
        f"client-{n}": np.concatenate(
            [
                middles[t] + rng.normal(size=(size, 6)).astype(np.float32)
                for t, size in enumerate(sizes)
            ]
        )
        for n in range(4)
    }
    selection = Selection(budget=0.05, clustering=Clustering(min_cluster_size=12))
    found = coreset(points, selection, seed=0)
    by_group = sorted(Counter(one.server_cluster for one in found).values())
    assert by_group == [5, 10, 20]
    by_client = Counter((one.server_cluster, one.client) for one in found)
    assert max(by_client.values()) == 5
    assert sorted(by_client.values()) == [1, 1, 1, 2, 2, 2, 3, 3, 5, 5, 5, 5]


def test_with_one_example_for_each_server_cluster_a_budget_is_the_paper() -> None:
    """To the nearest to the centre, not to the largest."""
    told = {
        f"client-{n}": Summary(
            centroids=at([[n / 7, 0], [50 + n / 5, 1]]),
            counts=np.array([5 + n] * 2),
            num_examples=18,
        )
        for n in range(5)
    }
    by_paper = choose(told, Selection(), seed=0)
    by_share = choose(told, Selection(budget=2 / 90), seed=0)
    for client, counts in by_paper.items():
        assert counts.tolist() == by_share[client].tolist()
    assert sum(counts.sum() for counts in by_paper.values()) == 2
    assert by_paper["client-4"].tolist() == [0, 0]


@pytest.mark.parametrize("server", ["k_centre", "facility_location"])
def test_coverage_gives_each_of_its_groups_one_and_leaves_no_centroid_far(server: str) -> None:
    points, topics = clients(12, num_clients=10, alpha=0.3, apart=20.0)
    found = coreset(points, Selection(server=server, budget=0.03), seed=0)  # type: ignore[arg-type]
    groups = Counter(one.server_cluster for one in found)
    assert len(groups) == len(found) == 18
    about = {int(topics[one.client][one.index]) for one in found}
    clustered = {
        int(topics[client][place])
        for client, own in points.items()
        for place in np.flatnonzero(cluster(own, DENSE).labels >= 0)
    }
    assert about == clustered


def test_with_more_examples_than_centroids_coverage_gives_each_its_share() -> None:
    points, _ = clients(13)
    found = coreset(points, Selection(server="k_centre", budget=0.5), seed=0)
    told = {client: cluster(own, DENSE).counts for client, own in points.items()}
    assert len({one.server_cluster for one in found}) == sum(map(len, told.values()))
    assert len(found) == 180


# ── without a level between clients ──────────────────────────────────────────────────────────────


def test_random_shares_are_drawn_by_the_seed_and_reach_everyone_in_time() -> None:
    points = {f"client-{n:02}": few(20) for n in range(20)}
    selection = Selection(method="random", budget=0.01)
    rounds = [places(coreset(points, selection, seed=seed)) for seed in range(60)]
    assert {len(chosen) for chosen in rounds} == {4}
    seen = Counter(place for chosen in rounds for place in chosen)
    assert len({client for client, _ in seen}) == 20
    assert len({index for _, index in seen}) == 20
    assert max(seen.values()) <= 8


def test_random_and_local_shares_are_in_proportion_to_what_clients_have() -> None:
    rng = np.random.default_rng(0)
    sizes = {"a": 40, "b": 80, "c": 120}
    points = {c: rng.normal(size=(n, 6)).astype(np.float32) for c, n in sizes.items()}
    found = coreset(points, Selection(method="random", budget=0.1), seed=0)
    assert Counter(one.client for one in found) == {"a": 4, "b": 8, "c": 12}


def test_local_takes_one_of_every_own_cluster_whatever_the_others_have() -> None:
    points, _ = clients(14)
    found = places(coreset(points, Selection(method="local"), seed=0))
    for client, own in points.items():
        alone = places(coreset({client: own}, Selection(method="local"), seed=0))
        assert [place for place in found if place[0] == client] == alone
        assert len(alone) == cluster(own, DENSE).num_clusters


def test_points_at_the_server_are_the_choice_of_one_client_that_has_them_all() -> None:
    points, _ = clients(15)
    whole = np.concatenate(list(points.values()))
    found = coreset(points, Selection(method="points"), seed=0)
    alone = coreset({"all": whole}, Selection(method="local"), seed=0)
    first = dict(zip(points, np.arange(len(points)) * 60, strict=True))
    assert sorted(first[one.client] + one.index for one in found) == [one.index for one in alone]


def test_points_at_the_server_are_spread_over_their_cluster() -> None:
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(size=(80, 2)) + middle for middle in (0, 60)])
    selection = Selection(
        method="points", budget=0.1, clustering=Clustering(min_cluster_size=40, min_samples=5)
    )
    found = coreset({"a": points.astype(np.float32)}, selection, seed=0)
    groups = [[points[one.index] for one in found if one.server_cluster == n] for n in (0, 1)]
    assert list(map(len, groups)) == [8, 8]
    for group in groups:
        assert np.linalg.norm(np.std(group, axis=0)) > 0.9  # of the cluster itself 1.4


def test_a_cell_that_noise_made_larger_than_it_is_gives_all_that_it_has() -> None:
    points = np.repeat(CENTRES[[0, 3]], [2, 7], axis=0)
    selection = Selection(privacy=NOISY)
    asked = np.array([5, 1, 0, 2, 0, 0])
    own = grouped(points, selection, centres=CENTRES)
    assert take(own, points, asked, selection, seed=0).tolist()[:2] == [0, 1]
    assert len(take(own, points, asked, selection, seed=0)) == 4


def test_all_is_all() -> None:
    points, _ = clients(16)
    assert len(coreset(points, Selection(method="all"), seed=0)) == 360


def test_a_local_share_of_one_is_of_the_largest_cluster() -> None:
    told = {"a": Summary(centroids=few(3)[:, :0], counts=np.array([5, 9, 6]), num_examples=20)}
    asked = choose(told, Selection(method="local", budget=0.05), seed=0)
    assert asked["a"].tolist() == [0, 1, 0]


# ── within a cluster ─────────────────────────────────────────────────────────────────────────────


def one_cluster(points: Points) -> Clusters:
    return cells(points, points.mean(axis=0, keepdims=True))


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 40))
def test_one_example_is_the_nearest_to_the_centroid(seed: int, n: int) -> None:
    points = np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32)
    clusters = one_cluster(points)
    (found,) = pick(clusters, points, np.array([1]))
    apart = np.linalg.norm(points - clusters.centroids[0], axis=1)
    assert apart[found] == apart.min()


def test_several_lie_nearer_to_all_of_the_cluster_than_drawn_or_furthest_ones() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(200, 3)).astype(np.float32)
    clusters = one_cluster(points)
    found = pick(clusters, points, np.array([12]))

    def mean_gap(places_: NDArray[np.int64]) -> float:
        gaps = np.linalg.norm(points[:, None] - points[places_][None], axis=2)
        return float(gaps.min(axis=1).mean())

    drawn = [mean_gap(rng.choice(200, 12, replace=False)) for _ in range(50)]
    assert mean_gap(found) < min(drawn)
    assert mean_gap(found) < 0.9 * mean_gap(k_centre(points, 12))
    assert found.tolist() == sorted(set(found.tolist()))


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), quality=st.floats(0.01, 0.95))
def test_the_worst_by_their_gain_are_passed_over(seed: int, n: int, quality: float) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, 3)).astype(np.float32)
    gains = rng.permutation(n).astype(np.float32)
    left = n - math.floor(quality * n)
    clusters = one_cluster(points)
    found = pick(clusters, points, np.array([left]), gains=gains, quality=quality)
    assert set(found) == set(np.argsort(-gains)[:left])
    assume(left < n)
    message = f"at most {left} of its {n} examples, found {left + 1}; the points may have changed"
    with pytest.raises(SelectionError, match=message):
        pick(clusters, points, np.array([left + 1]), gains=gains, quality=quality)


def test_of_equal_gains_the_further_is_passed_over() -> None:
    points = at([[0, 0], [0, 1], [0, -1], [9, 0]])
    clusters = one_cluster(points)
    found = pick(clusters, points, np.array([3]), gains=np.zeros(4, np.float32), quality=0.25)
    assert found.tolist() == [0, 1, 2]


def test_the_server_asks_for_none_of_those_that_are_passed_over() -> None:
    points, _ = clients(17)
    selection = Selection(budget=1.0, quality=0.5)
    found = chosen_of(points, selection)
    assert found
    gains = gains_of(points)
    for client, own in points.items():
        labels = cluster(own, DENSE).labels
        for number in range(labels.max() + 1):
            (members,) = np.nonzero(labels == number)
            mine = {one.index for one in found if (one.client, one.cluster) == (client, number)}
            best = members[np.argsort(-gains[client][members])]
            assert mine <= set(best[: len(members) - len(members) // 2])


def test_chance_draws_first_what_was_drawn_least_often() -> None:
    selection = Selection(method="random", budget=0.5, repeat=False)
    points = np.zeros((12, 0), np.float32)
    own = grouped(points, selection)
    times = np.array([1, 0, 2, 0, 1, 1, 0, 2, 1, 1, 0, 1])
    draws = {
        tuple(take(own, points, np.array([6]), selection, seed=seed, times=times).tolist())
        for seed in range(30)
    }
    assert len(draws) > 5  # the two of those drawn once before vary
    for drawn in draws:
        assert sorted(times[list(drawn)]) == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("fields", "repeats"),
    [
        ({}, False),
        ({"method": "random", "budget": 0.1}, False),
        ({"repeat": True}, True),
        ({"method": "all"}, True),
        ({"every_round": False}, True),
        ({"privacy": NOISY}, True),
    ],
)
def test_none_is_chosen_twice_but_where_that_is_asked_or_cannot_be_otherwise(
    fields: dict[str, Any], repeats: bool
) -> None:
    assert Selection(**fields).repeats is repeats


# ── what is refused ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budget": 0}, "expected a budget above 0 and up to 1, a share .* found 0.0; 0.01 is one"),
        ({"budget": 1.5}, "up to 1"),
        ({"budget": math.nan}, "found nan"),
        ({"quality": 1}, "expected a quality from 0 to below 1, .* found 1.0; 0.2 leaves out"),
        ({"quality": -0.1}, "found -0.1"),
        ({"paper_noise": -1}, "expected a finite paper_noise of at least 0, found -1.0; leave it"),
        ({"paper_noise": math.inf}, "found inf"),
        (
            {"method": "all", "budget": 0.1},
            "expected no budget for the method all, which asks for nothing, found 0.1; leave it",
        ),
        (
            {"method": "random", "budget": 0.1, "quality": 0.2},
            "expected no quality for the method random, which asks for budget, repeat, found",
        ),
        ({"method": "local", "paper_noise": 0.1}, "expected no paper_noise for the method local"),
        ({"method": "local", "server": "k_centre"}, "expected no server for the method local"),
        ({"method": "points", "privacy": NOISY}, "expected no privacy for the method points"),
        ({"method": "points", "quality": 0.2}, "expected no quality for the method points"),
        (
            {"method": "random"},
            "expected a budget, as random finds no number of examples by itself",
        ),
        (
            {"server": "k_centre"},
            "expected a budget, as k_centre .*; give one, such as budget: 0.01",
        ),
        (
            {"privacy": NOISY, "projection": Projection(name="tsne", num_dimensions=2)},
            "depends on its own example alone, as privacy needs, found 'tsne'; take random",
        ),
        (
            {"privacy": NOISY, "paper_noise": 0.1},
            "expected either privacy or paper_noise, found both; leave paper_noise out",
        ),
        (
            {"privacy": NOISY, "clustering": Clustering(min_cluster_size=2)},
            "which has cells in place of clusters, found .*min_cluster_size=2.*; leave it out",
        ),
        (
            {"server": "k_centre", "budget": 0.1, "server_clustering": Clustering()},
            "expected no server_clustering with k_centre, which covers .*; leave it out, or say",
        ),
        (
            {"method": "all", "repeat": False},
            "expected no repeat for the method all, .* found False; leave it out",
        ),
        (
            {"repeat": False, "every_round": False},
            "expected every_round: true with repeat: false, as .* found false; leave one",
        ),
        (
            {"repeat": False, "privacy": NOISY},
            "expected no repeat: false with privacy: .* for many others; leave it out",
        ),
        (
            {"method": "points", "server_clustering": Clustering()},
            "expected no server_clustering for the method points",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        Selection(**fields)


def test_every_method_has_a_way_above() -> None:
    assert {fields.get("method", "federated") for fields in WAYS.values()} == set(get_args(Method))


def summary(**fields: Any) -> Summary:
    known: dict[str, Any] = {"centroids": few(2), "counts": np.array([3, 4]), "num_examples": 9}
    return Summary(**known | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"centroids": few(2) * np.nan},
            "client 'bad': expected finite centroids, found NaN or Inf in that of cluster 0; leave",
        ),
        (
            {"centroids": np.zeros((2, 5), np.float32)},
            "client 'bad': expected centroids of 6 dimensions, found 5; give all clients one",
        ),
        (
            {"centroids": few(3)},
            r"client 'bad': expected centroids \[k, d\] and counts \[k\], found \[3, 6\] and \[2\]",
        ),
        ({"centroids": np.zeros(2, np.float32)}, r"found \[2\] and \[2\]"),
        (
            {"counts": np.array([9, 4])},
            r"client 'bad': .* at most its 9 examples, found \[9, 4\] of type int64, in all 13;",
        ),
        ({"counts": np.array([-1, 4])}, "whole counts from 0 on"),
        ({"counts": np.array([1.5, 4])}, "of type float64"),
    ],
)
def test_a_summary_that_nobody_can_have_told_is_refused_by_its_clients_name(
    fields: dict[str, Any], message: str
) -> None:
    told = {"a": summary(), "bad": summary(**fields), "c": summary()}
    with pytest.raises(SelectionError, match=message):
        choose(told, Selection(), seed=0)


def test_more_examples_than_anybody_is_believed_to_have_are_refused() -> None:
    check("a", summary(), max_examples=9)
    message = "client 'a': expected at most 8 examples, found 9; raise the most that is believed"
    with pytest.raises(SelectionError, match=message):
        check("a", summary(), max_examples=8)


@way
def test_a_selection_is_the_same_when_read_from_its_file(settings_: dict[str, Any]) -> None:
    selection = Selection(**settings_)
    assert Selection.model_validate_json(selection.model_dump_json()) == selection
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Selection.model_validate(settings_ | {"methd": "all"})


def test_clients_without_clusters_have_no_dimension_to_differ_in() -> None:
    empty = Summary(centroids=np.zeros((0, 0), np.float32), counts=np.zeros(0, int), num_examples=0)
    asked = choose({"a": summary(), "b": empty}, Selection(method="local"), seed=0)
    assert (asked["a"].tolist(), asked["b"].tolist()) == ([1, 1], [])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: coreset({"hr": few(3) * np.nan}, Selection(), seed=0),
            "client 'hr': expected finite points, found NaN or Inf in that of example 0; leave it",
        ),
        (
            lambda: coreset({"hr": np.zeros(3, np.float32)}, Selection(), seed=0),
            r"client 'hr': expected points \[n, d\], found \[3\]; project its features",
        ),
        (
            lambda: coreset({"hr": few(3)}, Selection(privacy=NOISY), seed=0),
            "expected the centres of 6 cells, which the server broadcasts for privacy, found none;",
        ),
        (
            lambda: grouped(few(3), Selection(privacy=NOISY), centres=CENTRES[:2]),
            "expected the centres of 6 cells, .* found 2; make them with `privacy.centres`",
        ),
        (
            lambda: pick(one_cluster(few(3)), few(3), np.array([1, 1])),
            r"expected a whole number for each of 1 clusters, found \[2\] of type int64; the",
        ),
        (
            lambda: pick(one_cluster(few(3)), few(3), np.array([0.5])),
            "of type float64",
        ),
        (
            lambda: pick(one_cluster(few(3)), few(3), np.array([4])),
            "cluster 0: expected to be asked for at most 3 of its 3 examples, found 4; the points",
        ),
        (lambda: pick(one_cluster(few(3)), few(3), np.array([-1])), "found -1"),
        (
            lambda: pick(one_cluster(few(3)), few(3), np.array([1]), quality=0.2),
            "expected gains of the answers together with a quality above 0, found none; give both",
        ),
        (
            lambda: pick(one_cluster(few(3)), few(3), np.array([1]), gains=np.zeros(3)),
            "found some without a quality",
        ),
        (
            lambda: pick(
                one_cluster(few(3)), few(3), np.array([1]), gains=np.zeros(2), quality=0.1
            ),
            r"expected a finite gain for each of 3 examples, found \[2\] or NaN",
        ),
        (
            lambda: pick(
                one_cluster(few(3)), few(3), np.array([1]), gains=np.full(3, np.nan), quality=0.1
            ),
            "compute them of these examples",
        ),
        (
            lambda: take(
                grouped(few(3), Selection(privacy=NOISY), centres=CENTRES),
                few(3),
                np.array([1]),
                Selection(privacy=NOISY),
                seed=0,
            ),
            "expected a number for each of 6 cells, found 1; ask again",
        ),
        (
            lambda: take(
                grouped(few(3), Selection(method="random", budget=0.5)),
                few(3),
                np.array([4]),
                Selection(method="random", budget=0.5),
                seed=0,
            ),
            "at most 3 of its 3 examples, found 4",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused(act: Callable[[], object], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        act()


def test_a_client_refuses_points_without_end() -> None:
    with pytest.raises(NonFiniteError):
        grouped(few(3) * np.nan, Selection())
