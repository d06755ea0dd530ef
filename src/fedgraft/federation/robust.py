"""Aggregation that a few hostile clients cannot move far; FedAvg follows whoever shouts loudest.

    trimmed_mean   of each number, the mean without the k largest and k smallest   arXiv 1803.01498
    median         of each number                                                  arXiv 1803.01498
    krum           the clients that lie nearest to their neighbours; then any rule arXiv 1703.02757
    clipped        every client, its change cut to a length; then any rule         arXiv 1911.07963

The first three count every client once: a weight is what a hostile client says of itself. The rules
that follow `krum` and `clipped` do use weights, which `check` bounds.

Numbers of A and B are compared as they stand, as Flower 1.41 compares them: clients start a round
from one adapter, so that the same number means the same. Clients that keep a B of their own
(FedSA-LoRA) are compared by what they send, A.

How this differs from Flower: a number of clients is said, not a share that is rounded down; Krum is
refused for fewer than 2 k + 3 clients, where Flower's goes on without its guarantee; a client's
distance to itself is left out as such, not as whichever sorts first; median and trimmed mean take
one tensor of all clients at a time.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedgraft.errors import FederationError
from fedgraft.federation.aggregate import Layer
from fedgraft.federation.update import Tensors, Update, modules, ordered
from fedgraft.weights.arithmetic import Floats

Stack = NDArray[np.float32]
"""One tensor of all clients, [c, ...]."""


def trimmed_mean(updates: Iterable[Update], num_trimmed: int) -> Iterator[Layer]:
    """Yield layers of A and B whose numbers are means of what trimming leaves, unweighted.

    With at most `num_trimmed` hostile clients each number lies between those of honest ones.

    Raises FederationError where nothing would be left, and for updates of several sizes.
    """
    found = of_one_size(updates)
    most = (len(found) - 1) // 2
    if not 0 <= num_trimmed <= most:
        raise FederationError(
            f"expected at most {most} of {len(found)} updates to be trimmed at each end, found "
            f"{num_trimmed}; trim fewer, or wait for at least {2 * num_trimmed + 1} clients"
        )

    def mean(stack: Stack) -> NDArray[np.float64]:
        kept = np.sort(stack, axis=0)[num_trimmed : len(stack) - num_trimmed]
        result: NDArray[np.float64] = kept.mean(axis=0, dtype=np.float64)
        return result

    return _by_number(found, mean)


def median(updates: Iterable[Update]) -> Iterator[Layer]:
    """Yield layers of A and B whose numbers are medians, unweighted.

    With fewer than half of the clients hostile each number lies between those of honest ones.

    Raises FederationError for updates of several sizes.
    """
    return _by_number(of_one_size(updates), lambda stack: np.median(stack, axis=0))


def krum(updates: Iterable[Update], num_hostile: int, num_kept: int = 1) -> list[Update]:
    """Return the updates with the least sum of squared distances to their c - k - 2 nearest.

    One is Krum, more are Multi-Krum; the rule of choice aggregates them. Of equal sums the first
    client's counts. Distances come from inner products in float64, so a norm 1e7 times the others'
    would blur theirs: refuse it before (`Template.max_norm`).

    Raises FederationError for fewer than 2 k + 3 clients, for more to keep than are honest, and for
    updates of several sizes.
    """
    found = of_one_size(updates)
    if num_hostile < 0 or len(found) < 2 * num_hostile + 3:
        raise FederationError(
            f"expected at least {2 * num_hostile + 3} updates to tell {num_hostile} hostile ones "
            f"by their distances, found {len(found)}; wait for more clients, or take median"
        )
    if not 1 <= num_kept <= len(found) - num_hostile:
        raise FederationError(
            f"expected from 1 to {len(found) - num_hostile} updates to be kept, found {num_kept}; "
            f"of {len(found)} with {num_hostile} hostile no more can be trusted"
        )
    distances = _squared_distances(found)
    np.fill_diagonal(distances, math.inf)
    nearest = np.sort(distances, axis=1)[:, : len(found) - num_hostile - 2]
    chosen = np.argsort(nearest.sum(axis=1), kind="stable")[:num_kept]
    return [found[i] for i in sorted(chosen)]


def clipped(
    updates: Iterable[Update], max_norm: float | None = None, start: Tensors | None = None
) -> list[Update]:
    """Return the updates, those that moved further than `max_norm` moved back along their line.

    Args:
        max_norm: The Euclidean norm of all of an update's numbers, less those of `start`; the
            median of the clients' norms where None.
        start: The adapter that the round began with; zeros where None, as for updates of several
            ranks.

    A tensor that is moved is computed when it is asked for. Ranks may differ if `start` is None.

    Raises FederationError for a norm that is not above zero, and a `start` of other tensors.
    """
    found = ordered(updates)
    if max_norm is not None and not 0 < max_norm < math.inf:
        raise FederationError(
            f"expected a norm above zero to clip to, found {max_norm}; leave it out to clip to "
            "the median of the clients' norms"
        )
    if start is not None:
        check_start(found, start)
    norms = [distance_moved(update.tensors, start) for update in found]
    bound = float(np.median(norms)) if max_norm is None else max_norm
    return [
        update
        if norm <= bound
        else replace(update, tensors=_Shortened(update.tensors, start, bound / norm))
        for update, norm in zip(found, norms, strict=True)
    ]


class _Shortened(Mapping[str, Floats]):
    """Tensors on the line from a start to a client's: start + share (tensor - start)."""

    def __init__(self, tensors: Tensors, start: Tensors | None, share: float) -> None:
        self._tensors, self._start, self._share = tensors, start, share

    def __getitem__(self, name: str) -> Floats:
        tensor = self._share * moved(name, self._tensors, self._start)
        if self._start is not None:
            tensor += self._start[name]
        return tensor.astype(np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def moved(name: str, tensors: Tensors, start: Tensors | None) -> NDArray[np.float64]:
    """What became of one tensor, less what it was; a `start` of None is zero."""
    change = tensors[name].astype(np.float64)
    if start is not None:
        change -= start[name]
    return change


def distance_moved(tensors: Tensors, start: Tensors | None) -> float:
    """The Euclidean norm of all numbers, less those of `start`; `start` may have more tensors."""
    return math.sqrt(
        math.fsum(float(np.square(moved(name, tensors, start)).sum()) for name in sorted(tensors))
    )


def _by_number(
    updates: Sequence[Update], reduced: Callable[[Stack], NDArray[np.floating]]
) -> Iterator[Layer]:
    size, names = updates[0].size, sorted(updates[0].tensors)
    for module in modules(names):
        tensors = {
            name: reduced(np.stack([update.tensors[name] for update in updates])).astype(np.float32)
            for name in names
            if name.startswith(f"{module}.lora_")
        }
        yield Layer(module=module, adapters={size: tensors})


def _squared_distances(updates: Sequence[Update]) -> NDArray[np.float64]:
    """Return [c, c], from |a|^2 + |b|^2 - 2 ab of numbers less their mean, tensor by tensor."""
    products = np.zeros((len(updates), len(updates)))
    for name in sorted(updates[0].tensors):
        rows = np.stack([update.tensors[name].ravel() for update in updates], dtype=np.float64)
        rows -= rows.mean(axis=0)
        products += rows @ rows.T
    squares = np.diag(products)
    return np.maximum(squares[:, None] + squares - 2 * products, 0.0)


def check_start(updates: Iterable[Update], start: Tensors) -> None:
    """Raise FederationError for a tensor of an update that `start` has not, or of another shape."""
    for update in updates:
        for name, tensor in update.tensors.items():
            if name not in start or start[name].shape != tensor.shape:
                have = list(start[name].shape) if name in start else "none"
                raise FederationError(
                    f"client {update.client!r}: expected {name!r} of the adapter that the round "
                    f"began with, {list(tensor.shape)}, found {have}; give that adapter"
                )


def of_one_size(updates: Iterable[Update]) -> list[Update]:
    """Sort updates by client. Raises FederationError where their sizes or tensors differ."""
    found = ordered(updates)
    for update in found[1:]:
        if (update.size, set(update.tensors)) != (found[0].size, set(found[0].tensors)):
            raise FederationError(
                f"client {update.client!r}: expected the tensors of {found[0].client!r}, an "
                f"adapter of {found[0].size}, found {update.size}; numbers of other adapters "
                "cannot be compared, so give clients one size, or clip them instead"
            )
    return found
