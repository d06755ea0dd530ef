"""residual = instruct - base, tensor by tensor: what instruction tuning did to a model.

Computed in float32 and streamed. float32 holds the difference of two bfloat16 or float16 numbers
exactly, but for pairs of which one is more than 2^16 times as large as the other; what is not
restored bit for bit is counted in the record, by tensor, and the forms `auto` and `packed` carry
it along, so that they always give the instruct model back.

Rows for tokens lie in the order of the instruct side's ids. A row whose token the base lacks is
carried whole.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedgraft.errors import ResidualError
from fedgraft.provenance import Record, hash_json, new_artefact
from fedgraft.weights.arithmetic import (
    BFLOAT16,
    lost,
    squared_norm,
    subtract,
)
from fedgraft.weights.checkpoint import (
    BLOCK_ELEMENTS,
    DTYPES,
    Array,
    Fill,
    TensorFiles,
    TensorInfo,
    read_config,
    read_tensors,
)
from fedgraft.weights.family import Anatomy, Family, has_rows
from fedgraft.weights.forms import FRAME, Parts, logical, opened, packed_parts
from fedgraft.weights.workers import each_tensor
from fedgraft.weights.writer import Layout, copy_companions, write_growing, write_tensors

PREFIX, EXCEPTIONS = "residual", "exceptions"
INSTRUCT = "instruct"
"""Folder within a residual with the config, tokenizer and chat template that a graft will carry."""

Form = Literal["float32", "bfloat16", "auto", "packed"]
"""How `extract` stores numbers; all but bfloat16 give back what float32 can hold.

float32, bfloat16    as they are
auto                 bfloat16 for a tensor that it restores, else float32; exceptions carried
packed               float32 in compressed byte planes; exceptions carried
"""
CARRYING = ("auto", "packed")
PLAIN_FORMS = ("float32", "bfloat16", "auto")
"""Stored as the tensors themselves; other forms are stored as parts, see forms.py."""
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Exceptions:
    """Numbers of a tensor that base + residual does not restore: where, and what stood there.

    Where a target still has the base's number and the scale is 1, the graft takes the instruct
    side's.
    """

    index: Rows
    base: Array
    instruct: Array

    def restore(self, grafted: Array, old: Array, first: int) -> None:
        """Correct a block of a graft, of which `old` is the target's, from index `first` on."""
        low, high = np.searchsorted(self.index, [first, first + old.size])
        before, after = self.base[low:high], self.instruct[low:high]
        if before.dtype != old.dtype:
            return
        at, bits = self.index[low:high] - first, f"u{old.itemsize}"
        same = old[at].view(bits) == before.view(bits)
        grafted[at[same]] = after[same].astype(grafted.dtype)


class Residual(TensorFiles):
    """A residual on disk; `tensors` and `blocks` are its numbers, in whatever form they lie."""

    def __init__(self, path: Path, stored: Mapping[str, TensorInfo], record: Record) -> None:
        self.record = record
        self.companions = path / INSTRUCT
        self._parts = None if self.form in PLAIN_FORMS else TensorFiles(path, stored)
        super().__init__(path, stored if self._parts is None else logical(self._parts))
        if self._parts:
            self._digests = dict.fromkeys(self.tensors, b"")  # the parts are hashed, see below

    @classmethod
    def open(cls, source: "str | Path | Residual") -> "Residual":
        """Open what `extract` wrote; what is open already is returned as it is.

        Raises ResidualError where the directory is none or lacks the instruct side's files,
        CheckpointError where its tensors are damaged.
        """
        if isinstance(source, Residual):
            return source
        path = Path(source)
        record = Record.read(path)
        if record is None or record.kind != "residual":
            raise ResidualError(
                f"{path}: expected a residual, found {record.kind if record else 'no record'}; "
                "make one with `fedgraft residual extract BASE INSTRUCT --out DIR`"
            )
        if "form" not in record.settings:
            raise ResidualError(
                f"{path}: expected a residual of this version of fedgraft, found one of "
                f"{record.fedgraft} in another layout; extract it again"
            )
        if not (path / INSTRUCT / "config.json").is_file():
            raise ResidualError(
                f"{path}: expected the instruct side's config and tokenizer in {INSTRUCT}/, found "
                "no config.json there; copy the residual with that folder, or extract it again"
            )
        return cls(path, read_tensors(path, PREFIX), record)

    @property
    def form(self) -> str:
        return str(self.record.settings["form"])

    @property
    def num_bytes(self) -> int:
        """Bytes of the numbers as they are stored."""
        return sum(info.num_bytes for info in (self._parts or self).tensors.values())

    @cached_property
    def content_hash(self) -> str:
        """Hash of what is stored."""
        return self._parts.content_hash if self._parts else super().content_hash

    @contextmanager
    def _opened(self, name: str) -> Iterator[Fill]:
        shape = self.tensors[name].shape
        source = opened(self._parts, name, shape) if self._parts else super()._opened(name)
        with source as fill:
            yield fill

    @property
    def base_hash(self) -> str:
        """Content hash of the base that was subtracted."""
        return self.record.inputs["base"]

    @property
    def instruct_hash(self) -> str:
        return self.record.inputs["instruct"]

    @property
    def relative_norm(self) -> float:
        """||residual|| / ||base|| over all tensors: how far instruction tuning went."""
        return float(self.record.figures["relative_norm"])

    @cached_property
    def anatomy(self) -> Anatomy:
        return Anatomy.of(self.companions, read_config(self.companions), self.tensors)

    @property
    def whole_rows(self) -> Rows:
        """Rows whose token the base lacks: the residual has them whole."""
        spans = [np.arange(a, b) for a, b in self.record.settings["whole_rows"]]
        return np.concatenate([np.empty(0, np.int64), *spans])

    @cached_property
    def exceptions(self) -> Mapping[str, Exceptions]:
        """By tensor, what base + residual does not restore, where the form carries that."""
        if not (self.path / f"{EXCEPTIONS}.safetensors").exists():
            return {}
        files = TensorFiles(self.path, read_tensors(self.path, EXCEPTIONS))
        names = [name.removesuffix(".index") for name in files.tensors if name.endswith(".index")]
        return {
            name: Exceptions(*(files.read(f"{name}.{part}") for part in ("index", *PARENTS)))
            for name in names
        }

    @property
    def sources(self) -> tuple[TensorFiles, ...]:
        """What its numbers are read from."""
        return (self,)

    def refuse_damage(self) -> None:
        """Raise ResidualError where the numbers are not those that were written."""
        written = self.record.figures["content"]
        if self.content_hash != written:
            raise ResidualError(
                f"{self.path}: expected the numbers {written[:19]} that were written, found "
                f"{self.content_hash[:19]}; the files were damaged or changed. Extract it again"
            )


PARENTS = ("base", "instruct")


class Difference:
    """The residual of a family, computed as it is read; otherwise like a Residual."""

    exceptions: Mapping[str, Exceptions] = {}

    def __init__(self, family: Family) -> None:
        self.family = family
        self.path = self.companions = family.instruct.path
        self.anatomy = family.anatomy
        self.tensors = family.instruct.tensors

    @property
    def base_hash(self) -> str:
        return self.family.base.content_hash

    @property
    def instruct_hash(self) -> str:
        return self.family.instruct.content_hash

    @property
    def content_hash(self) -> str:
        return hash_json([self.base_hash, self.instruct_hash])

    @property
    def whole_rows(self) -> Rows:
        return np.flatnonzero(self.family.base_rows < 0)

    @property
    def sources(self) -> tuple[TensorFiles, ...]:
        return (self.family.base, self.family.instruct)

    def refuse_damage(self) -> None:
        """Nothing is stored that could be damaged."""

    def blocks(self, name: str, num_elements: int = BLOCK_ELEMENTS) -> Iterator[Array]:
        """Yield instruct - base in float32, flat, in order; valid until the next is asked for."""
        buffer = np.empty(min(num_elements, self.tensors[name].num_elements), np.float32)
        for old, new in self.pairs(name, num_elements):
            yield np.subtract(new, old, out=buffer[: old.size], dtype=np.float32)

    def pairs(self, name: str, num_elements: int = BLOCK_ELEMENTS) -> Iterator[tuple[Array, Array]]:
        """Yield blocks of the base, in the order of the instruct side's tokens, and of that."""
        base, instruct, rows = self.family.base, self.family.instruct, self.family.base_rows
        straight = not has_rows(name) or np.array_equal(
            rows, np.arange(base.tensors[name].shape[0])
        )
        olds = base.blocks(name, num_elements) if straight else base.rows(name, rows, num_elements)
        return zip(olds, instruct.blocks(name, num_elements), strict=True)


@dataclass(slots=True)
class _Figures:
    """What is measured of one tensor while it passes."""

    squared_residual: float = 0.0
    squared_base: float = 0.0
    num_not_restored: int = 0
    exceptions: list[Exceptions] = field(default_factory=list)


def extract(
    family: Family, out: Path, *, form: Form = "float32", overwrite: bool = False
) -> Residual:
    """Write the residual of a family to the directory `out` and open it.

    bfloat16 takes half the space and restores about 99 % of the elements; packed takes less than
    that and restores all.

    Raises ResidualError for a form that there is not, NonFiniteError naming a tensor with NaN or
    infinity, ArtefactError where `out` exists or cannot be written.
    """
    if form not in get_args(Form):
        raise ResidualError(f"expected a form among {', '.join(get_args(Form))}, found {form!r}")
    base, instruct, difference = family.base, family.instruct, Difference(family)
    seen = {name: _Figures() for name in difference.tensors}

    def stored(name: str, dtype: str, num_elements: int = BLOCK_ELEMENTS) -> Iterator[Array]:
        """The difference as it is stored; what it restores is measured as it passes."""
        figures, first = seen[name], 0
        small = np.empty(min(num_elements, difference.tensors[name].num_elements), DTYPES[dtype])
        for old, new in difference.pairs(name, num_elements):
            found = subtract(old, new, small)
            squares = found.squared_base, found.squared_residual
            if not all(map(math.isfinite, squares)):  # NaN, infinity, or large numbers
                before = old.astype(np.float32)
                residual = np.subtract(new, before, dtype=np.float32)
                squares = (
                    squared_norm(before, name, base.path),
                    squared_norm(residual, name, instruct.path),
                )
            figures.squared_base += squares[0]
            figures.squared_residual += squares[1]
            figures.num_not_restored += found.lost.size
            if found.lost.size and form in CARRYING:
                carried = Exceptions(first + found.lost, old[found.lost], new[found.lost])
                figures.exceptions.append(carried)
            first += found.block.size
            yield found.block

    def packed(name: str) -> Parts:
        return packed_parts(difference.tensors[name].shape, stored(name, "F32", FRAME))

    num_bytes = {name: info.num_bytes for name, info in difference.tensors.items()}
    with new_artefact(out, overwrite=overwrite) as folder:
        if form == "packed":
            written = write_growing(
                folder, num_bytes, packed, prefix=PREFIX, report=seen.__getitem__
            )
        else:
            layout = _layout(difference, form)

            def plain(name: str) -> Iterator[Array]:
                return stored(name, layout[name][0])

            written = write_tensors(folder, layout, plain, prefix=PREFIX, report=seen.__getitem__)
        seen = dict(written.reports)
        _write_exceptions(folder, {name: f.exceptions for name, f in seen.items()})
        (folder / INSTRUCT).mkdir()
        copy_companions(instruct.path, folder / INSTRUCT)
        not_restored = {name: f.num_not_restored for name, f in seen.items()}
        squares = [(f.squared_residual, f.squared_base) for f in seen.values()]
        residual_norm, base_norm = (math.sqrt(math.fsum(s)) for s in zip(*squares, strict=True))
        Record.make(
            kind="residual",
            inputs={"base": base.content_hash, "instruct": instruct.content_hash},
            settings={"form": form, "whole_rows": _spans(difference.whole_rows)},
            figures={
                "relative_norm": float(f"{residual_norm / (base_norm or 1.0):.6g}"),
                "num_elements": instruct.num_parameters,
                "num_not_restored": sum(not_restored.values()),
                "not_restored": {name: n for name, n in not_restored.items() if n},
                "content": written.content,
            },
        ).write(folder)
    return Residual.open(out)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What `verify` found."""

    parents: Mapping[str, tuple[str, str]]
    """`base` and `instruct` -> content hash recorded, content hash found."""
    content: tuple[str, str]
    """Of the residual's own numbers: recorded, found."""
    num_elements: int
    not_restored: Mapping[str, int]
    """Tensor -> numbers that a graft onto the base at scale 1 does not restore bit for bit."""

    @property
    def sound(self) -> bool:
        """Whether the parents and the numbers are those of the record."""
        return all(a == b for a, b in (*self.parents.values(), self.content))


def verify(residual: Residual, family: Family) -> Verification:
    """Read a residual and both parents again: compare hashes, and add base + residual.

    Raises ResidualError where the two do not fit, CheckpointError where a file cannot be read.
    """
    found, own = family.anatomy, residual.anatomy
    difference = found.first_difference(own)
    if not difference and found.shapes != own.shapes:  # other padding rows, which a family may have
        name = next(name for name in own.shapes if found.shapes[name] != own.shapes[name])
        difference = f"tensor {name!r} has shape {[*found.shapes[name]]} and {[*own.shapes[name]]}"
    if difference:
        raise ResidualError(
            f"the residual {residual.path} does not fit {family.instruct.path}: {difference}. Name "
            "the two checkpoints that it was extracted from"
        )

    def check(name: str) -> int:
        exceptions, first, num_lost = residual.exceptions.get(name), 0, 0
        pairs = Difference(family).pairs(name)
        for (old, new), block in zip(pairs, residual.blocks(name), strict=True):
            amiss = first + lost(old, block, new)
            if exceptions:
                amiss = np.setdiff1d(amiss, exceptions.index, assume_unique=True)
            num_lost += amiss.size
            first += block.size
        return num_lost

    sizes = {name: info.num_bytes for name, info in family.instruct.tensors.items()}
    not_restored = each_tensor(f"verifying {residual.path.name}", sizes, check)
    return Verification(
        parents={
            "base": (residual.base_hash, family.base.content_hash),
            "instruct": (residual.instruct_hash, family.instruct.content_hash),
        },
        content=(residual.record.figures["content"], residual.content_hash),
        num_elements=family.num_parameters,
        not_restored={name: n for name, n in not_restored.items() if n},
    )


def _layout(difference: Difference, form: Form) -> Layout:
    """Choose each tensor's dtype; for `auto` bfloat16 where it restores the tensor exactly."""
    dtypes = dict.fromkeys(difference.tensors, "BF16" if form == "bfloat16" else "F32")

    def choose(name: str) -> str:
        small = np.empty(min(BLOCK_ELEMENTS, difference.tensors[name].num_elements), BFLOAT16)
        exact = all(not subtract(*pair, small).lost.size for pair in difference.pairs(name))
        return "BF16" if exact else "F32"

    if form == "auto":
        sizes = {name: info.num_bytes for name, info in difference.tensors.items()}
        dtypes = each_tensor("choosing dtypes", sizes, choose)
    return {name: (dtypes[name], info.shape) for name, info in difference.tensors.items()}


def _write_exceptions(folder: Path, carried: Mapping[str, list[Exceptions]]) -> None:
    parts: dict[str, Array] = {}
    for name, found in carried.items():
        if found:
            parts[f"{name}.index"] = np.concatenate([e.index for e in found])
            parts[f"{name}.base"] = np.concatenate([e.base for e in found])
            parts[f"{name}.instruct"] = np.concatenate([e.instruct for e in found])
    if parts:
        names = {dtype: name for name, dtype in DTYPES.items()}
        layout = {name: (names[part.dtype], part.shape) for name, part in parts.items()}
        write_tensors(folder, layout, lambda name: [parts[name]], prefix=EXCEPTIONS)


def _spans(rows: Rows) -> list[list[int]]:
    """Write ascending row numbers as [first, behind the last] pairs."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    edges = [0, *breaks.tolist(), len(rows)] if len(rows) else [0]
    return [[int(rows[a]), int(rows[b - 1]) + 1] for a, b in pairwise(edges)]
