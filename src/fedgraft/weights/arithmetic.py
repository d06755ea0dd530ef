"""float32 arithmetic on blocks that stay in a core's cache.

Overflow and NaN are looked for in the results, not told by warnings: `each_tensor` turns those off.

bfloat16, in which models come, has compiled loops (loops.c): one pass over a block, where
numpy takes one for each operation. All else is left to numpy.
"""

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.errors import ArtefactError, NonFiniteError
from fedgraft.weights.checkpoint import DTYPES, Array

Floats = NDArray[np.float32]
Places = NDArray[np.int64]
BFLOAT16 = DTYPES["BF16"]


def widen(block: Array, buffer: Floats) -> Floats:
    """Return a block in float32, in the buffer; exact for bfloat16 and float16."""
    wide = buffer[: block.size]
    np.copyto(wide, block)
    return wide


def narrow(numbers: Floats, buffer: Array) -> Array:
    """Return float32 numbers rounded to the buffer's dtype, to nearest, ties to even."""
    small = buffer[: numbers.size]
    np.copyto(small, numbers, casting="unsafe")
    return small


@dataclass(frozen=True, slots=True)
class Subtracted:
    """A block of instruct - base, and what was seen on the way."""

    block: Array
    """As it is stored."""
    lost: Places
    """Where base + block is not the instruct side's number."""
    squared_base: float
    squared_residual: float
    """Sums of squares, the residual's before it was rounded; not finite where a number is not, or
    is so large that its square is not."""


def subtract(old: Array, new: Array, buffer: Array) -> Subtracted:
    """Return new - old in the buffer, rounded to its dtype (bfloat16 or float32)."""
    block = buffer[: old.size]
    if old.dtype == new.dtype == BFLOAT16:
        loop = "subtract_to_bfloat16" if block.dtype == BFLOAT16 else "subtract_to_float32"
        places, sums = np.empty(old.size, np.int64), np.empty(2)
        num_lost = _call(loop, (old, new, block, places), sums)
        return Subtracted(block, places[:num_lost].copy(), *sums.tolist())
    before = old.astype(np.float32)
    residual = np.subtract(new, before, dtype=np.float32)
    np.copyto(block, residual, casting="unsafe")
    squares = (float(np.dot(numbers, numbers)) for numbers in (before, residual))
    return Subtracted(block, lost(old, block, new), *squares)


def lost(old: Array, residual: Array, new: Array) -> Places:
    """Return where old + residual, rounded to the dtype of `new`, is not `new`, bit for bit."""
    wide = residual.astype(np.float32, copy=False)
    if old.dtype == new.dtype == BFLOAT16:
        places = np.empty(old.size, np.int64)
        return places[: _call("find_lost", (old, wide, new, places))].copy()
    restored = np.add(old, wide, dtype=np.float32).astype(new.dtype, copy=False)
    bits = f"u{new.itemsize}"
    return np.flatnonzero(restored.view(bits) != new.view(bits))


def add(old: Array, added: Floats, buffer: Array) -> tuple[Array, bool]:
    """Return old + added in the buffer, rounded once to its dtype, and whether all is finite."""
    block = buffer[: old.size]
    if old.dtype == block.dtype == BFLOAT16:
        assert added.dtype == np.float32
        return block, bool(_call("add_to_bfloat16", (old, added, block)))
    np.copyto(block, np.add(old, added, dtype=np.float32), casting="unsafe")
    return block, all_finite(block)


def _call(loop: str, blocks: tuple[Array, ...], *others: Array) -> int:
    """Call a loop, which trusts its caller, on contiguous blocks of one size, and on what else."""
    sizes = {block.size for block in blocks}
    if len(sizes) > 1:
        raise ValueError(f"blocks of {' and '.join(map(str, sorted(sizes)))} numbers")
    arrays = (*blocks, *others)
    assert all(array.flags.c_contiguous for array in arrays)
    places = (ctypes.c_void_p(array.ctypes.data) for array in arrays)
    return int(getattr(_loops(), loop)(*places, ctypes.c_size_t(*sizes)))


@cache
def _loops() -> ctypes.CDLL:
    """The compiled loops. Raises ArtefactError where they were never compiled."""
    file = Path(__file__).with_name("loops.so")
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise ArtefactError(
            f"{file}: expected the loops that are compiled when fedgraft is installed, found "
            f"{error}; run `pip install --editable .` in the source tree, or install it again"
        ) from error
    for name in ("subtract_to_bfloat16", "subtract_to_float32", "find_lost", "add_to_bfloat16"):
        getattr(library, name).restype = ctypes.c_size_t
    return library


def squared_norm(numbers: Floats, name: str, path: Path) -> float:
    """Return the sum of squares of a block; NonFiniteError where it holds NaN or infinity."""
    total = float(np.dot(numbers, numbers))
    if math.isfinite(total):
        return total
    refuse_non_finite(numbers, name, path)
    return float(np.square(numbers, dtype=np.float64).sum())


def refuse_non_finite(numbers: Array, name: str, path: Path) -> None:
    """Raise NonFiniteError where a block of a tensor holds NaN or infinity."""
    if not all_finite(numbers):
        raise NonFiniteError(
            f"{path}: expected finite numbers, found NaN or infinity in tensor {name!r}; the file "
            "is damaged or the training diverged. Take an earlier checkpoint"
        )


def all_finite(numbers: Array) -> bool:
    """Whether a block holds neither NaN nor infinity, told by its bits (ten times as fast).

    They are the largest of the positive numbers read as signed integers, and of the negative ones
    read as unsigned integers.
    """
    if not numbers.size:
        return True
    signed, unsigned, plus, minus = _infinities(numbers.dtype)
    highest = np.maximum.reduce
    return bool(highest(numbers.view(signed)) < plus and highest(numbers.view(unsigned)) < minus)


@cache
def _infinities(dtype: np.dtype[Any]) -> tuple[str, str, int, int]:
    """How a dtype's bits are read as integers, signed and unsigned, and what the infinities are."""
    bits = np.array([np.inf, -np.inf]).astype(dtype).view(f"u{dtype.itemsize}")
    return f"i{dtype.itemsize}", f"u{dtype.itemsize}", int(bits[0]), int(bits[1])
