"""From the adapters of many clients to the next one: the rules for LoRA, layer by layer.

    ideal     s p_1 B_1 A_1 + ... + s p_c B_c A_c     what averaging the merged models would add

    rule      next adapter                     added to the weights      equals the ideal?
    fedavg    mean A, mean B                   -                         no
    ffa       A as it was, mean B              -                         yes: A is frozen
    fedsa     mean A; B stays with its client  -                         personal models only
    flora     a fresh one                      all, as stacked factors   yes, any ranks
    flexlora  the ideal's best of each rank    -                         as near as the rank allows
    fedex     mean A, mean B                   what that misses          yes

FedIT 2305.05644, FFA-LoRA 2403.12313, FedSA-LoRA 2410.01463, FLoRA 2409.05976, FlexLoRA 2402.11505,
FedEx-LoRA 2410.09432. Letters: c clients, r the rank, s = alpha / r, p a client's share of all
examples. A layer is [out, in], A [r, in], B [out, r].

A rule asks each update for one tensor at a time and gives one layer at a time, so that updates may
lie on disk: `tensors` may be any mapping that reads when it is indexed. Means hold one client's
tensor, however many clients there are. Updates are taken in the order of their clients. Sums are in
float64 and rounded once, so that equal updates average to themselves to the bit. What BLAS and
LAPACK compute (the last three rules) is the same to the bit on one machine with one number of
threads, elsewhere to rounding.

How this differs from released code and from the papers:

- alpha may differ between clients wherever that has a meaning: B is first brought to the scale of
  the result, which changes no bit where that is its own. The papers have one alpha.
- FLoRA's code tells A from B by which side is as long as the rank, which is wrong in layers of just
  that width, and leaves alpha to be the same for all; here names tell. Its plain averaging drops
  all clients but the first, by a typo.
- Stacked factors are multiplied out once their ranks add up to more than the layer's shorter side,
  which is an upper bound on the rank of any sum: neither memory nor download grows beyond that.
  FlexLoRA, which needs factors, waits until the longer side is reached, and forms no matrix of the
  layer's shape before, where its paper always does.
- FlexLoRA shares singular values evenly between A and B. Where the ideal has no further direction,
  B is zero and A a unit vector, as in a fresh adapter; two zeros would never learn again.
- FedEx-LoRA's residual has rank (c - 1) r, not c r: the A_i - mean(A) sum to zero, so the last
  client's B is taken off the others'. One client leaves none.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedgraft.errors import FederationError
from fedgraft.federation.update import Factor, Size, Tensors, Update, modules, named, ordered
from fedgraft.weights.arithmetic import Floats

Rule = Literal["fedavg", "ffa", "fedsa", "flora", "flexlora", "fedex"]
NEEDED: Mapping[Rule, tuple[Factor, ...]] = {"ffa": ("B",), "fedsa": ("A",)}
"""The factors that a client must send; both where the rule is not listed."""
Wide = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What is added to a layer's weights: left @ right, the scale included."""

    left: Floats
    """[out, k]"""
    right: Floats
    """[k, in]"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """What a rule makes of one layer."""

    module: str
    adapters: Mapping[Size, Tensors] = field(default_factory=dict)
    """Size -> PEFT's name -> what clients of that size have next; their own where a name is not
    there. Empty for FLoRA: a fresh adapter."""
    change: Change | None = None
    """Of the base's weights, for FLoRA and FedEx-LoRA."""


def aggregate(
    updates: Iterable[Update], rule: Rule, sizes: Collection[Size] | None = None
) -> Iterator[Layer]:
    """Yield the layers that a rule makes of checked updates, in the order of their names.

    Args:
        sizes: Of the adapters that result. For `flexlora` any number and ranks, for `fedsa` any
            number of the updates' rank, for `fedavg`, `ffa` and `fedex` one of the updates' rank;
            not looked at for `flora`. Those of the updates where None.

    Raises FederationError, before the first layer, for updates that do not go together in this rule
    and names one that they would go together in; with the layer, where the A of FFA-LoRA differ or
    a rank is above what the layer can have.
    """
    found = ordered(updates)
    _check_together(found, rule)
    wanted = sorted({update.size for update in found} if sizes is None else set(sizes))
    _check_sizes(found, rule, wanted)
    return (_layer(module, found, rule, wanted) for module in modules(found[0].tensors))


def mean_b(updates: Iterable[Update]) -> Iterator[tuple[str, Floats]]:
    """Yield name and mean B of each layer: what a new client of a department starts from in FedSA.

    FedSA-LoRA (section 4) says nothing of new clients. Its A is the mean that all have.

    Raises FederationError for updates of several sizes, or without B.
    """
    found = ordered(updates)
    _check_factors(found, "B", "have the department's clients send it once")
    sizes = sorted({update.size for update in found})
    if len(sizes) > 1:
        raise FederationError(
            f"expected updates of one size, found {_listed(sizes)}; take the department's clients "
            "of the new client's size"
        )
    for module in modules(found[0].tensors):
        yield named(module, "B"), _mean(found, module, "B", sizes[0].scale)


def adapter(layers: Iterable[Layer], size: Size) -> dict[str, Floats]:
    """Gather the tensors that clients of one size have next."""
    return {name: tensor for layer in layers for name, tensor in layer.adapters[size].items()}


def added_up(earlier: Iterable[Change], change: Change) -> Change:
    """The sum of changes of one layer, as one: stacked, or multiplied out where that is smaller."""
    terms = ((one.left.astype(np.float64), one.right.astype(np.float64)) for one in earlier)
    last = (change.left.astype(np.float64), change.right.astype(np.float64))
    return _narrowed(*_summed([*terms, last]))


def _layer(module: str, updates: Sequence[Update], rule: Rule, sizes: Sequence[Size]) -> Layer:
    match rule:
        case "fedavg":
            return _averaged(module, updates, sizes[0])
        case "ffa":
            return _with_frozen_a(module, updates, sizes[0])
        case "fedsa":
            name, mean = named(module, "A"), _mean(updates, module, "A")
            return Layer(module=module, adapters={size: {name: mean} for size in sizes})
        case "flora":
            left, right = _summed(_ideal_terms(module, updates))
            return Layer(module=module, change=_narrowed(left, right))
        case "flexlora":
            return _decomposed(module, updates, sizes)
        case "fedex":
            averaged = _averaged(module, updates, sizes[0])
            left, right = _summed(_missed_terms(module, updates))
            return Layer(module=module, adapters=averaged.adapters, change=_narrowed(left, right))


def _averaged(module: str, updates: Sequence[Update], size: Size) -> Layer:
    tensors = {
        named(module, "A"): _mean(updates, module, "A"),
        named(module, "B"): _mean(updates, module, "B", size.scale),
    }
    return Layer(module=module, adapters={size: tensors})


def _with_frozen_a(module: str, updates: Sequence[Update], size: Size) -> Layer:
    name = named(module, "A")
    tensors = {named(module, "B"): _mean(updates, module, "B", size.scale)}
    if name in set(updates[0].tensors):
        frozen = updates[0].tensors[name]
        for update in updates[1:]:
            if not np.array_equal(update.tensors[name], frozen):
                raise FederationError(
                    f"client {update.client!r}: expected {name!r} to be that of "
                    f"{updates[0].client!r}, found another; FFA-LoRA trains B alone from one A, "
                    "so freeze A, or use fedavg"
                )
        tensors = {name: frozen} | tensors
    return Layer(module=module, adapters={size: tensors})


def _mean(
    updates: Sequence[Update], module: str, factor: Factor, scale: float | None = None
) -> Floats:
    """The mean of a factor, weighted by examples, at a scale of B where that is given."""
    return _wide_mean(updates, module, factor, scale).astype(np.float32)


def _wide_mean(
    updates: Sequence[Update], module: str, factor: Factor, scale: float | None = None
) -> Wide:
    name = named(module, factor)
    total = np.zeros(())
    for update in updates:
        weight = update.num_examples * (update.size.scale / scale if scale else 1.0)
        total = total + weight * update.tensors[name].astype(np.float64)
    return total / _num_examples(updates)


def _ideal_terms(module: str, updates: Sequence[Update]) -> Iterator[tuple[Wide, Wide]]:
    """Yield p s B and A of each client: the weight is on one side, or it would count twice."""
    num_examples = _num_examples(updates)
    for update in updates:
        a, b = _factors(module, update)
        yield b * (update.num_examples / num_examples * update.size.scale), a


def _missed_terms(module: str, updates: Sequence[Update]) -> Iterator[tuple[Wide, Wide]]:
    """Yield terms whose sum is the ideal less what mean A and mean B make.

    With B'_i = s_i B_i that is the sum of p_i B'_i (A_i - mean A), and of p_i (B'_i - X) (A_i -
    mean A) for any X that is the same for all: here that of the last client.
    """
    num_examples = _num_examples(updates)
    mean_a = _wide_mean(updates, module, "A")
    _, last = _factors(module, updates[-1])
    last *= updates[-1].size.scale
    if len(updates) == 1:
        yield last[:, :0], mean_a[:0]
    for update in updates[:-1]:
        a, b = _factors(module, update)
        weight = update.num_examples / num_examples
        yield (b * update.size.scale - last) * weight, a - mean_a


def _factors(module: str, update: Update) -> tuple[Wide, Wide]:
    a, b = (update.tensors[named(module, factor)] for factor in ("A", "B"))
    return a.astype(np.float64), b.astype(np.float64)


def _summed(
    terms: Iterable[tuple[Wide, Wide]], side: Callable[..., int] = min
) -> tuple[Wide, Wide]:
    """Factors of a sum of products: stacked, or multiplied out once they are of a higher rank than
    the shorter `side` of the layer has numbers, or than the longer one."""
    lefts: list[Wide] = []
    rights: list[Wide] = []
    whole: Wide | None = None
    rank = 0
    for left, right in terms:
        lefts.append(left)
        rights.append(right)
        rank += len(right)
        if rank > side(len(left), right.shape[1]):
            whole = _added(whole, lefts, rights)
            lefts, rights, rank = [], [], 0
    if whole is None:
        return np.hstack(lefts), np.vstack(rights)
    if lefts:
        whole = _added(whole, lefts, rights)
    num_out, num_in = whole.shape
    return (whole, np.eye(num_in)) if num_in <= num_out else (np.eye(num_out), whole)


def _added(whole: Wide | None, lefts: Sequence[Wide], rights: Sequence[Wide]) -> Wide:
    product: Wide = np.hstack(lefts) @ np.vstack(rights)
    return product if whole is None else np.add(whole, product, out=product)


def _decomposed(module: str, updates: Sequence[Update], sizes: Sequence[Size]) -> Layer:
    """The best approximations of the ideal, of each rank (Eckart and Young 1936).

    With left = Q_l R_l and right' = Q_r R_r, left @ right has the singular values of R_l R_r',
    which is no larger than the stacked ranks on either side, and right vectors v = Q_r v'. Times
    left @ right they are the left ones at their length, so that Q_l is never formed.
    """
    left, right = _summed(_ideal_terms(module, updates), side=max)
    num_out, num_in = len(left), right.shape[1]
    rank = max(size.rank for size in sizes)
    if rank > min(num_out, num_in):
        raise FederationError(
            f"expected a rank of at most {min(num_out, num_in)}, the shorter side of {module!r}, "
            f"found {rank}; choose a smaller one"
        )
    if (missing := rank - len(right)) > 0:  # directions for A that the ideal does not use
        left = np.hstack([left, np.zeros((num_out, missing))])
        right = np.vstack([right, np.eye(missing, num_in)])
    core = np.linalg.qr(left, mode="r")
    basis, core_r = np.linalg.qr(right.T)
    _, values, v = np.linalg.svd(core @ core_r.T, full_matrices=False)
    values, v = values[:rank], v[:rank] @ basis.T
    largest = np.abs(v).argmax(axis=1)
    v *= np.sign(v[np.arange(rank), largest])[:, None]  # the same whatever LAPACK chose
    u = left @ (right @ v.T)
    used = values > values[0] * np.finfo(np.float64).eps * max(num_out, num_in)
    adapters = {}
    for size in sizes:
        root = np.sqrt(np.where(used, values, 1.0) * size.scale)
        b, a = u * used / root, v * np.where(used, root / size.scale, 1.0)[:, None]
        adapters[size] = {
            named(module, "A"): a[: size.rank].astype(np.float32),
            named(module, "B"): b[:, : size.rank].astype(np.float32),
        }
    return Layer(module=module, adapters=adapters)


def _narrowed(left: Wide, right: Wide) -> Change:
    return Change(left=left.astype(np.float32), right=right.astype(np.float32))


def _num_examples(updates: Sequence[Update]) -> int:
    return sum(update.num_examples for update in updates)


def _check_together(updates: Sequence[Update], rule: Rule) -> None:
    """Refuse what a rule cannot put together, and say which rule can."""
    for factor in NEEDED.get(rule, ("A", "B")):
        _check_factors(updates, factor, f"{rule} needs it from every client")
    names = set(updates[0].tensors)
    for update in updates:
        if other := sorted(names ^ set(update.tensors)):
            raise FederationError(
                f"client {update.client!r}: expected the tensors of {updates[0].client!r}, found "
                f"{other[0]!r} in one of them alone; check updates against one template"
            )
    ranks = sorted({update.rank for update in updates})
    if rule in ("fedavg", "ffa", "fedsa", "fedex") and len(ranks) > 1:
        raise FederationError(
            f"expected adapters of one rank for {rule}, found {', '.join(map(str, ranks))}; give "
            "clients one rank, or use flora or flexlora, which take any"
        )


def _check_factors(updates: Sequence[Update], factor: Factor, remedy: str) -> None:
    for update in updates:
        names = set(update.tensors)
        for module in modules(names):
            if (name := named(module, factor)) not in names:
                raise FederationError(
                    f"client {update.client!r}: expected {name!r}, found none; {remedy}"
                )


def _check_sizes(updates: Sequence[Update], rule: Rule, sizes: Sequence[Size]) -> None:
    rank = updates[0].rank
    ranks = {size.rank for size in sizes}
    match rule:
        case "flora":
            return
        case "flexlora":
            wanted, fits = "at least one size", bool(sizes)
        case "fedsa":
            wanted, fits = f"sizes of rank {rank}", ranks == {rank}
        case _:
            wanted, fits = f"one size of rank {rank}", ranks == {rank} and len(sizes) == 1
    if not fits:
        raise FederationError(
            f"expected {wanted} for the result of {rule}, found {_listed(sizes)}; "
            f"name one, such as {Size(rank, updates[0].alpha)}"
        )


def _listed(sizes: Sequence[Size]) -> str:
    return " and ".join(map(str, sizes)) or "none"
