"""The two index faults of FedHDS's released code, made again, and what each costs.

    zhenqincn/FedHDS, client.py: features come from `original_train_loader`, which shuffles; the
    chosen places are looked up in `original_train_loader.dataset`, which does not: place 7 is the
    seventh of one order, and another example of the other.

    client.py: `zip(cluster_labels, centroids)` pairs the centroid of cluster j with the label of
    example j. The server's answer names that label, and the client looks in its cluster for the
    example nearest to its centroid; for noise, -1, among the noise and with the last centroid.

All clients' points lie in one space here, so that neither fault hides behind the paper's other one.
"""

from collections.abc import Callable

import numpy as np
from tests.selection.topics import clients

from fedgraft.selection.clusters import Clustering, cluster
from fedgraft.selection.coreset import Selection, coreset
from fedgraft.selection.projection import Points

SELECTION = Selection.paper(5)
SEEDS = range(8)
Picks = list[tuple[str, int]]


def released(
    points: dict[str, Points], seed: int, *, shuffled: bool = False, mispaired: bool = False
) -> Picks:
    """The released choice, of every client's points in the order of its data, with its faults."""
    rng = np.random.default_rng(seed)
    seen, found = {}, {}
    staged: list[tuple[str, int, np.ndarray]] = []
    for client, own in points.items():
        order = rng.permutation(len(own)) if shuffled else np.arange(len(own))
        seen[client] = own[order]  # what the loader gave, in its order
        found[client] = cluster(seen[client], SELECTION.clustering)
        for number, centroid in enumerate(found[client].centroids):
            paired = int(found[client].labels[number]) if mispaired else number
            staged.append((client, paired, centroid))
    at_server = cluster(np.stack([row[2] for row in staged]), Clustering(min_cluster_size=2))
    picks: Picks = []
    for number, centre in enumerate(at_server.centroids):
        (members,) = np.nonzero(at_server.labels == number)
        apart = [np.linalg.norm(staged[member][2] - centre) for member in members]
        client, named, _ = staged[members[int(np.argmin(apart))]]
        (inside,) = np.nonzero(found[client].labels == named)
        rows = seen[client][inside] - found[client].centroids[named]
        picks.append((client, int(inside[int(np.argmin(np.linalg.norm(rows, axis=1)))])))
    return picks


def intended(points: dict[str, Points]) -> Picks:
    return [(chosen.client, chosen.index) for chosen in coreset(points, SELECTION, seed=0)]


def cost(released_choice: Callable[[dict[str, Points], int], Picks]) -> tuple[float, float]:
    """Share of intended examples that are chosen, and of topics covered by the intended ones."""
    shares, covers = [], []
    for seed in SEEDS:
        points, topics = clients(seed)
        meant, got = intended(points), released_choice(points, seed)
        shares.append(len(set(meant) & set(got)) / len(meant))
        about = [{int(topics[client][place]) for client, place in picks} for picks in (meant, got)]
        covers.append(len(about[1]) / len(about[0]))
    return float(np.mean(shares)), float(np.mean(covers))


def test_without_its_faults_the_released_code_chooses_what_we_choose() -> None:
    assert cost(lambda points, seed: released(points, seed)) == (1.0, 1.0)


def test_places_in_shuffled_data_choose_other_examples_at_random() -> None:
    """Hardly one of the intended examples, and topics are lost, as in a draw."""
    share, cover = cost(lambda points, seed: released(points, seed, shuffled=True))
    assert share < 0.05
    assert 0.7 < cover < 0.95


def test_numbers_of_clusters_taken_for_labels_of_examples_choose_other_clusters() -> None:
    share, cover = cost(lambda points, seed: released(points, seed, mispaired=True))
    assert 0.15 < share < 0.5
    assert 0.7 < cover < 0.95


def test_a_cluster_number_taken_for_a_label_trains_on_noise_or_on_one_example_twice() -> None:
    noise = twice = 0
    for seed in SEEDS:
        points, _ = clients(seed)
        picks = released(points, seed, mispaired=True)
        labels = {
            client: cluster(own, SELECTION.clustering).labels for client, own in points.items()
        }
        noise += sum(labels[client][place] == -1 for client, place in picks)
        twice += len(picks) - len(set(picks))
    assert noise > 0
    assert twice > 0
    assert all(chosen.cluster >= 0 for chosen in coreset(points, SELECTION, seed=0))


def test_both_together_are_a_random_choice_that_is_called_a_coreset() -> None:
    share, cover = cost(lambda points, seed: released(points, seed, shuffled=True, mispaired=True))
    drawn_share, drawn_cover = cost(drawn)
    assert share <= drawn_share + 0.05
    assert cover <= drawn_cover + 0.1


def drawn(points: dict[str, Points], seed: int) -> Picks:
    """As many examples as are intended, from all."""
    everything = [(client, place) for client, own in points.items() for place in range(len(own))]
    rng = np.random.default_rng(seed)
    places = rng.choice(len(everything), len(intended(points)), replace=False)
    return [everything[place] for place in places]
