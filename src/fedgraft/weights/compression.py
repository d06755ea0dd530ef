"""A residual in fewer bytes: without loss, or with a loss that its record states.

Matrices are what is made small. Tensors of one dimension (norms and biases), an embedding with rows
of which the base has none, and whatever a form has nothing to gain from stay exact, packed.
"""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from fedgraft.errors import ResidualError
from fedgraft.provenance import Record, derive_seed, new_artefact
from fedgraft.weights.arithmetic import Floats, squared_norm
from fedgraft.weights.checkpoint import TensorFiles, read_tensors
from fedgraft.weights.family import has_rows
from fedgraft.weights.forms import (
    FRAME,
    Parts,
    int8_parts,
    low_rank_parts,
    packed_parts,
    sign_parts,
)
from fedgraft.weights.lowrank import low_rank
from fedgraft.weights.residual import EXCEPTIONS, INSTRUCT, PREFIX, Residual
from fedgraft.weights.threshold import above, magnitudes, thresholds
from fedgraft.weights.workers import each_tensor
from fedgraft.weights.writer import write_growing, write_tensors

SmallForm = Literal["packed", "lowrank", "sign", "int8", "sparse"]
"""How `compress` stores the numbers of a matrix.

packed     exactly, in compressed byte planes
lowrank    two factors of the rank
sign       a bit each and their mean magnitude; embeddings stay exact, as in BitDelta
int8       a byte each, a scale for 128 of them
sparse     the largest share of them by magnitude, exactly; the others are zero
"""
ROWS_AT_ONCE = 1 << 20
"""Numbers in the rows that are multiplied at once: 4 MB, which keep a core busy."""


def compress(
    source: str | Path | Residual,
    out: Path,
    form: SmallForm,
    *,
    rank: int = 16,
    density: float = 0.1,
    seed: int = 0,
    overwrite: bool = False,
) -> Residual:
    """Write a residual in another form to the directory `out` and open it.

    Its record has the bytes and the relative error, ||decoded - r|| / ||r|| over all tensors.

    Args:
        rank: Of the factors; `lowrank` alone reads it.
        density: The share of each matrix's numbers that is kept; `sparse` alone reads it.
        seed: Of the random start of the factors.

    Raises:
        ResidualError: There is no such residual or form, the rank is above a matrix's, the density
            is no share, or the residual's files were damaged.
        NonFiniteError: The residual holds NaN or infinity.
        ArtefactError: `out` exists or cannot be written.
    """
    residual = Residual.open(source)
    settings: dict[str, object] = {}
    if form not in get_args(SmallForm):
        raise ResidualError(
            f"expected a form among {', '.join(get_args(SmallForm))}, found {form!r}"
        )
    matrices = [name for name in residual.tensors if _is_matrix(residual, name)]
    if form == "lowrank":
        _check_rank(residual, matrices, rank)
        settings = {"rank": rank, "seed": seed}
    if form == "sparse":
        if not 0 < density <= 1:
            raise ResidualError(
                f"expected a density above 0 and at most 1, the share of numbers that is kept, "
                f"found {density}; 0.1 keeps a tenth"
            )
        settings = {"density": density}

    def parts(name: str) -> Parts:
        shape, blocks = residual.tensors[name].shape, residual.blocks(name, FRAME)
        if name not in matrices or (form == "sign" and has_rows(name)):
            return packed_parts(shape, blocks)
        match form:
            case "packed":
                return packed_parts(shape, blocks)
            case "lowrank":
                return low_rank_parts(*_factors(residual, name, rank, seed))
            case "sign":
                return sign_parts(shape, blocks)
            case "int8":
                return int8_parts(shape, blocks)
            case "sparse":
                return packed_parts(shape, _largest(residual, name, density))

    with new_artefact(out, overwrite=overwrite) as folder:
        content = write_growing(folder, _sizes(residual), parts, prefix=PREFIX).content
        shutil.copytree(residual.companions, folder / INSTRUCT)
        if form == "packed":
            for file in residual.path.glob(f"{EXCEPTIONS}*.safetensors*"):
                shutil.copyfile(file, folder / file.name)
        record = Record.make(
            "residual",
            inputs={**residual.record.inputs, "residual": residual.content_hash},
            settings={**residual.record.settings, "form": form, **settings},
        )
        small = Residual(folder, read_tensors(folder, PREFIX), record)
        squares = _squares(residual, small)
        residual.refuse_damage()
        known = residual.record.figures
        figures = {
            **(known if form == "packed" else {"num_elements": known["num_elements"]}),
            "relative_norm": _rounded(residual.relative_norm * _ratio(squares, "decoded")),
            "relative_error": _rounded(_ratio(squares, "lost")),
            "num_bytes": small.num_bytes,
            "content": content,
        }
        record.model_copy(update={"figures": figures}).write(folder)
    return Residual.open(out)


def write_adapter(
    source: str | Path | Residual,
    out: Path,
    *,
    rank: int = 16,
    seed: int = 0,
    overwrite: bool = False,
) -> Record:
    """Write the low-rank form of the linear layers as a PEFT adapter; return its record.

    Attached to a newer base it is a graft that can be switched off: peft, and servers that take
    such adapters, load the directory as it is. Embeddings, norms and biases are not in it; the
    record says what share of ||r||^2 they hold (`share_left_out`) and what is lost in all
    (`relative_error`).

    Raises as `compress` does, and ResidualError where no tensor is a linear layer of a block.
    """
    residual = Residual.open(source)
    layers = [name for name in residual.tensors if _is_linear(residual, name)]
    if not layers:
        raise ResidualError(
            f"{residual.path}: expected linear layers, with names that end in _proj.weight, found "
            f"none among {len(residual.tensors)} tensors; compress it to the form lowrank instead"
        )
    _check_rank(residual, layers, rank)
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    places: dict[str, str] = {}
    for name in layers:
        rows, columns = residual.tensors[name].shape
        for key, part, shape in (("A", "right", (rank, columns)), ("B", "left", (rows, rank))):
            tensor = f"base_model.model.{name.removesuffix('.weight')}.lora_{key}.weight"
            layout[tensor], places[tensor] = ("F32", shape), f"{name}.{part}"

    def parts(name: str) -> Parts:
        return low_rank_parts(*_factors(residual, name, rank, seed))

    with new_artefact(out, overwrite=overwrite) as folder:
        workshop = folder / "factors"
        workshop.mkdir()
        sizes = {name: size for name, size in _sizes(residual).items() if name in layers}
        write_growing(workshop, sizes, parts, prefix=PREFIX)
        factors = TensorFiles(workshop, read_tensors(workshop, PREFIX))
        content = write_tensors(
            folder, layout, lambda name: factors.blocks(places[name]), prefix="adapter_model"
        ).content
        record = Record.make(
            "adapter",
            inputs={"base": residual.base_hash, "residual": residual.content_hash},
            settings={"form": "lowrank", "rank": rank, "seed": seed},
        )
        attached = Residual(workshop, factors.tensors, record)
        squares = _squares(residual, attached)
        residual.refuse_damage()
        shutil.rmtree(workshop)
        _write_config(folder, layers, rank)
        outside = {name: found for name, found in squares.items() if name not in layers}
        figures = {
            "relative_error": _rounded(_ratio(squares, "lost")),
            "share_left_out": _rounded(_total(outside, "whole") / (_total(squares, "whole") or 1)),
            "num_bytes": sum(math.prod(shape) * 4 for _, shape in layout.values()),
            "content": content,
        }
        record = record.model_copy(update={"figures": figures})
        record.write(folder)
    return record


@dataclass(slots=True)
class _Squares:
    """Sums of squares of a tensor: of its numbers, of the decoded ones, of the difference."""

    whole: float = 0.0
    decoded: float = 0.0
    lost: float = 0.0


def _squares(residual: Residual, small: Residual) -> Mapping[str, _Squares]:
    """Compare what comes back with what was there; a tensor that is not stored is lost whole."""

    def compare(name: str) -> _Squares:
        sums = _Squares()
        found = small.blocks(name, FRAME) if name in small.tensors else None
        for block in residual.blocks(name, FRAME):
            numbers = block.astype(np.float32, copy=False)
            back = next(found) if found else np.zeros_like(numbers)
            sums.whole += squared_norm(numbers, name, residual.path)
            sums.decoded += squared_norm(back, name, residual.path)
            sums.lost += squared_norm(numbers - back, name, residual.path)
        return sums

    return each_tensor("comparing", _sizes(residual), compare)


def _total(squares: Mapping[str, _Squares], which: Literal["whole", "decoded", "lost"]) -> float:
    return math.fsum(getattr(found, which) for found in squares.values())


def _ratio(squares: Mapping[str, _Squares], which: Literal["decoded", "lost"]) -> float:
    """Return the norm of that, relative to the residual's."""
    return math.sqrt(_total(squares, which) / (_total(squares, "whole") or 1.0))


def _rounded(figure: float) -> float:
    return float(f"{figure:.6g}")


def _sizes(residual: Residual) -> dict[str, int]:
    return {name: info.num_bytes for name, info in residual.tensors.items()}


def _is_matrix(residual: Residual, name: str) -> bool:
    """Whether the tensor is one that forms with a loss change."""
    whole = has_rows(name) and residual.whole_rows.size
    return len(residual.tensors[name].shape) == 2 and not whole


def _is_linear(residual: Residual, name: str) -> bool:
    """Whether the tensor is a linear layer that PEFT can adapt, by the names of Llama's kin."""
    return len(residual.tensors[name].shape) == 2 and name.endswith("_proj.weight")


def _check_rank(residual: Residual, names: Iterable[str], rank: int) -> None:
    smallest = min(names, key=lambda name: min(residual.tensors[name].shape))
    bound = min(residual.tensors[smallest].shape)
    if not 1 <= rank <= bound:
        raise ResidualError(
            f"expected a rank of 1 to {bound}, the smaller side of {smallest!r} "
            f"{list(residual.tensors[smallest].shape)}, found {rank}; choose a smaller rank, or "
            "the form packed, which is exact"
        )


def _factors(residual: Residual, name: str, rank: int, seed: int) -> tuple[Floats, Floats]:
    rows, columns = residual.tensors[name].shape
    num_elements = max(1, ROWS_AT_ONCE // columns) * columns

    def read() -> Iterator[Floats]:
        for block in residual.blocks(name, num_elements):
            yield block.astype(np.float32, copy=False).reshape(-1, columns)

    return low_rank(read, (rows, columns), rank, derive_seed(seed, name))


def _largest(residual: Residual, name: str, density: float) -> Iterator[Floats]:
    """Yield the tensor with all but its largest numbers zero; of equal ones the first are kept."""
    num_kept = max(1, round(density * residual.tensors[name].num_elements))
    (threshold,) = thresholds(lambda: residual.blocks(name, FRAME), [num_kept])
    among = above(threshold)
    for block in residual.blocks(name, FRAME):
        yield np.where(among(magnitudes(block)), block, 0).astype(np.float32, copy=False)


def _write_config(folder: Path, layers: Iterable[str], rank: int) -> None:
    """Write what peft reads; alpha is the rank, so that the factors count as they are."""
    config = {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted({name.split(".")[-2] for name in layers}),
        "task_type": "CAUSAL_LM",
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
