"""Every example belongs to one client, whatever the partition, the seed and the order."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedgraft.errors import FederationError
from fedgraft.federation.partition import (
    MAX_DRAWS,
    Indices,
    Partition,
    departments,
    dirichlet,
    iid,
    quantity,
    summarise,
    tasks,
)

LABELS = st.lists(st.sampled_from(["hr", "finance", "it_support", "engineering"]), min_size=1)
PARTITIONS = st.sampled_from(
    [
        Partition(name="departments", num_clients=2, field="label"),
        Partition(name="tasks", field="label"),
        Partition(name="iid", num_clients=3, seed=1),
        Partition(name="quantity", num_clients=3, exponent=1.5),
        Partition(name="dirichlet", num_clients=2, field="label", alpha=5, seed=3),
    ]
)
BALANCED = ["hr", "finance", "it_support", "engineering"] * 250


def drawn(partition: Partition, labels: list[str], ids: list[str] | None) -> dict[str, Indices]:
    """The clients, for examples of which there are enough."""
    try:
        return partition.clients({"label": labels}, ids)
    except FederationError:
        assume(False)
        raise


def by_id(clients: Mapping[str, Indices], ids: list[str]) -> dict[str, list[str]]:
    return {client: [ids[place] for place in places] for client, places in clients.items()}


@given(partition=PARTITIONS, labels=LABELS, named=st.booleans())
def test_every_example_belongs_to_exactly_one_client_and_no_client_is_empty(
    partition: Partition, labels: list[str], *, named: bool
) -> None:
    ids = [f"page {n}" for n in range(len(labels))] if named else None
    clients = drawn(partition, labels, ids)
    given_out = np.concatenate(list(clients.values()))
    assert sorted(given_out) == list(range(len(labels)))
    assert all(len(places) for places in clients.values())
    assert {places.dtype for places in clients.values()} == {np.dtype(np.int64)}


@given(partition=PARTITIONS, labels=LABELS, chance=st.randoms(use_true_random=False))
def test_with_ids_the_order_of_arrival_does_not_matter(
    partition: Partition, labels: list[str], chance: object
) -> None:
    ids = [f"page {n}" for n in range(len(labels))]
    first = by_id(drawn(partition, labels, ids), ids)
    pairs = list(zip(ids, labels, strict=True))
    chance.shuffle(pairs)  # type: ignore[attr-defined]
    shuffled = [name for name, _ in pairs]
    second = by_id(drawn(partition, [label for _, label in pairs], shuffled), shuffled)
    assert first == second
    assert list(first) == list(second)


@given(partition=PARTITIONS, labels=LABELS)
def test_same_seed_same_partition(partition: Partition, labels: list[str]) -> None:
    first, second = (drawn(partition, labels, None) for _ in range(2))
    assert {c: p.tolist() for c, p in first.items()} == {c: p.tolist() for c, p in second.items()}


@pytest.mark.parametrize("name", ["departments", "iid", "quantity", "dirichlet"])
def test_another_seed_is_another_partition(name: str) -> None:
    field = "label" if name in ("departments", "dirichlet") else None
    made = [
        Partition.model_validate(
            {"name": name, "num_clients": 3, "field": field, "seed": seed}
        ).clients({"label": BALANCED})
        for seed in (0, 1)
    ]
    assert any(a.tolist() != b.tolist() for a, b in zip(*(m.values() for m in made), strict=True))


@given(labels=LABELS, num_clients=st.integers(1, 3))
def test_a_department_is_cut_into_even_clients_of_its_own_pages(
    labels: list[str], num_clients: int
) -> None:
    assume(min(Counter(labels).values()) >= num_clients)
    clients = departments(labels, num_clients)
    assert list(clients) == [
        f"{label}-{n}" for label in sorted(set(labels)) for n in range(1, num_clients + 1)
    ]
    for label, size in Counter(labels).items():
        sizes = [len(clients[f"{label}-{n}"]) for n in range(1, num_clients + 1)]
        assert sum(sizes) == size
        assert max(sizes) - min(sizes) <= 1
    assert summarise(clients, labels).commonest == {c: c.rpartition("-")[0] for c in clients}


def test_a_department_is_cut_alike_whatever_others_have() -> None:
    ids = [f"page {n:04}" for n in range(len(BALANCED))]
    cut = Partition(num_clients=3)
    alone = [n for n, label in enumerate(BALANCED) if label == "hr"]
    fewer = [ids[n] for n in alone]
    whole = by_id(cut.clients({"department": BALANCED}, ids), ids)
    by_itself = by_id(cut.clients({"department": ["hr"] * len(alone)}, fewer), fewer)
    assert by_itself == {client: whole[client] for client in by_itself}


def test_a_task_is_a_client() -> None:
    clients = tasks(["b", "a", "b"])
    assert {client: places.tolist() for client, places in clients.items()} == {
        "a": [1],
        "b": [0, 2],
    }


@given(num_examples=st.integers(1, 300), num_clients=st.integers(1, 20), seed=st.integers(0, 9))
def test_iid_is_quantity_with_exponent_zero(num_examples: int, num_clients: int, seed: int) -> None:
    assume(num_examples >= num_clients)
    even = iid(num_examples, num_clients, seed=seed)
    flat = quantity(num_examples, num_clients, exponent=0, seed=seed)
    assert {c: p.tolist() for c, p in even.items()} == {c: p.tolist() for c, p in flat.items()}
    sizes = [len(places) for places in even.values()]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("exponent", "minimum", "sizes"),
    [(1, 1, [481, 241, 161, 121]), (2, 0, [702, 176, 78, 44]), (9, 5, [983, 7, 5, 5])],
)
def test_sizes_follow_a_power_law_above_the_minimum(
    exponent: float, minimum: int, sizes: list[int]
) -> None:
    clients = quantity(1004 if minimum == 1 else 1000, 4, exponent=exponent, minimum=minimum)
    shares = np.arange(1, 5.0) ** -exponent
    assert [len(places) for places in clients.values()] == sizes
    assert np.abs(minimum + (sum(sizes) - 4 * minimum) * shares / shares.sum() - sizes).max() < 1


def test_quantity_knows_no_label() -> None:
    clients = Partition(name="quantity", num_clients=4).clients({"label": BALANCED})
    assert summarise(clients, BALANCED).skew < 0.05


@pytest.mark.parametrize("seed", range(3))
def test_a_large_alpha_tends_to_iid(seed: int) -> None:
    clients = dirichlet(BALANCED, 5, alpha=1e6, seed=seed)
    summary = summarise(clients, BALANCED)
    assert all(abs(count - 50) <= 2 for row in summary.counts for count in row)
    assert summary.skew < 0.01


def test_a_small_alpha_tends_to_clients_of_one_label() -> None:
    summaries = [
        summarise(dirichlet(BALANCED, 4, alpha=1e-3, seed=seed), BALANCED) for seed in range(10)
    ]
    purest = [max(row) / sum(row) for summary in summaries for row in summary.counts]
    assert np.mean(purest) > 0.97
    assert np.mean([summary.skew for summary in summaries]) == pytest.approx(0.75, abs=0.02)


def test_skew_falls_as_alpha_grows() -> None:
    skews = [
        np.mean(
            [
                summarise(dirichlet(BALANCED, 5, alpha=alpha, seed=seed), BALANCED).skew
                for seed in range(10)
            ]
        )
        for alpha in (0.1, 0.5, 5.0, 100.0)
    ]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 5 * skews[-1]


def test_shares_of_one_label_are_those_of_a_dirichlet() -> None:
    """One label alone: shares with mean 1/c and variance (1/c)(1 - 1/c) / (c alpha + 1)."""
    alpha, num_clients = 2.0, 4
    sizes = np.array(
        [
            [
                len(places)
                for places in dirichlet(
                    ["hr"] * 400, num_clients, alpha=alpha, seed=seed, minimum=0
                ).values()
            ]
            for seed in range(400)
        ]
    )
    shares = sizes / 400
    assert shares.mean(axis=0) == pytest.approx(1 / num_clients, abs=0.03)
    expected = (1 / num_clients) * (1 - 1 / num_clients) / (num_clients * alpha + 1)
    assert shares.var(axis=0).mean() == pytest.approx(expected, rel=0.15)


def released(labels: list[str], num_clients: int, alpha: float, seed: int) -> list[list[int]]:
    """The rule as it is usually written: all shares drawn, those of full clients set to zero."""
    chance = np.random.default_rng(seed)
    clients: list[list[int]] = [[] for _ in range(num_clients)]
    for label in chance.permutation(sorted(set(labels))):
        places = chance.permutation([n for n, one in enumerate(labels) if one == label])
        shares = chance.dirichlet([alpha] * num_clients)
        shares *= [len(client) < len(labels) / num_clients for client in clients]
        ends = (np.cumsum(shares / shares.sum()) * len(places)).astype(int)[:-1]
        for client, part in zip(clients, np.split(places, ends), strict=True):
            client += part.tolist()
    return clients


@pytest.mark.parametrize("alpha", [0.5, 5.0])
def test_shares_are_drawn_as_in_released_code(alpha: float) -> None:
    """Mean skew, and mean sizes from the smallest client to the largest, agree over 150 draws."""
    labels = [f"{n % 7}" for n in range(350)]
    figures: dict[str, list[list[float]]] = {"ours": [], "theirs": []}
    for seed in range(150):
        theirs = {
            f"{c}": np.array(places, np.int64)
            for c, places in enumerate(released(labels, 5, alpha, seed))
        }
        ours = dirichlet(labels, 5, alpha=alpha, seed=seed, minimum=0)
        for name, clients in (("ours", ours), ("theirs", theirs)):
            summary = summarise(clients, labels)
            figures[name].append([350 * summary.skew, *sorted(summary.sizes)])
    ours_mean, theirs_mean = (np.mean(figures[name], axis=0) for name in ("ours", "theirs"))
    assert ours_mean == pytest.approx(theirs_mean, rel=0.06)


def test_a_client_that_is_full_gets_no_more_labels() -> None:
    labels = [f"label {n}" for n in range(40) for _ in range(10)]
    for seed in range(5):
        sizes = [len(p) for p in dirichlet(labels, 4, alpha=0.05, seed=seed).values()]
        assert max(sizes) < 100 + 10


@given(alpha=st.sampled_from([1e-300, 1e-5, 0.1, 1.0, 1e12]), seed=st.integers(0, 50))
@settings(max_examples=40)
def test_no_alpha_divides_by_zero(alpha: float, seed: int) -> None:
    labels = [f"{n % 7}" for n in range(60)]
    clients = dirichlet(labels, 3, alpha=alpha, seed=seed, minimum=0)
    assert sum(len(places) for places in clients.values()) == 60


def test_dirichlet_is_drawn_again_until_each_has_its_minimum() -> None:
    def smallest(minimum: int, seed: int) -> int:
        clients = dirichlet(BALANCED[:200], 4, alpha=0.3, minimum=minimum, seed=seed)
        return min(len(places) for places in clients.values())

    assert min(smallest(0, seed) for seed in range(20)) < 15
    assert min(smallest(15, seed) for seed in range(20)) >= 15


class Unlucky:
    """Chance whose ten shares add up to 0.9999999999999999, and that rounds all of them down."""

    def permutation(self, what: int | Indices) -> Indices:
        return np.arange(what) if isinstance(what, int) else what

    def dirichlet(self, _: object) -> list[float]:
        return [0.1] * 10

    def random(self) -> float:
        return 0.0


def test_an_example_is_not_lost_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np.random, "default_rng", lambda _: Unlucky())
    clients = dirichlet(["hr"] * 40, 10, alpha=1)
    assert sorted(np.concatenate(list(clients.values()))) == list(range(40))


def test_ids_sort_as_text_as_they_do_as_numbers() -> None:
    names = list(iid(100, 12))
    assert names == sorted(names)
    assert names[:2] == ["client-01", "client-02"]


def test_a_client_id_can_be_part_of_a_files_name() -> None:
    clients = tasks(["../it support/FAQ", "Büro", "v1.0"])
    assert set(clients) == {"it-support-FAQ", "Büro", "v1.0"}


def test_the_summary_counts_clients_by_label() -> None:
    labels = ["hr", "it", "hr", "it", "hr"]
    clients = {"a": np.array([0, 1, 2]), "b": np.array([3, 4])}
    summary = summarise(clients, labels)
    assert summary.clients == ("a", "b")
    assert summary.labels == ("hr", "it")
    assert summary.counts == ((2, 1), (1, 1))
    assert summary.sizes == (3, 2)
    assert summary.commonest == {"a": "hr", "b": "hr"}
    assert summary.skew == pytest.approx(3 / 5 * abs(2 / 3 - 3 / 5) + 2 / 5 * abs(1 / 2 - 3 / 5))


@given(partition=PARTITIONS)
def test_a_partition_is_the_same_after_a_file(partition: Partition) -> None:
    assert Partition.model_validate_json(partition.model_dump_json()) == partition


REFUSED_FILES: list[tuple[dict[str, object], str]] = [
    ({"name": "iid", "num_clients": 0}, "expected a num_clients of at least 1, found 0"),
    ({"minimum": 0}, "expected a minimum of at least 1, found 0"),
    (
        {"name": "dirichlet", "field": "x", "alpha": 0},
        "expected a finite alpha above 0, found 0.0; 0.5 is usual",
    ),
    ({"name": "dirichlet", "field": "x", "alpha": float("nan")}, "finite alpha above 0, found nan"),
    ({"name": "quantity", "exponent": -1}, "finite exponent of at least 0, found -1.0"),
    (
        {"name": "iid", "alpha": 0.1},
        "expected no alpha for the partition iid, which asks for num_clients, found 0.1; leave it",
    ),
    ({"name": "tasks", "num_clients": 3}, "expected no num_clients for the partition tasks"),
    ({"name": "quantity", "field": "task"}, "expected no field .* found 'task'"),
    ({"name": "dirichlet"}, "expected the field whose label .* name it, such as field: department"),
]


@pytest.mark.parametrize(("file", "message"), REFUSED_FILES)
def test_a_partition_that_makes_no_sense_is_refused(file: dict[str, object], message: str) -> None:
    with pytest.raises(FederationError, match=message):
        Partition.model_validate(file)


def test_an_unknown_partition_or_key_is_refused() -> None:
    with pytest.raises(ValidationError, match="'departments', 'tasks', 'iid'"):
        Partition.model_validate({"name": "random"})
    with pytest.raises(ValidationError, match="shards"):
        Partition.model_validate({"shards": 2})


REFUSED_EXAMPLES: list[tuple[Partition, dict[str, list[str | None]], list[str] | None, str]] = [
    (Partition(), {}, None, "expected at least one example to give to a client, found none"),
    (Partition(), {"department": []}, [], "at least one example"),
    (
        Partition(),
        {"department": ["hr", "hr"]},
        ["a"],
        "found 2 in 'department', 1 in 'ids'; give all of them the same length",
    ),
    (
        Partition(),
        {"department": ["hr", "hr", "it"]},
        ["a", "b", "a"],
        "expected a distinct id for each example, found 'a' for examples 0 and 2; drop one",
    ),
    (
        Partition(),
        {"task": ["qa"], "topic": ["pay"]},
        None,
        "expected the field 'department' for the partition departments, found 'task', 'topic'",
    ),
    (Partition(name="tasks"), {}, ["a"], "expected the field 'task' .* found no field"),
    (
        Partition(),
        {"department": ["hr", None]},
        None,
        "a label for each example in 'department', found none for example 1; fill it in",
    ),
    (Partition(), {"department": [" "]}, None, "found none for example 0"),
    (
        Partition(),
        {"department": ["it support", "it-support"]},
        None,
        "since they name clients, found 'it support' and 'it-support'; rename one",
    ),
    (Partition(), {"department": ["?!"]}, None, "found '\\?!'; rename one"),
    (
        Partition(name="iid", num_clients=3),
        {},
        ["a", "b"],
        "at least 1 example\\(s\\) for each of 3 clients, found 2 in all; ask for fewer clients",
    ),
    (
        Partition(num_clients=2, minimum=2),
        {"department": [*["hr"] * 4, *["it"] * 3]},
        None,
        "expected at least 2 example\\(s\\) of 'it' for each of 2 clients, found 3 in all",
    ),
    (
        Partition(name="tasks", minimum=2),
        {"task": ["qa", "qa", "sum"]},
        None,
        "at least 2 example\\(s\\) of 'sum' for 1 client, found 1 in all",
    ),
    (Partition(name="quantity", num_clients=3), {}, ["a"], "for each of 3 clients, found 1"),
    (
        Partition(name="dirichlet", num_clients=3, field="label"),
        {"label": ["x", "y"]},
        None,
        "for each of 3 clients, found 2",
    ),
    (
        Partition(name="dirichlet", num_clients=3, field="label", alpha=1e-5),
        {"label": [*["x", "y"] * 50]},
        None,
        "expected at least 1 of 100 examples for each of 3 clients, found 0 for client-. in the "
        f"last of {MAX_DRAWS} draws with alpha 1e-05 over 2 labels; take a larger alpha, fewer",
    ),
]


@pytest.mark.parametrize(("partition", "fields", "ids", "message"), REFUSED_EXAMPLES)
def test_examples_that_cannot_be_given_out_are_refused(
    partition: Partition, fields: dict[str, list[str | None]], ids: list[str] | None, message: str
) -> None:
    with pytest.raises(FederationError, match=message):
        partition.clients(fields, ids)


def test_one_example_can_be_one_client() -> None:
    assert {c: p.tolist() for c, p in Partition().clients({"department": ["hr"]}).items()} == {
        "hr-1": [0]
    }
