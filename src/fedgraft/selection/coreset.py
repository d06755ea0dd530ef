"""Which examples deserve training: clients tell of clusters, the server says how many of which.

    client a    o o   o     points --grouped--> clusters --tell--> centroids, counts ─┐
                 +    + o                                                             │
    client b     + o                                                                  v
                o           server: clusters of centroids, and each one's share    choose
                                                                                      │
    both        (o)   o     how many of each of its own clusters <────────────────────┘
                      +(o)  --take--> places of its examples, which stay there

FedHDS (arXiv 2410.10926) finds what is alike twice: HDBSCAN in each client, then of all centroids
at the server. Of each server cluster the centroid nearest to its centre is kept, and that client
trains on its one example nearest to that centroid (`Selection.paper`, `budget: null`).

With a budget, round(budget * all examples) are chosen, one at least, wherever clusters hold as
many. Server clusters share them out in proportion to the examples they stand for, and each shares
its part out to its clients' clusters: first one to the centroid nearest to its centre, as in the
paper, the others by size. No cluster gives more than it has; what it cannot give goes to others.

So a larger budget never takes an example away from a cluster (shares.py). Ties go to the nearer to
the centre, then to the client first by name.

In a client's cluster, one example is the one nearest to the centroid. Several are spread so that
all of the cluster are on average near to one of them (`facility_location`, weighted by membership):
the furthest points first, the other way to spread, are its outliers.

    method       groups that the budget is shared out to        example
    all          -                                              every one; no budget (FedIT)
    random       clients                                        drawn
    local        clients; without a budget every own cluster    as above
    points       clusters of all examples' points               that point
    federated    clusters of all clients' centroids             as above

`points` shows the server a point of each example, so it is for studies: a client refuses to tell.

Letters: c clients, n examples, k clusters of a client, d dimensions. Everything is decided by the
seed, the clients' names and the points: neither the order of clients nor that of a client's
examples counts (`random` draws places, so there it does). Where nothing is clustered, or a client
has no example, nothing is chosen from it; where that is so of all, the choice is empty, and
whoever trains keeps the adapter as it was.

How this differs from the released code: features and places are of the same examples, and a
cluster's number is never taken for an example's (tests/selection/test_released_code.py shows what
either costs); an empty choice trains nobody, where there it zeroes the adapter; one centroid alone
is noise to HDBSCAN and so not chosen, where there it raises.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from fedgraft.errors import SelectionError
from fedgraft.provenance import derive_seed
from fedgraft.selection.clusters import (
    NOISE,
    Clustering,
    Clusters,
    cells,
    cluster,
    facility_location,
    k_centre,
)
from fedgraft.selection.features import Encoding
from fedgraft.selection.privacy import CentroidPrivacy, noisy_centroids, squashed
from fedgraft.selection.projection import Points, Projection
from fedgraft.selection.shares import highest_averages

Indices = NDArray[np.int64]
Method = Literal["all", "random", "local", "points", "federated"]
SETTINGS: Mapping[Method, tuple[str, ...]] = {
    "all": (),
    "random": ("budget", "repeat"),
    "local": ("encoding", "projection", "clustering", "budget", "repeat", "quality"),
    "points": ("encoding", "projection", "clustering", "server", "budget", "repeat"),
    "federated": (
        *("encoding", "projection", "clustering", "server", "server_clustering"),
        *("budget", "repeat", "quality", "privacy", "paper_noise"),
    ),
}
"""What each method asks for, beside `every_round`."""
UNMET: frozenset[Method] = frozenset({"all", "random", "local"})
"""Methods in which clients' clusters are not compared, so that counts alone are told."""
DENSE = Clustering(min_cluster_size=2, min_samples=1)
"""Two points are a cluster where no other is nearer."""
RIM = 1e-3
"""What a point of strength 0 counts for when a cluster's examples are spread over it."""


class Selection(BaseModel):
    """How a federation chooses its coreset, as a federation file says it; see the head of the file.

    What is left out is what found topics best (benchmarks/alignment.py) of what drops examples that
    lie alone, not what the paper has: clusters of clients of some hundred examples are small.

    Raises SelectionError for a number out of its range, and for a setting that the method, or
    another setting, has no use for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = "federated"
    encoding: Encoding = Encoding(pooling="mean")
    projection: Projection = Projection(num_dimensions=64)
    clustering: Clustering = DENSE
    """Of a client's points; with the method `points`, of all points at the server."""
    server: Literal["hdbscan", "k_centre", "facility_location"] = "hdbscan"
    """How centroids become server clusters. The latter two choose as many centroids as the budget
    has examples, so that the others are near to one of them; each then gets one at least."""
    server_clustering: Clustering = DENSE
    """Of centroids, where the server is hdbscan. What is noise there is not chosen from, unless it
    says noise: singletons."""
    budget: float | None = None
    """Share of all clients' examples; None: one example for each server cluster (the paper)."""
    every_round: bool = True
    """Choose anew in each round (the paper), or once."""
    repeat: bool | None = None
    """Whether an example may be chosen again (the paper). Else those are passed over that were
    trained on more often, as long as others of the client are enough for a cluster: an aligned map
    finds the same clusters in each round, and would choose the same examples. None: passed over
    wherever that can be, see `repeats`."""
    quality: float = 0.0
    """Share of the examples of each cluster, the worst by answer gain, that are passed over;
    rounded down to whole examples."""
    privacy: CentroidPrivacy | None = None
    """Cells in place of clusters, and noise on what is told of them."""
    paper_noise: float | None = None
    """The paper's: centroids pass through tanh and get noise of this deviation."""

    @classmethod
    def paper(cls, min_cluster_size: int) -> "Selection":
        """FedHDS as its authors ran it: 5 for Natural Instructions, 2 for Dolly."""
        return cls(
            encoding=Encoding(layers="all", pooling="last"),
            projection=Projection(name="tsne", num_dimensions=2, scaling="none"),
            clustering=Clustering(min_cluster_size=min_cluster_size),
            server_clustering=Clustering(min_cluster_size=2),
            repeat=True,
        )

    def model_post_init(self, _: object) -> None:
        if self.budget is not None and not 0 < self.budget <= 1:
            raise SelectionError(
                f"expected a budget above 0 and up to 1, a share of all examples, found "
                f"{self.budget}; 0.01 is one in a hundred"
            )
        if not 0 <= self.quality < 1:
            raise SelectionError(
                f"expected a quality from 0 to below 1, the share that is passed over, found "
                f"{self.quality}; 0.2 leaves out the worst fifth"
            )
        if self.paper_noise is not None and not 0 <= self.paper_noise < math.inf:
            raise SelectionError(
                f"expected a finite paper_noise of at least 0, found {self.paper_noise}; leave it "
                "out for centroids as they are"
            )
        asked = SETTINGS[self.method]
        for what in SETTINGS["federated"]:
            if what not in asked and getattr(self, what) != type(self).model_fields[what].default:
                raise SelectionError(
                    f"expected no {what} for the method {self.method}, which asks for "
                    f"{', '.join(asked) or 'nothing'}, found {getattr(self, what)!r}; leave it out "
                    "or choose another method"
                )
        if self.budget is None and (self.method == "random" or self.server != "hdbscan"):
            whose = "random" if self.method == "random" else self.server
            raise SelectionError(
                f"expected a budget, as {whose} finds no number of examples by itself, found none; "
                "give one, such as budget: 0.01"
            )
        usual = type(self).model_fields["server_clustering"].default
        if self.server != "hdbscan" and self.server_clustering != usual:
            raise SelectionError(
                f"expected no server_clustering with {self.server}, which covers centroids and "
                f"looks for no clusters, found {self.server_clustering!r}; leave it out, or say "
                "server: hdbscan"
            )
        if self.repeat is False and not self.every_round:
            raise SelectionError(
                "expected every_round: true with repeat: false, as what is chosen once is trained "
                "on in each round, found false; leave one of them out"
            )
        if self.privacy:
            self._check_private()

    def _check_private(self) -> None:
        if not self.projection.aligned:
            raise SelectionError(
                "expected a projection of which each point depends on its own example alone, as "
                f"privacy needs, found {self.projection.name!r}; take random, anchors or nystroem"
            )
        if self.paper_noise is not None:
            raise SelectionError(
                "expected either privacy or paper_noise, found both; leave paper_noise out"
            )
        if self.clustering != type(self).model_fields["clustering"].default:
            raise SelectionError(
                "expected no clustering with privacy, which has cells in place of clusters, found "
                f"{self.clustering!r}; leave it out"
            )
        if self.repeat is False:
            raise SelectionError(
                "expected no repeat: false with privacy: what was chosen before would show in what "
                "is told, and one example can change that for many others; leave it out"
            )

    @property
    def repeats(self) -> bool:
        """Whether an example may be chosen again: as `repeat` says; where it says nothing, where
        it has to be, as all are taken, the choice is made once, or it is private."""
        if self.repeat is None:
            return self.method == "all" or not self.every_round or self.privacy is not None
        return self.repeat

    def num_exchanges(self, num_rounds: int) -> int:
        """How often a client tells of its points in so many rounds."""
        return num_rounds if self.every_round else min(1, num_rounds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a client tells of its points."""

    centroids: NDArray[np.float32]
    """[k, d]"""
    counts: Indices
    """[k], examples of each cluster; 0 is one that is not told (privacy)."""
    num_examples: int
    """In all, noise included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """One example of a coreset, and why it is in it."""

    client: str
    index: int
    """Its place among the client's examples."""
    cluster: int
    """Of the client's clusters; with privacy the cell."""
    cluster_size: int
    server_cluster: int
    """Which of the groups that the budget was shared out to."""
    distance: float
    """From its point to the centroid of its cluster."""


# ── at the client ────────────────────────────────────────────────────────────────────────────────


def grouped(points: Points, selection: Selection, *, centres: Points | None = None) -> Clusters:
    """Find the clusters that a client tells of: of its points, [n, d]; of no other client's.

    For `all` and `random` that is one of all examples, where points may have d = 0.

    Args:
        centres: Of cells, [m, d], which the server broadcasts with `privacy`.

    Raises SelectionError where privacy has no centres, NonFiniteError for NaN or Inf.
    """
    n = len(points)
    match selection.method:
        case "all" | "random":
            k = min(1, n)
            return Clusters(
                labels=np.zeros(n, np.int64),
                strengths=np.ones(n, np.float32),
                centroids=points.mean(axis=0, keepdims=True) if n else points,
                counts=np.full(k, n),
                cells=np.arange(k),
            )
        case "points":
            return Clusters(
                labels=np.arange(n),
                strengths=np.ones(n, np.float32),
                centroids=points.astype(np.float32),
                counts=np.ones(n, np.int64),
                cells=np.arange(n),
            )
        case _ if selection.privacy:
            return cells(points, _needed(centres, selection.privacy))
        case _:
            return cluster(points, selection.clustering)


def tell(
    clusters: Clusters,
    points: Points,
    selection: Selection,
    *,
    seed: int,
    centres: Points | None = None,
    num_exchanges: int = 1,
) -> Summary:
    """Say of a client's clusters what may leave it.

    With `privacy`, each call spends, and all cells are told of, also by a client without examples.

    Args:
        clusters: From `grouped`.
        seed: Of this client in this exchange, for noise that is to be repeatable or the paper's.
        num_exchanges: Planned in all, which the noise of `privacy` is chosen for.

    Raises as `privacy.noisy_centroids` does.
    """
    if privacy := selection.privacy:
        centroids, counts, num_examples = noisy_centroids(
            points,
            _needed(centres, privacy),
            privacy,
            num_exchanges=num_exchanges,
            seed=derive_seed(seed, "centroids"),
        )
        return Summary(centroids=centroids, counts=counts, num_examples=num_examples)
    centroids = clusters.centroids
    if selection.method in UNMET:
        centroids = centroids[:, :0]
    if selection.paper_noise is not None:
        draw = np.random.default_rng(derive_seed(seed, "paper noise")).bytes
        centroids = squashed(centroids, selection.paper_noise, draw)
    return Summary(centroids=centroids, counts=clusters.counts, num_examples=len(points))


def take(
    clusters: Clusters,
    points: Points,
    counts: Indices,
    selection: Selection,
    *,
    seed: int,
    gains: NDArray[np.floating] | None = None,
    times: Indices | None = None,
) -> Indices:
    """Choose what the server asked for: places of the client's examples, rising.

    With `privacy` the server asks by noisy counts, so where a cell has fewer, all of it is taken.

    Args:
        counts: From `choose`, [k]; with `privacy` one for each cell.
        seed: Of this client in this exchange; `random` draws by it.
        gains: Of each answer, [n], where the selection has a `quality`.
        times: How often each was chosen before, [n]: `random` draws from the least often first.

    Raises as `pick` does.
    """
    counts = np.asarray(counts)
    if selection.privacy:
        if len(counts) != selection.privacy.num_cells:
            raise SelectionError(
                f"expected a number for each of {selection.privacy.num_cells} cells, found "
                f"{len(counts)}; ask again"
            )
        counts = np.minimum(counts[clusters.cells], _eligible(clusters.counts, selection.quality))
    if selection.method == "random":
        _check_asked(clusters, counts, 0.0)
        chance = np.random.default_rng(derive_seed(seed, "random examples"))
        n, count = len(clusters.labels), int(counts.sum())
        if times is None:
            return np.sort(chance.choice(n, count, replace=False))
        drawn = chance.permutation(n)
        return np.sort(drawn[np.argsort(times[drawn], kind="stable")][:count])
    return pick(clusters, points, counts, gains=gains, quality=selection.quality)


def pick(
    clusters: Clusters,
    points: Points,
    counts: Indices,
    *,
    gains: NDArray[np.floating] | None = None,
    quality: float = 0.0,
) -> Indices:
    """Choose so many examples of each cluster: places among the points, rising.

    Of one cluster, one is the nearest to its centroid, and several are spread over it; see the
    head of this file. Equal distances go to the first by coordinates, of equal points to the first.

    Args:
        counts: [k], how many of each cluster.
        gains: [n], finite: what the instruction lessens of the answer's loss. Of each cluster the
            share `quality` with the least gain is passed over, of equal gains the further from the
            centroid.

    Raises SelectionError for more than a cluster has left, and for gains that are missing, of
    another length, not finite, or given without a quality.
    """
    counts = np.asarray(counts)
    _check_asked(clusters, counts, quality)
    _check_gains(gains, quality, len(points))
    chosen: list[Indices] = []
    for number in np.flatnonzero(counts):
        (members,) = np.nonzero(clusters.labels == number)
        rows = points[members].astype(np.float64)
        apart = np.linalg.norm(rows - clusters.centroids[number], axis=1)
        order = np.lexsort((*rows.T[::-1], apart))  # nearest first
        if gains is not None:
            worth = order[np.argsort(-gains[members][order], kind="stable")]
            kept = worth[: _eligible(np.array([len(members)]), quality)[0]]
            order = order[np.isin(order, kept)]
        chosen.append(_spread(points, members[order], int(counts[number]), clusters.strengths))
    return np.sort(np.concatenate([np.empty(0, np.int64), *chosen]))


def _spread(
    points: Points, order: Indices, count: int, strengths: NDArray[np.float32] | None = None
) -> Indices:
    """Some of the points at `order`, nearest to their centre first: that one, or several spread."""
    if count in (1, len(order)):
        return order[:count]
    weights = None if strengths is None else np.maximum(strengths[order], RIM)
    return order[facility_location(points[order], count, weights=weights)]


# ── at the server ────────────────────────────────────────────────────────────────────────────────


def choose(
    summaries: Mapping[str, Summary], selection: Selection, *, seed: int
) -> dict[str, Indices]:
    """Say how many examples of each of its clusters a client takes: [k] for each client, by name.

    Zero everywhere where nothing is clustered.

    Args:
        seed: Of this exchange; where shares of `random` and `local` tie, it decides.

    Raises SelectionError, by the client's name, for a summary as `check` refuses it, and for one of
    another dimension than most have.
    """
    asked, _ = _choose(summaries, selection, seed)
    return asked


def check(
    client: str,
    summary: Summary,
    *,
    num_dimensions: int | None = None,
    max_examples: int | None = None,
) -> None:
    """Refuse what no client can have told, or no other client's can be compared with.

    `choose` does so by itself, and stops. A server that goes on without such a client calls this
    first, with the most examples that it believes anybody has: a claim is a part of the budget.

    Raises SelectionError for centroids that are not [k, d], not finite or of another dimension, for
    counts that are not [k] whole numbers from 0 on, or more than there are examples, and for more
    examples than are believed.
    """
    centroids, counts = summary.centroids, summary.counts
    ask = "leave this client out of the choice, or ask it again"
    if centroids.ndim != 2 or counts.shape != centroids.shape[:1]:
        raise SelectionError(
            f"client {client!r}: expected centroids [k, d] and counts [k], found "
            f"{list(centroids.shape)} and {list(counts.shape)}; {ask}"
        )
    if num_dimensions is not None and len(counts) and centroids.shape[1] != num_dimensions:
        raise SelectionError(
            f"client {client!r}: expected centroids of {num_dimensions} dimensions, found "
            f"{centroids.shape[1]}; give all clients one projection, and {ask}"
        )
    sound = np.isfinite(centroids).all(axis=1)
    if not sound.all():
        raise SelectionError(
            f"client {client!r}: expected finite centroids, found NaN or Inf in that of cluster "
            f"{int(np.argmin(sound))}; {ask}"
        )
    total = int(counts.sum()) if len(counts) else 0
    if counts.dtype.kind not in "iu" or counts.min(initial=0) < 0 or total > summary.num_examples:
        raise SelectionError(
            f"client {client!r}: expected whole counts from 0 on that add up to at most its "
            f"{summary.num_examples} examples, found {counts.tolist()[:8]} of type {counts.dtype}, "
            f"in all {total}; {ask}"
        )
    if max_examples is not None and summary.num_examples > max_examples:
        raise SelectionError(
            f"client {client!r}: expected at most {max_examples} examples, found "
            f"{summary.num_examples}; raise the most that is believed, or {ask}"
        )


@dataclass(frozen=True, slots=True)
class _Rows:
    """All clusters of all clients that are told of, in the order of their names."""

    clients: tuple[str, ...]
    owners: Indices
    """[r], whose each is, by place in `clients`."""
    numbers: Indices
    """[r], the client's number of it."""
    centroids: NDArray[np.float32]
    counts: Indices


def _choose(
    summaries: Mapping[str, Summary], selection: Selection, seed: int
) -> tuple[dict[str, Indices], dict[str, Indices]]:
    """How many examples of each cluster, and the group at the server that each cluster is in."""
    rows = _rows(summaries)
    num_examples = sum(summary.num_examples for summary in summaries.values())
    room = _eligible(rows.counts, selection.quality)
    total = None
    if selection.budget is not None:
        total = min(max(1, math.floor(selection.budget * num_examples + 0.5)), int(room.sum()))
    labels, apart = _server_clusters(rows, selection, total)
    if selection.method == "all":
        given = rows.counts
    elif total is not None:
        given = _shared_out(total, rows, room, labels, apart, selection, seed)
    elif selection.method == "local":
        given = np.minimum(room, 1)
    else:
        given = np.zeros(len(room), np.int64)
        for number in range(labels.max(initial=NOISE) + 1):
            (members,) = np.nonzero(labels == number)
            given[members[np.argmin(apart[members])]] = 1
    asked, servers = {}, {}
    for place, client in enumerate(rows.clients):
        own = rows.owners == place
        k = len(summaries[client].counts)
        asked[client], servers[client] = np.zeros(k, np.int64), np.full(k, NOISE, np.int64)
        asked[client][rows.numbers[own]] = given[own]
        servers[client][rows.numbers[own]] = labels[own]
    return asked, servers


def _rows(summaries: Mapping[str, Summary]) -> _Rows:
    clients = tuple(sorted(summaries))
    shapes = [summaries[client].centroids.shape for client in clients]
    widths = Counter(shape[1] for shape in shapes if len(shape) == 2 and shape[0])
    width = max(widths, key=lambda d: (widths[d], d)) if widths else 0
    for client in clients:
        check(client, summaries[client], num_dimensions=width)
    told = [np.flatnonzero(summaries[client].counts) for client in clients]
    return _Rows(
        clients=clients,
        owners=np.repeat(np.arange(len(clients)), [len(numbers) for numbers in told]),
        numbers=np.concatenate([np.empty(0, np.int64), *told]),
        centroids=np.concatenate(
            [
                np.empty((0, width), np.float32),
                *(summaries[c].centroids[n] for c, n in zip(clients, told, strict=True) if len(n)),
            ]
        ),
        counts=np.concatenate(
            [
                np.empty(0, np.int64),
                *(summaries[c].counts[n] for c, n in zip(clients, told, strict=True)),
            ]
        ),
    )


def _server_clusters(
    rows: _Rows, selection: Selection, total: int | None
) -> tuple[Indices, NDArray[np.float64]]:
    """The group of each client's cluster, [r], and how far it is from the group's centre."""
    if selection.method in UNMET:
        return rows.owners, np.zeros(len(rows.owners))
    if selection.server == "hdbscan":
        of_points = selection.method == "points"
        found = cluster(
            rows.centroids, selection.clustering if of_points else selection.server_clustering
        )
        labels, centres = found.labels, found.centroids
    else:
        cover = k_centre if selection.server == "k_centre" else facility_location
        num_centres = min(total or 0, len(rows.counts))
        if not num_centres:
            return np.full(len(rows.counts), NOISE), np.zeros(len(rows.counts))
        spots = rows.centroids[
            cover(rows.centroids, num_centres, weights=rows.counts.astype(np.float64))
        ]
        found = cells(rows.centroids, spots)
        labels, centres = found.labels, spots[found.cells]
    apart = np.zeros(len(labels))
    clustered = labels != NOISE
    apart[clustered] = np.linalg.norm(
        rows.centroids[clustered].astype(np.float64) - centres[labels[clustered]], axis=1
    )
    return labels, apart


def _shared_out(
    total: int,
    rows: _Rows,
    room: Indices,
    labels: Indices,
    apart: NDArray[np.float64],
    selection: Selection,
    seed: int,
) -> Indices:
    """How many examples of each row: first to groups by their size, then in each group."""
    num_groups = int(labels.max(initial=NOISE)) + 1
    clustered = labels != NOISE
    sizes, rooms = (
        np.bincount(labels[clustered], amounts[clustered], num_groups).astype(np.int64)
        for amounts in (rows.counts, room)
    )
    ties = np.arange(num_groups)
    if selection.method in ("random", "local"):
        drawn = [derive_seed(seed, "tie", rows.clients[group]) for group in ties]
        ties = np.argsort(np.argsort(drawn, kind="stable"), kind="stable")
    least = 0 if selection.server == "hdbscan" else 1
    shares = highest_averages(total, sizes, rooms, ties=ties, minimum=np.minimum(rooms, least))
    given = np.zeros(len(room), np.int64)
    for group in np.flatnonzero(shares):
        (members,) = np.nonzero(labels == group)
        order = members[np.argsort(apart[members], kind="stable")]
        share = int(shares[group])
        if selection.method == "points":
            given[_spread(rows.centroids, order, share)] = 1
        else:
            first = np.zeros(len(order), np.int64)
            first[0] = selection.method == "federated"  # the paper's: nearest to the centre
            given[order] = highest_averages(share, rows.counts[order], room[order], minimum=first)
    return given


# ── all at one place ─────────────────────────────────────────────────────────────────────────────


def coreset(
    points: Mapping[str, Points],
    selection: Selection,
    *,
    seed: int,
    gains: Mapping[str, NDArray[np.floating]] | None = None,
    centres: Points | None = None,
    num_exchanges: int = 1,
) -> list[Chosen]:
    """Run the whole choice where all points are: for `fedgraft select`, and for studies.

    The same as `grouped` and `tell` at each client, with `client_seed`, `choose` at a server and
    `take` at each client.

    Args:
        points: Client -> [n, d]. For `all` and `random`, which look at none, d may be 0.
        gains: Client -> [n], where the selection has a `quality`.
        centres, num_exchanges: Of `privacy`.

    Returns:
        The chosen examples, by client and place.

    Raises SelectionError, by the client's name, for points that are not [n, d] or not finite.
    """
    clusters, summaries = {}, {}
    for client in sorted(points):
        _check_points(client, points[client])
        clusters[client] = grouped(points[client], selection, centres=centres)
        summaries[client] = tell(
            clusters[client],
            points[client],
            selection,
            seed=client_seed(seed, client),
            centres=centres,
            num_exchanges=num_exchanges,
        )
    asked, servers = _choose(summaries, selection, seed)
    chosen = []
    for client, counts in asked.items():
        own = clusters[client]
        places = take(
            own,
            points[client],
            counts,
            selection,
            seed=client_seed(seed, client),
            gains=None if gains is None else gains[client],
        )
        for place in places:
            number = int(own.labels[place])
            told_as = int(own.cells[number]) if selection.privacy else number
            apart = points[client][place] - own.centroids[number]
            chosen.append(
                Chosen(
                    client=client,
                    index=int(place),
                    cluster=told_as,
                    cluster_size=int(own.counts[number]),
                    server_cluster=int(servers[client][told_as]),
                    distance=float(np.linalg.norm(apart.astype(np.float64))),
                )
            )
    return chosen


def client_seed(seed: int, client: str) -> int:
    """A client's own seed of an exchange."""
    return derive_seed(seed, "client", client)


def _needed(centres: Points | None, privacy: CentroidPrivacy) -> Points:
    if centres is None or len(centres) != privacy.num_cells:
        found = "none" if centres is None else len(centres)
        raise SelectionError(
            f"expected the centres of {privacy.num_cells} cells, which the server broadcasts for "
            f"privacy, found {found}; make them with `privacy.centres` from its own texts"
        )
    return centres


def _eligible(counts: Indices, quality: float) -> Indices:
    """How many examples of each cluster are left when the worst are passed over."""
    left: Indices = counts - np.floor(quality * counts).astype(np.int64)
    return left


def _check_asked(clusters: Clusters, counts: Indices, quality: float) -> None:
    """Raise SelectionError for a number of examples that a cluster has not."""
    if counts.shape != clusters.counts.shape or counts.dtype.kind not in "iu":
        raise SelectionError(
            f"expected a whole number for each of {len(clusters.counts)} clusters, found "
            f"{list(counts.shape)} of type {counts.dtype}; the points may have changed since they "
            "were told of: tell of them again"
        )
    left = _eligible(clusters.counts, quality)
    wrong = np.flatnonzero((counts < 0) | (counts > left))
    if len(wrong):
        number = int(wrong[0])
        raise SelectionError(
            f"cluster {number}: expected to be asked for at most {left[number]} of its "
            f"{clusters.counts[number]} examples, found {counts[number]}; the points may have "
            "changed since they were told of: tell of them again"
        )


def _check_gains(gains: NDArray[np.floating] | None, quality: float, num_examples: int) -> None:
    if (gains is None) != (quality == 0):
        found = "none" if gains is None else "some without a quality"
        raise SelectionError(
            f"expected gains of the answers together with a quality above 0, found {found}; give "
            "both, or neither"
        )
    if gains is not None and (gains.shape != (num_examples,) or not np.isfinite(gains).all()):
        raise SelectionError(
            f"expected a finite gain for each of {num_examples} examples, found "
            f"{list(gains.shape)} or NaN or Inf among them; compute them of these examples"
        )


def _check_points(client: str, points: Points) -> None:
    if points.ndim != 2:
        raise SelectionError(
            f"client {client!r}: expected points [n, d], found {list(points.shape)}; project its "
            "features"
        )
    sound = np.isfinite(points).all(axis=1)
    if not sound.all():
        raise SelectionError(
            f"client {client!r}: expected finite points, found NaN or Inf in that of example "
            f"{int(np.argmin(sound))}; leave it out, or compute its features again"
        )
