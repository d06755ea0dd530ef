"""grafted = target + scale * residual: instructions grafted onto fresh knowledge.

Computed in float32, rounded once to the target's dtype, streamed. The target must be known to
descend from the base that was subtracted, by content hash, not by name.

Rows for tokens come to lie in the order of the instruct side's ids, whose tokenizer the graft
carries; tokens that only the target has are kept behind them.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fedgraft.errors import ArtefactError, NonFiniteError, ResidualError
from fedgraft.provenance import Record, new_artefact
from fedgraft.weights.arithmetic import (
    Floats,
    add,
    all_finite,
    refuse_non_finite,
)
from fedgraft.weights.checkpoint import (
    BLOCK_ELEMENTS,
    CONFIG_DTYPES,
    DTYPES,
    Array,
    Checkpoint,
    TensorFiles,
    read_config,
    read_tensors,
)
from fedgraft.weights.family import Anatomy, Family, anatomy_of, has_rows
from fedgraft.weights.merging import PLAIN, Factors, Method, combined
from fedgraft.weights.residual import Difference, Residual
from fedgraft.weights.rows import RowMap
from fedgraft.weights.vocabulary import name_tokens
from fedgraft.weights.writer import Layout, copy_companions, write_tensors

Addend = Residual | Difference
Source = str | Path | Addend | Family
"""Where a residual comes from: its directory, or a family to subtract while it is read."""


def graft(
    target: str | Path | Checkpoint,
    residual: Source | Sequence[Source],
    out: Path,
    *,
    scale: float | Sequence[float] = 1.0,
    method: Method = PLAIN,
    factors: Factors = Factors(),  # noqa: B008 (frozen)
    any_parent: bool = False,
    again: bool = False,
    overwrite: bool = False,
    verify: bool = False,
) -> Path:
    """Write `target + scale * residual` to the directory `out`, which loads as it is.

    It carries the config, generation config, tokenizer and chat template of the instruct side.
    The target keeps its number of rows for tokens; it grows where the instruct side has tokens
    that it lacks.

    Args:
        residual: One residual, or several of one base, which `method` combines.
        scale: The factor on the residual, or one for each.
        factors: Further factors, by kind of module and by layer.
        any_parent: Accept a target that is not known to descend from the residual's base. Nothing
            else is relaxed.
        again: Accept a target that has instructions already: the instruct model, one trained from
            it, or a graft. For whoever asks what a residual brings back.
        verify: Read what was written back from the disk and compare hashes.

    Raises:
        ResidualError: The target has another architecture, size or vocabulary, descends from
            another base or is not known to descend from it, is or holds the instruct model or was
            grafted already (unless `again`); two residuals are of different bases, or one is given
            twice; a scale is not finite.
        NonFiniteError: The target or a residual holds NaN or infinity, or the sum is too large
            for the target's dtype.
        ArtefactError: `out` exists or cannot be written, or reads back other than it was written.
    """
    checkpoint, addends = Checkpoint.open(target), _open(residual)
    _check_scales(scale, addends)
    anatomy, carrier = anatomy_of(checkpoint), addends[0]
    _check_sizes(checkpoint, anatomy, addends)
    _check_one_base(addends)
    factors.check(checkpoint.tensors.keys())
    if not again:
        _check_ungrafted(checkpoint, addends)
    ancestors = set(checkpoint.record.ancestors if checkpoint.record else ())
    if isinstance(carrier, Residual):  # its parents are known without reading them
        if carrier.base_hash not in ancestors and not any_parent:
            ancestors.add(checkpoint.content_hash)
        _check_lineage(checkpoint, addends, ancestors, any_parent=any_parent, again=again)
    total = _Sum(
        target=checkpoint,
        addends=addends,
        scale=scale,
        method=method,
        factors=factors,
        rows=RowMap.match(
            anatomy.vocabulary, carrier.anatomy.vocabulary, carrier.whole_rows, checkpoint.path
        ),
    )
    _check_whole_rows(total)
    with new_artefact(out, overwrite=overwrite) as folder:
        content = write_tensors(folder, total.layout, total.blocks).content
        for addend in addends:
            addend.refuse_damage()
        ancestors.add(checkpoint.content_hash)
        _check_lineage(checkpoint, addends, ancestors, any_parent=any_parent, again=again)
        if verify:
            _read_back(folder, content)
        copy_companions(carrier.companions, folder)
        _fit_config(folder, total.layout, len(total.rows.picks))
        name_tokens(folder, total.rows.kept, total.rows.first_kept, like=checkpoint.path)
        total.record(content).write(folder)
    return out


@dataclass(frozen=True, kw_only=True)
class _Sum:
    """The tensors of a graft, block by block, and what they were made of."""

    target: Checkpoint
    addends: list[Addend]
    scale: float | Sequence[float]
    """As it was given."""
    method: Method
    factors: Factors
    rows: RowMap

    @cached_property
    def layout(self) -> Layout:
        num_rows = len(self.rows.picks)
        return {
            name: (info.dtype, (num_rows, *info.shape[1:]) if has_rows(name) else info.shape)
            for name, info in self.target.tensors.items()
        }

    @property
    def is_plain(self) -> bool:
        """Whether one residual is added as it is."""
        return len(self.addends) == 1 and self.method == PLAIN

    def blocks(self, name: str) -> Iterator[Array]:
        """A tensor of the graft. Raises NonFiniteError as `graft` says."""
        dtype, shape = self.layout[name]
        small = np.empty(min(BLOCK_ELEMENTS, math.prod(shape)), DTYPES[dtype])
        factor = self.factors.of(name) * _each(self.scale, self.addends)[0]
        is_exact = self.is_plain and factor == 1.0
        exceptions = self.addends[0].exceptions.get(name) if is_exact else None
        first = 0
        for old, added in self._pairs(name):
            grafted, finite = add(old, added, small)
            if exceptions:
                exceptions.restore(grafted, old, first)
            if not finite and not all_finite(grafted):
                self._refuse_non_finite(name)
            first += old.size
            yield grafted

    def _pairs(self, name: str) -> Iterator[tuple[Array, Floats]]:
        """Blocks of the target, each with what is added to it."""
        factor, rows = self.factors.of(name), self.rows
        scales = [factor * scale for scale in _each(self.scale, self.addends)]
        sums = combined(name, self.addends, scales, self.method)
        if rows.straight or not has_rows(name):
            return zip(self.target.blocks(name), sums, strict=True)
        if rows.whole.any():
            sums = self.addends[0].blocks(name)
        width = math.prod(self.layout[name][1][1:])
        return rows.fitted(sums, self.target.rows(name, rows.picks), width, scales[0])

    def _refuse_non_finite(self, name: str) -> NoReturn:
        """Name the number that is not finite, or say that the sum is too large."""
        for source in (self.target, *(s for addend in self.addends for s in addend.sources)):
            for block in source.blocks(name):
                refuse_non_finite(block, name, source.path)
        raise NonFiniteError(
            f"{self.target.path}: expected sums within {DTYPES[self.layout[name][0]]}, found "
            f"larger ones in tensor {name!r} at scale {self.scale}; take a smaller scale"
        )

    def record(self, content: str) -> Record:
        """What the graft was made of."""
        before = self.target.record
        hashes = [addend.content_hash for addend in self.addends]
        named = {f"residual {n}" if n > 1 else "residual": one for n, one in enumerate(hashes, 1)}
        settings: dict[str, Any] = {"scale": self.scale}
        if self.method != PLAIN:
            settings["method"] = self.method.model_dump()
        if self.factors != Factors():
            settings["factors"] = self.factors.model_dump()
        return Record.make(
            kind="graft",
            inputs={"target": self.target.content_hash, **named},
            ancestors=(*(before.ancestors if before else ()), self.target.content_hash),
            residuals=(*(before.residuals if before else ()), *hashes),
            settings=settings,
            figures={"content": content},
        )


def _open(residuals: Source | Sequence[Source]) -> list[Addend]:
    given = (
        residuals
        if isinstance(residuals, Sequence) and not isinstance(residuals, str)
        else [residuals]
    )
    if not given:
        raise ResidualError("expected at least one residual, found none; name one to graft")
    return [_opened(one) for one in given]


def _opened(source: Source) -> Addend:
    if isinstance(source, Difference):
        return source
    return Difference(source) if isinstance(source, Family) else Residual.open(source)


def _each(scale: float | Sequence[float], addends: Sequence[Addend]) -> list[float]:
    """The factor on each residual."""
    return [scale] * len(addends) if isinstance(scale, (int, float)) else list(scale)


def _check_scales(scale: float | Sequence[float], addends: Sequence[Addend]) -> None:
    scales = _each(scale, addends)
    if len(scales) != len(addends):
        raise ResidualError(
            f"expected one scale, or one for each of {len(addends)} residuals, found {len(scales)}"
        )
    for one in scales:
        if not math.isfinite(one):
            raise ResidualError(
                f"expected a finite scale, found {one}; the plain sum has scale 1.0"
            )


def _check_sizes(target: Checkpoint, anatomy: Anatomy, addends: Sequence[Addend]) -> None:
    for addend in addends:
        difference = anatomy.first_difference(addend.anatomy)
        if difference:
            raise ResidualError(
                f"the residual {addend.path} does not fit {target.path}: {difference}. Extract it "
                "from the family that the target belongs to; where the target was trained under "
                "other settings (rope_theta), set them in the config.json of base and instruct "
                "model first, for a graft carries the instruct model's"
            )


def _check_whole_rows(total: _Sum) -> None:
    """Refuse to combine rows for tokens of the instruct side alone, of which no base is known."""
    if total.rows.whole.any() and not total.is_plain:
        raise ResidualError(
            f"{total.addends[0].path}: expected tokens that its base knows too, found "
            f"{int(total.rows.whole.sum())} rows that only the instruct side has; add such a "
            "residual alone, and plainly"
        )


def _check_one_base(addends: Sequence[Addend]) -> None:
    """Refuse residuals of different bases, other orders of tokens, and one residual given twice."""
    first, *others = addends
    for n, other in enumerate(others, 1):
        if other.base_hash != first.base_hash:
            raise ResidualError(
                f"expected residuals of one base, found {first.path} of {first.base_hash[:19]} and "
                f"{other.path} of {other.base_hash[:19]}; extract both against the same base"
            )
        if other.anatomy.vocabulary != first.anatomy.vocabulary:
            raise ResidualError(
                f"expected residuals with the same tokens in the same order, found others in "
                f"{first.path} and {other.path}; tune both from one tokenizer"
            )
        if any(other.instruct_hash == earlier.instruct_hash for earlier in addends[:n]):
            raise ResidualError(
                f"expected different residuals, found {other.path} twice; a residual is added "
                "once, a larger scale adds more of it"
            )


def _check_ungrafted(target: Checkpoint, addends: Sequence[Addend]) -> None:
    record = target.record
    if record and record.residuals:
        this = any(isinstance(a, Residual) and a.content_hash in record.residuals for a in addends)
        raise ResidualError(
            f"{target.path}: expected a checkpoint without instructions, found a graft or one that "
            f"was trained from a graft{', of this very residual' if this else ''}; a residual is "
            "added once. Graft onto the checkpoint that came before"
        )


def _check_lineage(
    target: Checkpoint,
    addends: Sequence[Addend],
    lineage: set[str],
    *,
    any_parent: bool,
    again: bool,
) -> None:
    """Refuse a target that has the instructions already, or that may not descend from the base."""
    base_hash, record = addends[0].base_hash, target.record
    if not again and any(
        a.instruct_hash in lineage and a.instruct_hash != base_hash for a in addends
    ):
        raise ResidualError(
            f"{target.path}: expected a descendant of the base, found the instruct model itself or "
            "one trained from it; it follows instructions without a graft. Continue to pre-train "
            "the base and graft onto that"
        )
    if base_hash in lineage or any_parent:
        return
    known = "descends from another base" if record else "has no record of its ancestors"
    raise ResidualError(
        f"{target.path}: expected a descendant of the residual's base {base_hash[:19]}, "
        f"found {target.content_hash[:19]}, which {known}. Take a checkpoint that `fedgraft "
        "pretrain` made from that base; or, if you know that this one was, add --any-parent"
    )


def _read_back(folder: Path, content: str) -> None:
    """Compare what the disk gives back with what was written."""
    tensors = read_tensors(folder, "model")
    for file in {info.file for info in tensors.values()}:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            if hasattr(os, "posix_fadvise"):  # not on macOS, where its cache may answer
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found = TensorFiles(folder, tensors).content_hash
    if found != content:
        raise ArtefactError(
            f"{folder.parent}: expected to read back {content[:19]} as it was written, found "
            f"{found[:19]}; the disk or the memory is faulty. Write to another disk"
        )


def _fit_config(folder: Path, layout: Layout, num_rows: int) -> None:
    """Make the instruct side's config state the dtype and the rows that were written."""
    config = read_config(folder)
    sizes = Counter[str]()
    for dtype, shape in layout.values():
        sizes[dtype] += math.prod(shape)
    fitted = config | {
        "torch_dtype" if "torch_dtype" in config else "dtype": CONFIG_DTYPES[
            sizes.most_common(1)[0][0]
        ],
        "vocab_size": num_rows,
    }
    if fitted != config:
        text = json.dumps(fitted, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
