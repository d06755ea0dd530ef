"""How examples become clients: every example belongs to exactly one, and each has an id to read.

    departments   each department cut at random into n clients    hr-1  hr-2  hr-3  finance-1 ...
    tasks         one client a task                               summarization  translation ...
    iid           all examples cut at random into n equal parts   client-1 ... client-n
    quantity      the same, client k of a size in proportion to k^-exponent (a power law)
    dirichlet     each label shared out among the n clients by a draw from Dirichlet(alpha)

        alpha = 100             alpha = 0.5             alpha = 0.01
        client-1  ▆▆▆▆          client-1  █▃▁▆          client-1  █
        client-2  ▆▆▆▆          client-2  ▁▇▂▅          client-2   █
        client-3  ▆▆▆▆          client-3  ▃▂█▁          client-3     ██

A partition is drawn from its seed and the examples' ids, so that it does not depend on the order
in which examples arrive; where they have no ids, their order is taken as it is. In what follows,
an index is the place of an example in the sequences that the caller gave.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from fedgraft.errors import FederationError
from fedgraft.provenance import derive_seed

Name = Literal["departments", "tasks", "iid", "quantity", "dirichlet"]
Indices = NDArray[np.int64]
Labels = Sequence[str | None]
"""The label of each example; None, or a blank one, is refused."""

PARAMETERS: Mapping[Name, tuple[str, ...]] = {
    "departments": ("num_clients", "field"),
    "tasks": ("field",),
    "iid": ("num_clients",),
    "quantity": ("num_clients", "exponent"),
    "dirichlet": ("num_clients", "field", "alpha"),
}
"""What each partition asks for, beside `minimum` and `seed`."""
MAX_DRAWS = 100
"""How often Dirichlet shares are drawn until each client has its minimum."""


class Partition(BaseModel):
    """How examples become clients, as a federation file says it; see the head of this file.

    Raises FederationError for a number out of its range, for a parameter that the partition does
    not ask for, and for a Dirichlet partition that names no field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name = "departments"
    num_clients: int = 1
    """Of `departments`: in each department. Of the others: in all."""
    field: str | None = None
    """Where the label stands; None is `department` for departments, `task` for tasks."""
    alpha: float = 0.5
    """Concentration of Dirichlet: large is even, small gives each label to few clients."""
    exponent: float = 1.0
    """Of the power law of sizes; 0 is equal sizes."""
    minimum: int = 1
    """Examples that every client has at least."""
    seed: int = 0

    def model_post_init(self, _: object) -> None:
        for what, number in (("num_clients", self.num_clients), ("minimum", self.minimum)):
            if number < 1:
                raise FederationError(f"expected a {what} of at least 1, found {number}; raise it")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise FederationError(
                f"expected a finite alpha above 0, found {self.alpha}; 0.5 is usual, 100 is nearly "
                "even"
            )
        if not (math.isfinite(self.exponent) and self.exponent >= 0):
            raise FederationError(
                f"expected a finite exponent of at least 0, found {self.exponent}; 0 is equal "
                "sizes, 1 halves the second client"
            )
        asked = PARAMETERS[self.name]
        for what in ("num_clients", "field", "alpha", "exponent"):
            if what not in asked and getattr(self, what) != type(self).model_fields[what].default:
                raise FederationError(
                    f"expected no {what} for the partition {self.name}, which asks for "
                    f"{', '.join(asked)}, found {getattr(self, what)!r}; leave it out or choose "
                    "another partition"
                )
        if self.name == "dirichlet" and self.field is None:
            raise FederationError(
                "expected the field whose label the partition dirichlet shares out, found none; "
                "name it, such as field: department"
            )

    @property
    def label_field(self) -> str | None:
        """The field that the partition reads; None for one that reads none."""
        match self.name:
            case "departments":
                return self.field or "department"
            case "tasks":
                return self.field or "task"
            case "dirichlet":
                return self.field
            case "iid" | "quantity":
                return None

    def clients(
        self, fields: Mapping[str, Labels], ids: Sequence[str] | None = None
    ) -> dict[str, Indices]:
        """Return the indices of each client's examples, clients by name.

        Args:
            fields: Field -> its value for each of the n examples. A partition that reads no label
                takes only n from it.
            ids: A distinct id for each example. Where given, who gets which example depends on the
                ids alone, and a client's indices stand in the order of its ids; where not, on the
                order of the examples, and they rise.

        Raises FederationError where there is no example; where fields and ids differ in length; for
        an id that occurs twice, a field that is not there, an example without its label; and where
        a client would have fewer examples than the minimum.
        """
        num_examples = _length(fields, ids)
        order = np.arange(num_examples)
        if ids is not None:
            ranked = sorted(range(num_examples), key=ids.__getitem__)
            for before, after in pairwise(ranked):
                if ids[before] == ids[after]:
                    raise FederationError(
                        f"expected a distinct id for each example, found {ids[before]!r} for "
                        f"examples {before} and {after}; drop one or rename it"
                    )
            order = np.array(ranked)
        labels: list[str] = []
        if (field := self.label_field) is not None:
            if field not in fields:
                raise FederationError(
                    f"expected the field {field!r} for the partition {self.name}, found "
                    f"{', '.join(map(repr, fields)) or 'no field'}; name one that the examples have"
                )
            known = _known(fields[field], field)
            labels = [known[place] for place in order]
        match self.name:
            case "departments":
                places = departments(labels, self.num_clients, minimum=self.minimum, seed=self.seed)
            case "tasks":
                places = tasks(labels, minimum=self.minimum)
            case "iid":
                places = iid(num_examples, self.num_clients, minimum=self.minimum, seed=self.seed)
            case "quantity":
                places = quantity(
                    num_examples,
                    self.num_clients,
                    exponent=self.exponent,
                    minimum=self.minimum,
                    seed=self.seed,
                )
            case "dirichlet":
                places = dirichlet(
                    labels, self.num_clients, alpha=self.alpha, minimum=self.minimum, seed=self.seed
                )
        return {client: order[chosen] for client, chosen in places.items()}


def departments(
    labels: Labels, num_clients: int, *, minimum: int = 1, seed: int = 0
) -> dict[str, Indices]:
    """Cut each department at random into n clients whose sizes differ by one at most.

    A department's cut depends on its own examples alone, whatever the others have.

    Raises FederationError for a department with fewer than `minimum` examples for each client.
    """
    clients: dict[str, Indices] = {}
    for label, (stem, members) in _groups(labels).items():
        _check_enough(len(members), num_clients, minimum, f" of {label!r}")
        chance = np.random.default_rng(derive_seed(seed, "partition", "departments", label))
        sizes = _apportioned(len(members), np.ones(num_clients), minimum)
        clients |= _cut(members, sizes, stem, chance)
    return clients


def tasks(labels: Labels, *, minimum: int = 1) -> dict[str, Indices]:
    """Give each task a client of its own; nothing is drawn.

    Raises FederationError for a task with fewer than `minimum` examples.
    """
    groups = _groups(labels)
    for label, (_, members) in groups.items():
        _check_enough(len(members), 1, minimum, f" of {label!r}")
    return dict(groups.values())


def iid(
    num_examples: int, num_clients: int, *, minimum: int = 1, seed: int = 0
) -> dict[str, Indices]:
    """Cut the examples at random into n clients whose sizes differ by one at most.

    Raises FederationError for fewer than `minimum` examples for each client.
    """
    return quantity(num_examples, num_clients, exponent=0, minimum=minimum, seed=seed)


def quantity(
    num_examples: int, num_clients: int, *, exponent: float, minimum: int = 1, seed: int = 0
) -> dict[str, Indices]:
    """Cut the examples at random; client k has a size in proportion to k^-exponent.

    Each gets its minimum first, and of the rest the whole number nearest to its share.

    Raises FederationError for fewer than `minimum` examples for each client.
    """
    _check_enough(num_examples, num_clients, minimum)
    chance = np.random.default_rng(derive_seed(seed, "partition", "quantity"))
    weights = np.arange(1, num_clients + 1, dtype=np.float64) ** -exponent
    sizes = _apportioned(num_examples, weights, minimum)
    return _cut(np.arange(num_examples), sizes, "client", chance)


def dirichlet(
    labels: Labels, num_clients: int, *, alpha: float, minimum: int = 1, seed: int = 0
) -> dict[str, Indices]:
    """Share out the examples of each label among the clients by a draw from Dirichlet(alpha).

    A client that has n / c examples gets no more of the labels that follow, and all is drawn again
    while a client has less than its minimum. This is the rule of FedML's released code, which many
    papers copied, FedHDS among them (with a minimum of 10). Hsu et al. (arXiv 1909.06335), whom it
    names, draw for each client a mixture of labels instead, and make all clients equally large.

    We differ from that code in four things. Labels follow one another in an order that is drawn
    too: there the last ones are always those that find the clients full. The share of a full client
    is not drawn at all, where there it is drawn and set to zero: the same distribution, but never
    zero divided by zero. A share is rounded up or down at random, so that the last client gains
    nothing by it. And we give up after MAX_DRAWS, where a loop without end hides that no draw can
    succeed.

    Raises FederationError for fewer than `minimum` examples for each client, and where no draw gave
    every client its minimum: a small alpha gives few labels to few clients.
    """
    groups = _groups(labels)
    _check_enough(len(labels), num_clients, minimum)
    chance = np.random.default_rng(derive_seed(seed, "partition", "dirichlet"))
    members = [places for _, places in groups.values()]
    for _ in range(MAX_DRAWS):
        owners = _drawn(members, len(labels), num_clients, alpha, chance)
        sizes = np.bincount(owners, minlength=num_clients)
        if sizes.min() >= minimum:
            names = _numbered("client", num_clients)
            return {name: np.flatnonzero(owners == c) for c, name in enumerate(names)}
    raise FederationError(
        f"expected at least {minimum} of {len(labels)} examples for each of {num_clients} clients, "
        f"found {sizes.min()} for {_numbered('client', num_clients)[int(sizes.argmin())]} in the "
        f"last of {MAX_DRAWS} draws with alpha {alpha:g} over {len(groups)} labels; take a larger "
        "alpha, fewer clients or a smaller minimum"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """How many examples of each label each client has, for a picture of the partition."""

    clients: tuple[str, ...]
    labels: tuple[str, ...]
    """By name."""
    counts: tuple[tuple[int, ...], ...]
    """Clients x labels."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many examples each client has."""
        return tuple(map(sum, self.counts))

    @property
    def commonest(self) -> dict[str, str]:
        """The label that each client has most of; of equal ones the first by name.

        Of the partition `departments`, and the labels it was made from: its department.
        """
        rows = zip(self.clients, self.counts, strict=True)
        return {client: self.labels[row.index(max(row))] for client, row in rows}

    @property
    def skew(self) -> float:
        """How far labels differ between clients: 0 for none; near 1 for many labels, each apart.

        Mean over examples of the total variation between the labels of the example's client and the
        labels of all: sum_c n_c/n * 1/2 sum_l |n_cl/n_c - n_l/n|. Clients of single labels reach
        the most that these labels allow, 1 - sum_l (n_l/n)^2.
        """
        counts = np.array(self.counts, np.float64)
        total = counts.sum()
        expected = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / total
        return float(np.abs(counts - expected).sum() / (2 * total))


def summarise(clients: Mapping[str, Indices], labels: Labels) -> Summary:
    """Count each client's examples by label, of any field: n labels, by index.

    Raises FederationError for an example without its label.
    """
    known = _known(labels, "labels")
    names = tuple(sorted(set(known)))
    counted = [Counter(known[place] for place in places) for places in clients.values()]
    return Summary(
        clients=tuple(clients),
        labels=names,
        counts=tuple(tuple(counts[name] for name in names) for counts in counted),
    )


def _length(fields: Mapping[str, Labels], ids: Sequence[str] | None) -> int:
    """How many examples there are."""
    lengths = {name: len(values) for name, values in fields.items()}
    if ids is not None:
        lengths["ids"] = len(ids)
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{length} in {name!r}" for name, length in lengths.items())
        raise FederationError(
            f"expected one value for each example in every field, found {found}; give all of them "
            "the same length"
        )
    num_examples = next(iter(lengths.values()), 0)
    if not num_examples:
        raise FederationError(
            "expected at least one example to give to a client, found none; name text that is there"
        )
    return num_examples


def _known(labels: Labels, field: str) -> list[str]:
    """The labels, each of which is there."""
    known = []
    for place, label in enumerate(labels):
        if label is None or not label.strip():
            raise FederationError(
                f"expected a label for each example in {field!r}, found none for example {place}; "
                "fill it in or leave the example out"
            )
        known.append(label)
    return known


def _groups(labels: Labels) -> dict[str, tuple[str, Indices]]:
    """Each label, by name -> the stem of a client id, and the places of its examples.

    A stem can be part of a file's name: letters, digits, `_`, `.` and `-`.
    """
    members: dict[str, list[int]] = {}
    for place, label in enumerate(_known(labels, "labels")):
        members.setdefault(label, []).append(place)
    groups: dict[str, tuple[str, Indices]] = {}
    stems: dict[str, str] = {}
    for label in sorted(members):
        stem = re.sub(r"[^\w.-]+", "-", label).strip("-.")
        if not stem or stem in stems:
            found = f"{stems[stem]!r} and {label!r}" if stem else repr(label)
            raise FederationError(
                "expected labels that differ in their letters, digits and underscores, since they "
                f"name clients, found {found}; rename one"
            )
        stems[stem] = label
        groups[label] = stem, np.array(members[label])
    return groups


def _check_enough(num_examples: int, num_clients: int, minimum: int, of: str = "") -> None:
    """Raise FederationError for fewer than `minimum` examples for each client."""
    if num_examples < num_clients * minimum:
        clients = "1 client" if num_clients == 1 else f"each of {num_clients} clients"
        raise FederationError(
            f"expected at least {minimum} example(s){of} for {clients}, found {num_examples} in "
            "all; ask for fewer clients or a smaller minimum, or add text"
        )


def _apportioned(num_examples: int, weights: NDArray[np.float64], minimum: int) -> Indices:
    """Sizes that add up: the minimum each, the rest by weight, by largest remainder."""
    shares = (num_examples - minimum * len(weights)) * weights / weights.sum()
    sizes: Indices = np.floor(shares).astype(np.int64)
    left = num_examples - minimum * len(weights) - int(sizes.sum())
    sizes[np.argsort(sizes - shares, kind="stable")[:left]] += 1
    sizes += minimum
    return sizes


def _cut(
    members: Indices, sizes: Indices, stem: str, chance: np.random.Generator
) -> dict[str, Indices]:
    parts = np.split(chance.permutation(members), np.cumsum(sizes)[:-1])
    return dict(zip(_numbered(stem, len(sizes)), map(np.sort, parts), strict=True))


def _drawn(
    members: Sequence[Indices],
    num_examples: int,
    num_clients: int,
    alpha: float,
    chance: np.random.Generator,
) -> Indices:
    """The client of each example, in one draw."""
    owners = np.empty(num_examples, np.int64)
    sizes = np.zeros(num_clients, np.int64)
    for label in chance.permutation(len(members)):
        places = chance.permutation(members[label])
        (free,) = np.nonzero(sizes < num_examples / num_clients)
        shares = chance.dirichlet(np.full(len(free), alpha))
        ends = np.floor(np.cumsum(shares) * len(places) + chance.random()).astype(np.int64)
        ends[-1] = len(places)  # where the sum of shares falls short of 1 by rounding
        counts = np.diff(np.minimum(ends, len(places)), prepend=0)
        owners[places] = np.repeat(free, counts)
        sizes[free] += counts
    return owners


def _numbered(stem: str, num: int) -> list[str]:
    """`hr-1` to `hr-3`, or `hr-01` to `hr-12`: sorted as text is sorted as numbers."""
    width = len(str(num))
    return [f"{stem}-{number:0{width}}" for number in range(1, num + 1)]
