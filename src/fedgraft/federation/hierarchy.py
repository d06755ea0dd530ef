"""Departments that act alike learn from each other: clusters over adapters, and mixing in them.

    organisation
    ├── cluster        departments whose changes of the model point the same way
    │   ├── hr         own + share (mean of the cluster - own)     each department keeps its adapter
    │   │   ├── hr-1   what it trains from its department's        each client its personal one
    │   │   └── hr-2
    │   └── finance    own + share (mean of the cluster - own)
    └── cluster
        └── engineering                                            alone: it stays as it is

A share of 0 is departments that do not know each other, a share of 1 with one cluster is one
adapter for the whole organisation, weighted as if it were one group; all between is personal to a
department and still draws on the others.

How alike two adapters are is the cosine of what they do to the model: of the changes B A of all
layers as one vector. The factors themselves would not do. (B R^-1)(R A) is the same change for any
R; and all departments start from one random A, which alone makes their A alike. The inner product
needs no matrix of a layer's shape: <B A, B' A'> is the sum of (B^T B') * (A A'^T), r x r' numbers
each. alpha is one factor on an adapter, and no matter to a cosine.

Clusters are by average linkage (Sokal and Michener 1958): those two are joined first whose members
are most alike on average, until no two reach the threshold, or so many are left. Clustered
federated learning (Sattler et al., arXiv 1910.01991) splits clients by the cosine of their updates
likewise, in two, from the top. Here departments are known, and few, so that joining them from
below costs nothing.

Factors are mixed as FedAvg mixes them, A with A and B with B, which has its error of FedAvg and
means something only where departments began from one adapter. With `ffa`, whose A is the same for
all, mixing factors is mixing changes, exactly. Not for `fedsa`, whose B the server has not; `flora`
and `fedex`, which moved the base's weights besides; `flexlora`, whose factors are a decomposition
of each department's own, with signs and directions that mean nothing to another.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedgraft.errors import FederationError
from fedgraft.federation.update import Tensors, modules, named
from fedgraft.weights.arithmetic import Floats

Clusters = tuple[tuple[str, ...], ...]
"""Departments that are alike, each department once; by name."""
Wide = NDArray[np.float64]


class Mixing(BaseModel):
    """How far each department moves towards those that are like it, after every round."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(gt=0, le=1)
    """0 would be its own adapter, 1 is the cluster's mean."""
    threshold: float | None = Field(default=None, ge=-1, le=1)
    """Mean cosine that two clusters must have to be joined."""
    num_clusters: int | None = Field(default=None, ge=1)
    """So many clusters; 1 is the whole organisation."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "Mixing":
        if (self.threshold is None) == (self.num_clusters is None):
            found = "neither" if self.threshold is None else "both"
            raise ValueError(
                f"expected either threshold or num_clusters, found {found}; give num_clusters: 1 "
                "to mix all departments, or threshold: 0.2 to mix those that are alike"
            )
        return self


def mix(
    adapters: Mapping[str, Tensors], weights: Mapping[str, float], mixing: Mixing
) -> tuple[dict[str, dict[str, Floats]], Clusters]:
    """Return the departments' next adapters, and the clusters that they were mixed in.

    Args:
        adapters: Department -> its adapter, both factors.
        weights: Department -> examples of its clients.

    Of fewer departments than clusters, as where some have no adapter in a round, each is alone.

    Raises FederationError as `similarities`, `clustered` and `mixed` do.
    """
    found = clustered(
        sorted(adapters),
        similarities(adapters),
        threshold=mixing.threshold,
        num_clusters=mixing.num_clusters and min(mixing.num_clusters, len(adapters)),
    )
    return mixed(adapters, weights, mixing.share, found), found


def similarities(adapters: Mapping[str, Tensors]) -> Wide:
    """Return [c, c]: cosines of the changes that departments' adapters make, by sorted name.

    Ranks may differ. A fresh adapter changes nothing and is like none but itself.

    Raises FederationError where there is no department, or their layers differ.
    """
    names = sorted(adapters)
    _check_alike(adapters, names)
    products = np.zeros((len(names), len(names)))
    for module in modules(adapters[names[0]]):
        a, b = (
            [adapters[name][named(module, factor)].astype(np.float64) for name in names]
            for factor in ("A", "B")
        )
        starts = np.cumsum([0, *map(len, a)])[:-1]
        stacked_a, stacked_b = np.vstack(a), np.hstack(b)
        both = (stacked_a @ stacked_a.T) * (stacked_b.T @ stacked_b)
        products += np.add.reduceat(np.add.reduceat(both, starts, axis=0), starts, axis=1)
    norms = np.sqrt(np.diag(products))
    norms[norms == 0] = 1.0
    cosines: Wide = np.clip(products / np.outer(norms, norms), -1, 1)
    np.fill_diagonal(cosines, 1.0)
    return cosines


def clustered(
    names: Sequence[str],
    cosines: Wide,
    *,
    threshold: float | None = None,
    num_clusters: int | None = None,
) -> Clusters:
    """Join departments by average linkage, until no two clusters reach the threshold.

    Args:
        names: Of rows and columns of `cosines`, [c, c].
        threshold: Mean cosine of two clusters' members; any where None.
        num_clusters: Clusters to stop at; 1 where None.

    Of equal pairs the first by name is joined.

    Raises FederationError for more clusters than departments.
    """
    least = num_clusters or 1
    if least > len(names):
        raise FederationError(
            f"expected at most {len(names)} clusters of {', '.join(names)}, found {least}; ask for "
            "fewer, or leave mixing out: each department then has its own adapter"
        )
    groups = [[place] for place in sorted(range(len(names)), key=names.__getitem__)]
    while len(groups) > least:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i + 1, len(groups))]
        linkage = [float(cosines[np.ix_(groups[i], groups[j])].mean()) for i, j in pairs]
        best = int(np.argmax(linkage))
        if threshold is not None and linkage[best] < threshold:
            break
        i, j = pairs[best]
        groups[i] += groups.pop(j)
    return tuple(sorted(tuple(sorted(names[place] for place in group)) for group in groups))


def mixed(
    adapters: Mapping[str, Tensors],
    weights: Mapping[str, float],
    share: float,
    clusters: Collection[Collection[str]],
) -> dict[str, dict[str, Floats]]:
    """Return own + share (mean of the cluster - own) for each department.

    Args:
        weights: Department -> its weight in its cluster's mean, above zero.
        share: 0 changes nothing and 1 gives the mean, to the bit.

    Raises FederationError for a share or a weight that is none, for clusters that do not hold each
    department once, and for adapters of other tensors or shapes in a cluster.
    """
    if not 0 <= share <= 1:
        raise FederationError(
            f"expected a share from 0 (its own) to 1 (the cluster's mean), found {share}; choose "
            "one between"
        )
    members = sorted(name for cluster in clusters for name in cluster)
    if members != sorted(adapters):
        raise FederationError(
            f"expected clusters of {', '.join(sorted(adapters))}, each once, found "
            f"{', '.join(members) or 'none'}; cluster the adapters that are mixed"
        )
    found = {name: dict(tensors) for name, tensors in adapters.items()}
    for cluster in map(sorted, clusters):
        if len(cluster) == 1 or share == 0:
            continue
        _check_alike(adapters, cluster, shapes=True)
        parts = _parts(cluster, weights)
        for key in adapters[cluster[0]]:
            own = [adapters[name][key].astype(np.float64) for name in cluster]
            mean = sum(part * one for part, one in zip(parts, own, strict=True))
            for name, one in zip(cluster, own, strict=True):
                found[name][key] = ((1 - share) * one + share * mean).astype(np.float32)
    return found


def _parts(cluster: Sequence[str], weights: Mapping[str, float]) -> list[float]:
    """Weights that add up to 1."""
    for name in cluster:
        if not 0 < weights.get(name, 0) < float("inf"):
            raise FederationError(
                f"expected a weight above zero for the department {name!r}, found "
                f"{weights.get(name, 'none')}; give the examples of its clients"
            )
    total = sum(weights[name] for name in cluster)
    return [weights[name] / total for name in cluster]


def _check_alike(
    adapters: Mapping[str, Tensors], names: Sequence[str], *, shapes: bool = False
) -> None:
    """Refuse adapters whose tensors differ from the first one's: by name, or by shape too."""
    if not names:
        raise FederationError(
            "expected the adapter of at least one department, found none; name departments"
        )
    first = adapters[names[0]]
    for name in names[1:]:
        if other := sorted(first.keys() ^ adapters[name].keys()):
            raise FederationError(
                f"department {name!r}: expected the tensors of {names[0]!r}, found {other[0]!r} in "
                "one of them alone; give departments adapters of the same layers"
            )
        for key in sorted(first):
            one, another = first[key].shape, adapters[name][key].shape
            side = slice(None) if shapes else slice(1, None) if ".lora_A." in key else slice(0, 1)
            if one[side] != another[side]:
                raise FederationError(
                    f"department {name!r}: expected {key!r} of shape {list(one)} as in "
                    f"{names[0]!r}, found {list(another)}; give departments adapters of one size"
                )
