"""What a residual is like, tensor by tensor, and beside what continued pre-training changed.

    residual = instruct - base                  R
    change   = newer base - base                D
    weights  = base                             B

    relative norm     ||R|| / ||B|| (Frobenius), and ||D|| / ||B||
    cosine            <R, D> / (||R|| ||D||)
    sign conflict     of the numbers that are large in R and in D, the share with opposite signs;
                      large: above the root mean square of the block of about 65,536 numbers
                      around them. Chance is 50 %.
    effective rank    (s1^2 + s2^2 + ...)^2 / (s1^4 + s2^4 + ...) over the singular values s of R,
                      the participation ratio of the spectrum of R^T R: n for an orthogonal
                      n x n matrix, 1 for an outer product

Figures of a part are taken over its numbers together, not averaged over its tensors; an effective
rank alone is the mean over the part's matrices.

The effective rank is estimated in the same pass from NUM_PROBES random sign vectors w: E (w_i^T
R^T R w_j)^2 is the sum of the s^4 for i != j (Kong and Valiant, arXiv 1602.00061, for moments of
a covariance). Its standard deviation is 7 % at most on the spectra in the test; the trace is taken
from the same probes, whose errors then cancel where one singular value dominates.

Rows whose token one side lacks are left out.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache, reduce
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from fedgraft.errors import ResidualError
from fedgraft.weights.arithmetic import Floats, squared_norm, widen
from fedgraft.weights.checkpoint import BLOCK_ELEMENTS, Array, Checkpoint, TensorInfo, each_tensor
from fedgraft.weights.family import Kind, anatomy_of, has_rows, kind_of, layer_of
from fedgraft.weights.residual import Residual

NUM_PROBES = 32
SERIAL = 1 << 18
"""Multiplications up to which OpenBLAS stays on one core; ours are busy already."""
EXPERT = re.compile(r"\.\d+(?=\.)")

_Key = TypeVar("_Key", Kind, int)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Change(_Record):
    """What continued pre-training did to a part, and how it lies to the residual."""

    relative_norm: float
    cosine: float | None
    """None where one of the two is zero."""
    sign_conflict: float | None
    """None where no number is large in both."""


class Figures(_Record):
    """What was measured of a part of the residual; see the head of this file."""

    num_elements: int
    relative_norm: float
    effective_rank: float | None
    """None without a matrix that moved."""
    num_not_restored: int | None
    """Numbers that base + residual does not give back bit for bit, by the residual's record.

    None for a lossy form, whose record counts none.
    """
    change: Change | None
    """None without a newer base."""


class Tensor(_Record):
    """One tensor, and where it stands."""

    name: str
    shape: tuple[int, ...]
    layer: int | None
    """None for what stands outside the layers."""
    module: str
    """Its name within the layer, the same in all of them; experts are not told apart."""
    kind: Kind
    figures: Figures


class Forecast(_Record):
    """Whether the graft will hold, told before anything is asked of it."""

    outcome: Literal["holds", "doubtful", "breaks", "open"]
    """open: without a newer base nobody can tell."""
    words: str


class Inspection(_Record):
    """All figures of a residual, summed in every way that is shown."""

    inputs: dict[str, str]
    """Role -> content hash."""
    forecast: Forecast
    whole: Figures
    kinds: dict[Kind, Figures]
    layers: dict[int, Figures]
    cells: dict[str, dict[int, Figures]]
    """Module -> layer -> figures."""
    tensors: tuple[Tensor, ...]


@dataclass(kw_only=True, slots=True)
class _Sums:
    """What figures are computed from; sums of parts are the sums of the whole."""

    num_elements: int = 0
    base: float = 0.0
    residual: float = 0.0
    change: float = 0.0
    """Sums of squares."""
    product: float = 0.0
    """Of residual and change."""
    num_large: int = 0
    num_opposed: int = 0
    num_not_restored: int = 0
    ranks: list[float] = field(default_factory=list)

    def __add__(self, other: "_Sums") -> "_Sums":
        names = [one.name for one in fields(self)]
        return _Sums(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def figures(self, *, counted: bool, changed: bool) -> Figures:
        both = math.sqrt(self.residual * self.change)
        change = Change(
            relative_norm=_rounded(_relative(self.change, self.base)),
            cosine=_rounded(self.product / both) if both else None,
            sign_conflict=_rounded(self.num_opposed / self.num_large) if self.num_large else None,
        )
        return Figures(
            num_elements=self.num_elements,
            relative_norm=_rounded(_relative(self.residual, self.base)),
            effective_rank=_rounded(sum(self.ranks) / len(self.ranks)) if self.ranks else None,
            num_not_restored=self.num_not_restored if counted else None,
            change=change if changed else None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Side:
    """A checkpoint read in the order of the residual's rows."""

    checkpoint: Checkpoint
    picks: NDArray[np.int64]
    """For each row for a token of the residual, the checkpoint's row; -1 where it has none."""

    @classmethod
    def open(cls, source: str | Path | Checkpoint, residual: Residual) -> "_Side":
        checkpoint = Checkpoint.open(source)
        anatomy = anatomy_of(checkpoint)
        difference = anatomy.first_difference(residual.anatomy)
        if difference:
            raise ResidualError(
                f"the residual {residual.path} does not fit {checkpoint.path}: {difference}. Name "
                "the base that it was extracted against, and what that base became"
            )
        picks = residual.anatomy.vocabulary.rows_in(anatomy.vocabulary)
        return cls(checkpoint=checkpoint, picks=picks)

    def blocks(self, name: str, num_elements: int) -> Iterator[Array]:
        num_rows = self.checkpoint.tensors[name].shape[:1]
        if has_rows(name) and not np.array_equal(self.picks, np.arange(*num_rows)):
            return self.checkpoint.rows(name, self.picks, num_elements)
        return self.checkpoint.blocks(name, num_elements)


def inspect(
    residual: Residual,
    base: str | Path | Checkpoint,
    *,
    newer_base: str | Path | Checkpoint | None = None,
) -> Inspection:
    """Measure a residual against its base and, if named, against what that base became.

    One streamed pass; memory does not grow with the model. Answers of no model are looked at.

    Raises:
        ResidualError: A checkpoint does not fit the residual, `base` is not the one that was
            subtracted, or `newer_base` has instructions on it already.
        NonFiniteError: A tensor holds NaN or infinity.
    """
    sides = [_Side.open(source, residual) for source in (base, newer_base) if source is not None]
    for side in sides[1:]:
        _refuse_graft(side.checkpoint)
    known = np.logical_and.reduce([side.picks >= 0 for side in sides])
    known[residual.whole_rows] = False
    sums: dict[str, _Sums] = {}

    lost = residual.record.figures.get("not_restored")

    def measure(name: str) -> None:
        sums[name] = _measure(name, residual, sides, known)
        sums[name].num_not_restored = (lost or {}).get(name, 0)

    sizes = {name: info.num_bytes for name, info in residual.tensors.items()}
    each_tensor(f"inspecting {residual.path.name}", sizes, measure)
    old = sides[0].checkpoint
    if old.content_hash != residual.base_hash:
        raise ResidualError(
            f"{old.path}: expected the base {residual.base_hash[:19]} that the residual "
            f"{residual.path} was extracted against, found {old.content_hash[:19]}; name that one"
        )
    residual.refuse_damage()
    roles = zip(("base", "newer base"), sides, strict=False)
    return _arranged(
        {name: sums[name] for name in residual.tensors},
        residual.tensors,
        {role: side.checkpoint.content_hash for role, side in roles}
        | {"residual": residual.content_hash},
        counted=lost is not None,
    )


def _measure(name: str, residual: Residual, sides: list[_Side], known: NDArray[np.bool_]) -> _Sums:
    """Take the sums of one tensor."""
    info = residual.tensors[name]
    width = math.prod(info.shape[1:])
    size = min(width * max(1, BLOCK_ELEMENTS // width), info.num_elements)
    probes = _probes(width) if len(info.shape) > 1 else None
    gram = np.zeros((NUM_PROBES, NUM_PROBES))
    sums, first = _Sums(num_elements=info.num_elements), 0
    wide, products = np.empty((3, size), np.float32), np.empty((3, size))
    sources = [residual.blocks(name, size), *(side.blocks(name, size) for side in sides)]
    paths = [residual.path, *(side.checkpoint.path for side in sides)]
    for blocks in zip(*sources, strict=True):
        moved, *weights = (
            widen(block, buffer) for block, buffer in zip(blocks, wide, strict=False)
        )
        if has_rows(name) and not known.all():
            unknown = ~known[first // width : (first + moved.size) // width]
            for numbers in (moved, *weights):
                numbers.reshape(-1, width)[unknown] = 0
        norms = [
            squared_norm(numbers, name, path)
            for numbers, path in zip((moved, *weights), paths, strict=True)
        ]
        sums.residual += norms[0]
        sums.base += norms[1]
        if len(weights) == 2:
            changed = np.subtract(weights[1], weights[0], out=weights[1])
            _compare(moved, changed, sums, products[:, : moved.size])
        if probes is not None:
            seen = _product(moved.reshape(-1, width), probes).astype(np.float64)
            gram += seen.T @ seen
        first += moved.size
    if probes is not None and (rank := _effective_rank(gram)):
        sums.ranks = [min(rank, float(min(info.shape[0], width)))]
    return sums


def _compare(moved: Floats, changed: Floats, sums: _Sums, buffer: NDArray[np.float64]) -> None:
    """Add to the sums how a block of the residual lies to the same block of the change."""
    pairs = ((moved, changed), (moved, moved), (changed, changed))
    crossed, of_moved, of_changed = (
        np.multiply(one, other, out=out, dtype=np.float64)
        for (one, other), out in zip(pairs, buffer, strict=True)
    )
    large = (of_moved > of_moved.mean()) & (of_changed > of_changed.mean())
    sums.product += float(crossed.sum())
    sums.change += float(of_changed.sum())
    sums.num_large += int(np.count_nonzero(large))
    sums.num_opposed += int(np.count_nonzero(large & (crossed < 0)))


def _product(rows: Floats, probes: Floats) -> Floats:
    """Multiply in pieces that are small enough to stay on the core that asks for them.

    A product that OpenBLAS shares out, asked for on several threads, took ten times the processor.
    """
    step = max(1, SERIAL // NUM_PROBES // len(rows))
    seen = np.zeros((len(rows), NUM_PROBES), np.float32)
    for first in range(0, rows.shape[1], step):
        seen += rows[:, first : first + step] @ probes[first : first + step]
    return seen


@lru_cache(maxsize=8)
def _probes(width: int) -> Floats:
    """Random signs, [width, NUM_PROBES], the same for every matrix of this width."""
    signs = np.random.default_rng(width).integers(0, 2, (width, NUM_PROBES))
    return signs.astype(np.float32) * 2 - 1


def _effective_rank(gram: NDArray[np.float64]) -> float | None:
    """Estimate it from w_i^T R^T R w_j for all pairs of probes; None for a matrix of zeros."""
    squares = np.square(gram)
    quartic = (squares.sum() - np.trace(squares)) / (NUM_PROBES * (NUM_PROBES - 1))
    return max(1.0, float((np.trace(gram) / NUM_PROBES) ** 2 / quartic)) if quartic else None


def _arranged(
    sums: Mapping[str, _Sums],
    infos: Mapping[str, TensorInfo],
    inputs: dict[str, str],
    *,
    counted: bool,
) -> Inspection:
    """Sum by kind, by layer, and by layer and module."""
    changed = "newer base" in inputs

    def total(names: Iterable[str]) -> Figures:
        added = reduce(_Sums.__add__, (sums[name] for name in names))
        return added.figures(counted=counted, changed=changed)

    def grouped(key: Callable[[str], _Key], names: Iterable[str] = sums) -> dict[_Key, Figures]:
        groups: dict[_Key, list[str]] = {}
        for name in names:
            groups.setdefault(key(name), []).append(name)
        return {group: total(groups[group]) for group in sorted(groups)}

    layers = {name: layer for name in sums if (layer := layer_of(name)) is not None}
    modules = {name: module_of(name) for name in sums}
    whole = total(sums)
    return Inspection(
        inputs=inputs,
        forecast=forecast(whole),
        whole=whole,
        kinds=grouped(kind_of),
        layers=grouped(layers.__getitem__, layers),
        cells={
            module: grouped(layers.__getitem__, [n for n in layers if modules[n] == module])
            for module in sorted({modules[name] for name in layers})
        },
        tensors=tuple(
            Tensor(
                name=name,
                shape=infos[name].shape,
                layer=layers.get(name),
                module=modules[name],
                kind=kind_of(name),
                figures=total([name]),
            )
            for name in sums
        ),
    )


def forecast(whole: Figures) -> Forecast:
    return Forecast(outcome="open", words="TODO")


def module_of(name: str) -> str:
    """A tensor's name within its layer, without `.weight` and the numbers of experts.

    Of `model.layers.3.mlp.experts.5.up_proj.weight` it is `mlp.experts.up_proj`.
    """
    layer = layer_of(name)
    within = name.removeprefix("model.") if layer is None else name.partition(f".{layer}.")[2]
    return EXPERT.sub("", within).removesuffix(".weight")


def _relative(square: float, base: float) -> float:
    return math.sqrt(square / base) if base else 0.0


def _rounded(number: float) -> float:
    return float(f"{number:.6g}")


def _refuse_graft(newer: Checkpoint) -> None:
    if newer.record and newer.record.residuals:
        raise ResidualError(
            f"{newer.path}: expected what the base became before anything was grafted, found a "
            "graft or one that was trained from a graft; name the checkpoint that came before"
        )
