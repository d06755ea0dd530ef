"""What a residual is like, tensor by tensor, and beside what continued pre-training changed.

    residual = instruct - base                  R
    change   = newer base - base                D
    weights  = base                             B

    relative norm     ||R|| / ||B|| (Frobenius), and ||D|| / ||B||
    cosine            <R, D> / (||R|| ||D||)
    sign conflict     of the numbers that are large in R and in D, the share with opposite signs;
                      large: above the root mean square of the block of about 65,536 numbers
                      around them. Chance is 50 %.
    strength          s1(D) / s1(B) and s1(R) / s1(B), of the largest singular values
    effective rank    (s1^2 + s2^2 + ...)^2 / (s1^4 + s2^4 + ...) over the singular values s of R,
                      the participation ratio of the spectrum of R^T R: n for an orthogonal
                      n x n matrix, 1 for an outer product

Figures of a part are taken over its numbers together, not averaged over its tensors; strength and
effective rank are means over the part's matrices.

Singular values are estimated in the same pass from Z = M^T M W, for each matrix M of R, B and D,
with NUM_PROBES columns of random signs in W. For columns i != j, (W^T Z)_ij^2 has the expectation
s1^4 + s2^4 + ... (Kong and Valiant, arXiv 1602.00061); the trace is taken from the same probes,
whose errors then cancel where one singular value dominates. s1^2 is the largest eigenvalue of
Z (W^T Z)^+ Z^T (Nystroem; Tropp et al., arXiv 1706.05736): never too large, and up to 25 % too
small in s1 where the spectrum is flat, which ratios mostly cancel.

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
from fedgraft.weights.checkpoint import BLOCK_ELEMENTS, Array, Checkpoint, TensorInfo
from fedgraft.weights.family import Kind, anatomy_of, has_rows, kind_of, layer_of
from fedgraft.weights.residual import Residual
from fedgraft.weights.workers import each_tensor

NUM_PROBES = 32
KEPT, LIMIT, LIMIT_AGAINST, NEAR, NUM_RUNS = 0.85, 0.117, 0.796, 0.15, 24
"""Share of the instructions kept that counts as held; the strength of the change at which runs of
the pocket family went from one to the other, against the weights and against the residual; the
share of a limit within which nothing is promised."""
SERIAL = 1 << 18
"""Multiplications up to which OpenBLAS stays on one core; ours are busy already."""
SMALLEST = 1e-6
"""Share of the largest eigenvalue below which float32 says nothing."""
EXPERT = re.compile(r"\.\d+(?=\.)")

_Key = TypeVar("_Key", Kind, int)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Change(_Record):
    """What continued pre-training did to a part, and how it lies to the residual."""

    relative_norm: float | None
    strength: float | None
    cosine: float | None
    """None where one of the two is zero."""
    sign_conflict: float | None
    """None where no number is large in both."""


class Figures(_Record):
    """What was measured of a part of the residual; see the head of this file."""

    num_elements: int
    relative_norm: float | None
    """None where the base is zero; so is the change's."""
    strength: float | None
    """None without a matrix in the base that is not zero."""
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
    strength: float | None
    """Of the change, the mean over the layers' matrices."""
    against_residual: float | None
    """s1(D) / s1(R), the mean over the layers' matrices that moved in both."""
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
    strengths: list[float] = field(default_factory=list)
    change_strengths: list[float] = field(default_factory=list)
    ranks: list[float] = field(default_factory=list)
    """A number for each matrix."""

    def __add__(self, other: "_Sums") -> "_Sums":
        names = [one.name for one in fields(self)]
        return _Sums(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def pairs(self) -> Iterator[tuple[float, float]]:
        """Strength of the residual and of the change, for each matrix; none without a change."""
        return zip(self.strengths, self.change_strengths, strict=False)

    def figures(self, *, counted: bool, changed: bool) -> Figures:
        both = math.sqrt(self.residual * self.change)
        change = Change(
            relative_norm=_relative(self.change, self.base),
            strength=_mean(self.change_strengths),
            cosine=_rounded(self.product / both) if both else None,
            sign_conflict=_rounded(self.num_opposed / self.num_large) if self.num_large else None,
        )
        return Figures(
            num_elements=self.num_elements,
            relative_norm=_relative(self.residual, self.base),
            strength=_mean(self.strengths),
            effective_rank=_mean(self.ranks),
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
    lost = residual.record.figures.get("not_restored")

    def measure(name: str) -> _Sums:
        found = _measure(name, residual, sides, known)
        found.num_not_restored = (lost or {}).get(name, 0)
        return found

    sizes = {name: info.num_bytes for name, info in residual.tensors.items()}
    sums = each_tensor(f"inspecting {residual.path.name}", sizes, measure)
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
    sketches = [_Sketch(width) for _ in (residual, *sides)] if len(info.shape) > 1 else []
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
            np.subtract(weights[1], weights[0], out=weights[1])
            _compare(moved, weights[1], sums, products[:, : moved.size])
        for sketch, numbers in zip(sketches, (moved, *weights), strict=False):
            sketch.add(numbers.reshape(-1, width))
        first += moved.size
    if sketches:
        ours, of_base, *of_change = sketches
        if (rank := ours.effective_rank()) is not None:
            sums.ranks = [min(rank, float(min(info.shape[0], width)))]
        if whole := of_base.largest():
            sums.strengths = [ours.largest() / whole]
            sums.change_strengths = [sketch.largest() / whole for sketch in of_change]
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


class _Sketch:
    """Of a matrix M that is read by rows, Z = M^T M W: enough to tell its singular values by."""

    def __init__(self, width: int) -> None:
        self._probes = _probes(width)
        self._seen = np.zeros_like(self._probes)

    def add(self, rows: Floats) -> None:
        """Take in some rows, in pieces so small that OpenBLAS multiplies them on this core.

        Products that it shared out, asked for on several threads, took ten times the processor.
        """
        step = max(1, SERIAL // NUM_PROBES // len(rows))
        parts = [slice(first, first + step) for first in range(0, rows.shape[1], step)]
        with np.errstate(over="ignore", invalid="ignore"):
            projected = sum(rows[:, part] @ self._probes[part] for part in parts)
            for part in parts:
                self._seen[part] += rows[:, part].T @ projected

    def largest(self) -> float:
        """Estimate the largest singular value; 0 for a matrix of zeros."""
        values, vectors = np.linalg.eigh(self._gram())
        kept = values > values[-1] * SMALLEST
        half = self._seen.astype(np.float64) @ (vectors[:, kept] / np.sqrt(values[kept]))
        inner = half.T @ half
        return math.sqrt(max(np.linalg.eigvalsh(inner), default=0.0))

    def effective_rank(self) -> float | None:
        """Estimate the participation ratio; None for a matrix of zeros."""
        gram = self._gram()
        squares = np.square(gram)
        quartic = (squares.sum() - np.trace(squares)) / (NUM_PROBES * (NUM_PROBES - 1))
        return max(1.0, float((np.trace(gram) / NUM_PROBES) ** 2 / quartic)) if quartic else None

    def _gram(self) -> NDArray[np.float64]:
        """W^T Z; zeros where float32 cannot hold Z, for numbers near 1e19 and above."""
        if not np.isfinite(self._seen).all():
            return np.zeros((NUM_PROBES, NUM_PROBES))
        gram = self._probes.astype(np.float64).T @ self._seen
        return np.asarray((gram + gram.T) / 2)


@lru_cache(maxsize=8)
def _probes(width: int) -> Floats:
    """Random signs, [width, NUM_PROBES], the same for every matrix of this width."""
    signs = np.random.default_rng(width).integers(0, 2, (width, NUM_PROBES))
    return signs.astype(np.float32) * 2 - 1


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
    matrices = [name for name in layers if len(infos[name].shape) > 1]
    change = total(matrices).change if matrices else None
    of_both = [pair for name in matrices for pair in sums[name].pairs()]
    return Inspection(
        inputs=inputs,
        forecast=forecast(
            change.strength if change else None,
            _mean([changed / moved for moved, changed in of_both if moved and changed]),
        ),
        whole=total(sums),
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


def forecast(strength: float | None, against_residual: float | None = None) -> Forecast:
    """Say whether the graft will hold, from the strength of the change in the layers' matrices.

    Learned from runs of the pocket family with one residual: `benchmarks/forecast.py`. Residuals of
    other strength keep more or less than that (`studies/model_selection.yaml`), so nothing is
    promised where the change is weak against the weights and not against the residual, or the
    other way round. See docs/inspection.md.
    """
    rule = (
        f"In {NUM_RUNS} runs of the pocket family the graft kept {KEPT:.0%} of the instructions "
        f"wherever that was below {LIMIT * (1 - NEAR):.1%}, and nowhere above "
        f"{LIMIT * (1 + NEAR):.1%}"
    )
    moved = "the strongest direction of the layers' matrices"
    if strength is None:
        words = f"Name a newer base, to see how far continued pre-training moved {moved}. {rule}."
        return Forecast(outcome="open", strength=None, against_residual=None, words=words)
    sides = {_side(strength, LIMIT)}
    beside = ""
    if against_residual is not None:
        sides.add(_side(against_residual, LIMIT_AGAINST))
        beside = f", {against_residual:.2f} times as far as the residual moves it"
    outcome: Literal["holds", "doubtful", "breaks"]
    if sides == {-1}:
        outcome, expected = "holds", "expect the graft to hold at scale 1"
    elif sides == {1}:
        outcome, expected = "breaks", "expect the graft to lose instructions; "
        expected += "pre-train again with a lower learning rate, fewer tokens or more replay"
    else:
        outcome, expected = "doubtful", "it may go either way; evaluate the graft before all else"
        if sides == {-1, 1}:
            expected += f" (this residual is {'weaker' if strength < LIMIT else 'stronger'} than "
            expected += "the one that the rule was learned from)"
    words = (
        f"Continued pre-training moved {moved} by {strength:.1%} of the base's own{beside}, on "
        f"average: {expected}. {rule}; of larger models nothing was learned yet."
    )
    return Forecast(
        outcome=outcome, strength=strength, against_residual=against_residual, words=words
    )


def _side(value: float, limit: float) -> int:
    """-1 well below a limit, 1 well above it, 0 near it."""
    return -1 if value < limit * (1 - NEAR) else int(value > limit * (1 + NEAR))


def module_of(name: str) -> str:
    """A tensor's name within its layer, without `.weight` and the numbers of experts.

    Of `model.layers.3.mlp.experts.5.up_proj.weight` it is `mlp.experts.up_proj`.
    """
    layer = layer_of(name)
    within = name.removeprefix("model.") if layer is None else name.partition(f".{layer}.")[2]
    return EXPERT.sub("", within).removesuffix(".weight")


def _relative(square: float, base: float) -> float | None:
    return _rounded(math.sqrt(square / base)) if base else None


def _mean(numbers: list[float]) -> float | None:
    return _rounded(math.fsum(numbers) / len(numbers)) if numbers else None


def _rounded(number: float) -> float:
    return float(f"{number:.6g}")


def _refuse_graft(newer: Checkpoint) -> None:
    if newer.record and newer.record.residuals:
        raise ResidualError(
            f"{newer.path}: expected what the base became before anything was grafted, found a "
            "graft or one that was trained from a graft; name the checkpoint that came before"
        )
