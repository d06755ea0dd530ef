"""What a client answers after training, and what it must be before it may count.

    client ── Update: name, weight, factors, size, base, round ──> check ──> aggregate
                                                                     │
                                                     FederationError: client, tensor, remedy

A stock engine trusts answers: one NaN client gives an all-NaN model, a claim of 1e9 examples takes
the mean over, an extra tensor ends the run. Here an update has the fields below and no other, and
each is held against a Template: what the round asked for.

Letters: r is the rank of an adapter. A layer [out, in] has factors A [r, in] and B [out, r], and
its change is alpha / r * B A (arXiv 2106.09685). Names are those of PEFT's state dicts.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from fedgraft.errors import FederationError
from fedgraft.weights.arithmetic import Floats, all_finite

Factor = Literal["A", "B"]
BOTH: tuple[Factor, ...] = ("A", "B")
Tensors = Mapping[str, Floats]
MOST_EXAMPLES = 1_000_000
"""More than a department trains an adapter on in a round."""


@dataclass(frozen=True, order=True, slots=True)
class Size:
    """The rank and the alpha of an adapter. Raises FederationError where one is not above zero."""

    rank: int
    alpha: float

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise FederationError(
                f"expected a rank and an alpha above zero, found {self.rank} and {self.alpha}; "
                "such as 8 and 16"
            )

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank

    def __str__(self) -> str:
        return f"rank {self.rank} with alpha {self.alpha:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """A client's adapter after its training in one round."""

    client: str
    num_examples: int
    """What was trained on: the client's weight."""
    tensors: Tensors
    """PEFT's name -> float32. May read each tensor when it is asked for: see aggregate.py."""
    rank: int
    alpha: float
    base: str
    """Content hash of the model that the adapter is for."""
    round: int
    """The round whose question is answered."""

    @property
    def size(self) -> Size:
        return Size(self.rank, self.alpha)


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """What the updates of one round must be."""

    base: str
    round: int
    layers: Mapping[str, tuple[int, int]]
    """Module, as in names of tensors before `.lora_A` -> (out, in)."""
    sizes: Collection[Size]
    """Of which an adapter may be: a free alpha would be a free weight."""
    max_norm: float
    """Euclidean norm that no tensor may be above; `math.inf` for any."""
    max_examples: int = MOST_EXAMPLES
    sent: tuple[Factor, ...] = BOTH
    """FFA-LoRA may send B alone, FedSA-LoRA A alone: half the bytes."""

    def __post_init__(self) -> None:
        if not self.layers or not self.sizes or not self.sent:
            raise FederationError(
                f"expected layers, sizes and factors to ask for, found {len(self.layers)} layers, "
                f"{len(self.sizes)} sizes and {len(self.sent)} factors; an adapter needs each"
            )
        if not self.max_norm > 0 or self.max_examples < 1:
            raise FederationError(
                f"expected bounds above zero, found a max_norm of {self.max_norm} and max_examples "
                f"of {self.max_examples}; several times what honest clients send is a good bound"
            )

    def shapes(self, rank: int) -> dict[str, tuple[int, int]]:
        """Name -> shape of every tensor of an adapter of that rank, in order."""
        found: dict[str, tuple[int, int]] = {}
        for module, (num_out, num_in) in sorted(self.layers.items()):
            if "A" in self.sent:
                found[named(module, "A")] = (rank, num_in)
            if "B" in self.sent:
                found[named(module, "B")] = (num_out, rank)
        return found


def named(module: str, factor: Factor) -> str:
    """The name of a tensor, as PEFT writes it."""
    return f"{module}.lora_{factor}.weight"


def modules(names: Iterable[str]) -> list[str]:
    """The modules that tensors belong to, sorted."""
    return sorted({name.rpartition(".lora_")[0] for name in names})


def layers_of(tensors: Tensors) -> dict[str, tuple[int, int]]:
    """The layers of an adapter with both factors, as a Template wants them."""
    return {
        module: (tensors[named(module, "B")].shape[0], tensors[named(module, "A")].shape[1])
        for module in modules(tensors)
    }


def ordered(updates: Iterable[Update]) -> list[Update]:
    """Sort updates by client, so that sums are the same to the bit in whatever order they came.

    Raises FederationError where there is none, or two of one client.
    """
    found = sorted(updates, key=lambda update: update.client)
    if not found:
        raise FederationError(
            "expected at least one update, found none; keep the last adapter for this round"
        )
    for one, other in pairwise(found):
        if one.client == other.client:
            raise FederationError(
                f"client {one.client!r}: expected one update a round, found a second one; keep the "
                "answer to the message that was sent"
            )
    return found


def check(update: Update, template: Template) -> None:
    """Refuse an update that is not what was asked for: nothing in it is trusted.

    Reads each tensor once.

    Raises FederationError for another base or round, a size that was not offered, a number of
    examples that is none, a tensor that is missing or too many, of another type, dtype or shape,
    with NaN or infinity, or with a norm above the bound.
    """
    if not isinstance(update.client, str) or not update.client:
        raise FederationError(
            f"expected a client's name, found {update.client!r}; give each client one of its own"
        )
    if update.base != template.base:
        raise _refused(
            update,
            f"an update for the model {template.base[:19]}",
            f"one for {str(update.base)[:19]}",
            "give the client the model of this federation",
        )
    if type(update.round) is not int or update.round != template.round:
        raise _refused(
            update,
            f"an answer to round {template.round}",
            f"one to round {update.round!r}",
            "it came late or was sent again; drop it",
        )
    count = update.num_examples
    if type(count) is not int or not 0 < count <= template.max_examples:
        raise _refused(
            update,
            f"a whole number of examples from 1 to {template.max_examples}",
            repr(count),
            "have the client count what it trained on, or raise max_examples",
        )
    _check_size(update, template)
    _check_tensors(update, template)


def _check_size(update: Update, template: Template) -> None:
    rank, alpha = update.rank, update.alpha
    offered = {(size.rank, size.alpha) for size in template.sizes}
    if type(rank) is not int or type(alpha) not in (int, float) or (rank, alpha) not in offered:
        raise _refused(
            update,
            "an adapter of " + " or ".join(map(str, sorted(template.sizes))),
            f"rank {rank!r} with alpha {alpha!r}",
            "set the client to a size that the federation offers",
        )


def _check_tensors(update: Update, template: Template) -> None:
    shapes, found = template.shapes(update.rank), update.tensors
    if not isinstance(found, Mapping):
        raise _refused(update, "tensors by name", type(found).__name__, "send a state dict")
    names = set(found)
    for name in shapes:
        if name not in names:
            raise _refused(
                update,
                f"the tensor {name!r}",
                f"none of that name among {len(names)}",
                "train an adapter on the layers that the federation names",
            )
    for name in found:  # in their order: names may be of any type
        if name not in shapes:
            raise _refused(
                update,
                f"{len(shapes)} tensors and nothing else",
                f"{_shown(name)} too",
                "send the factors that the federation names alone",
            )
    for name, shape in shapes.items():
        tensor = found[name]
        if type(tensor) is not np.ndarray or tensor.dtype != np.float32:
            kind = tensor.dtype if isinstance(tensor, np.ndarray) else type(tensor).__name__
            raise _refused(
                update,
                f"{name!r} as an array of float32",
                f"{type(tensor).__name__} of {kind}",
                "cast it before it is sent",
            )
        if tensor.shape != shape:
            raise _refused(
                update,
                f"{name!r} of shape {list(shape)}",
                f"{list(tensor.shape)}",
                "train on the model and at the rank that the federation names",
            )
        numbers = tensor.ravel()
        if not all_finite(numbers):
            raise _refused(
                update,
                f"finite numbers in {name!r}",
                "NaN or infinity",
                "the client's training diverged: lower its learning rate",
            )
        norm = math.sqrt(float(np.square(numbers, dtype=np.float64).sum()))
        if norm > template.max_norm:
            raise _refused(
                update,
                f"a norm of at most {template.max_norm:g} in {name!r}",
                f"{norm:.6g}",
                "lower the client's learning rate, or raise max_norm if all clients are near it",
            )


def _refused(update: Update, expected: str, found: str, remedy: str) -> FederationError:
    return FederationError(
        f"client {update.client!r}: expected {expected}, found {found}; {remedy}"
    )


def _shown(name: object) -> str:
    """A name that the client chose, cut short."""
    text = repr(name)
    return text if len(text) <= 80 else f"{text[:76]}...{text[-1]}"
