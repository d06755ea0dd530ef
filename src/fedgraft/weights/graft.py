"""grafted = target + scale * residual: instructions grafted onto fresh knowledge.

Computed in float32, rounded once to the target's dtype, streamed. The target must be known to
descend from the base that was subtracted, by content hash, not by name.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedgraft.errors import NonFiniteError, ResidualError
from fedgraft.provenance import Record, new_artefact
from fedgraft.weights.checkpoint import CONFIG_DTYPES, Array, Checkpoint, read_config
from fedgraft.weights.family import Anatomy
from fedgraft.weights.residual import INSTRUCT, Residual, all_finite, refuse_non_finite
from fedgraft.weights.writer import copy_companions, write_tensors


def graft(
    target: str | Path,
    residual: str | Path,
    out: Path,
    *,
    scale: float = 1.0,
    any_parent: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write `target + scale * residual` to the directory `out`, which loads as it is.

    It carries the config, generation config, tokenizer and chat template of the instruct side.
    Where the target has other padding rows than the residual, its number of rows is kept.

    Args:
        any_parent: Accept a target that is not known to descend from the residual's base. Nothing
            else is relaxed.

    Raises:
        ResidualError: The target has another architecture, size or vocabulary, descends from
            another base or is not known to descend from it, is or holds the instruct model, or was
            grafted already; or the scale is not finite.
        NonFiniteError: The target or the residual holds NaN or infinity, or the sum is too large
            for the target's dtype.
        ArtefactError: `out` exists or cannot be written.
    """
    if not math.isfinite(scale):
        raise ResidualError(f"expected a finite scale, found {scale}; the plain sum has scale 1.0")
    checkpoint, addend = Checkpoint.open(target), Residual.open(residual)
    anatomy = Anatomy.of(checkpoint.path, checkpoint.config, checkpoint.tensors)
    difference = anatomy.first_difference(addend.anatomy)
    if difference:
        raise ResidualError(
            f"the residual {residual} does not fit {target}: {difference}. Extract it from the "
            "family that the target belongs to"
        )
    _check_lineage(checkpoint, addend, any_parent=any_parent)
    factor = np.float32(scale)

    def blocks(name: str) -> Iterator[Array]:
        addends = addend.blocks(name)
        for block in checkpoint.blocks(name):
            added = next(addends, block[:0])[: block.size]  # padding rows may lack on either side
            total = block.astype(np.float32)
            with np.errstate(over="ignore", invalid="ignore"):
                total[: added.size] += factor * added.astype(np.float32, copy=False)
                grafted = total.astype(block.dtype)
            if not all_finite(grafted):
                refuse_non_finite(block, name, checkpoint.path)
                refuse_non_finite(added, name, addend.path)
                raise NonFiniteError(
                    f"{checkpoint.path}: expected sums within {block.dtype}, found larger ones in "
                    f"tensor {name!r} at scale {scale}; take a smaller scale"
                )
            yield grafted

    with new_artefact(out, overwrite=overwrite) as folder:
        layout = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
        write_tensors(folder, layout, blocks)
        copy_companions(addend.path / INSTRUCT, folder)
        _fit_config(folder, checkpoint, anatomy.vocabulary.num_rows)
        record = checkpoint.record
        Record.make(
            kind="graft",
            inputs={"target": checkpoint.content_hash, "residual": addend.content_hash},
            ancestors=(*(record.ancestors if record else ()), checkpoint.content_hash),
            residuals=(addend.content_hash,),
            settings={"scale": scale},
        ).write(folder)
    return out


def _check_lineage(target: Checkpoint, residual: Residual, *, any_parent: bool) -> None:
    """Refuse a target that has the instructions already, or that may not descend from the base."""
    record = target.record
    if record and record.residuals:
        raise ResidualError(
            f"{target.path}: expected a checkpoint without instructions, found a graft or one that "
            "was trained from a graft; a residual is added once. Graft onto the checkpoint that "
            "came before"
        )
    lineage = {target.content_hash, *(record.ancestors if record else ())}
    if residual.instruct_hash in lineage and residual.instruct_hash != residual.base_hash:
        raise ResidualError(
            f"{target.path}: expected a descendant of the base, found the instruct model itself or "
            "one trained from it; it follows instructions without a graft. Continue to pre-train "
            "the base and graft onto that"
        )
    if residual.base_hash in lineage or any_parent:
        return
    known = "descends from another base" if record else "has no record of its ancestors"
    raise ResidualError(
        f"{target.path}: expected a descendant of the residual's base {residual.base_hash[:19]}, "
        f"found {target.content_hash[:19]}, which {known}. Take a checkpoint that `fedgraft "
        "pretrain` made from that base; or, if you know that this one was, add --any-parent"
    )


def _fit_config(folder: Path, target: Checkpoint, num_rows: int) -> None:
    """Make the instruct side's config state the dtype and the rows that were written."""
    config = read_config(folder)
    sizes = Counter[str]()
    for info in target.tensors.values():
        sizes[info.dtype] += info.num_elements
    dtype = CONFIG_DTYPES[sizes.most_common(1)[0][0]]
    fitted = config | {
        "torch_dtype" if "torch_dtype" in config else "dtype": dtype,
        "vocab_size": num_rows,
    }
    if fitted != config:
        text = json.dumps(fitted, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
