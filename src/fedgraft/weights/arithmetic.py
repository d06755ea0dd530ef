"""float32 arithmetic on blocks that stay in a core's cache.

Every function works in buffers that the caller keeps: fresh memory for each block costs more than
the arithmetic. Overflow and NaN are looked for in the results, not told by warnings: `each_tensor`
turns those off.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.errors import NonFiniteError
from fedgraft.weights.checkpoint import DTYPES, Array

Floats = NDArray[np.float32]
BFLOAT16 = DTYPES["BF16"]
HALF_STEP = 0x7FFF
"""The most by which a float32's bits may differ from a bfloat16's and surely round to it."""
NEGATIVE_ZERO = -(1 << 15)
"""Its bits in bfloat16, read as a signed integer."""
MODEST_NORM = 65504.0**2
"""A sum of squares below which no number is larger than float16's largest."""
NEAR = 127
"""Two bfloat16 numbers of one sign at most so many steps apart differ by fewer than 2^8 of the
smaller one's steps, which bfloat16 holds exactly: they are at most one power of two apart."""


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


def far_apart(old: Array, new: Array, buffer: Array) -> NDArray[np.int64]:
    """Return where `old` + bfloat16's `new - old` may not be `new`; all are bfloat16, and finite.

    Told by their bits, which for one sign count the steps between them: a model's numbers and what
    tuning made of them are mostly a few steps apart. A sum is never -0, so that counts as far.
    """
    steps = buffer.view(np.int16)[: old.size]
    np.subtract(new.view(np.int16), old.view(np.int16), out=steps)
    far = np.add(steps, NEAR, out=steps).view(np.uint16) > 2 * NEAR
    if np.minimum.reduce(new.view(np.int16), initial=0) == NEGATIVE_ZERO:
        far |= new.view(np.int16) == NEGATIVE_ZERO
    return np.flatnonzero(far)


def narrow_exact(numbers: Floats, buffer: Array, doubtful: NDArray[np.int64]) -> Array:
    """Return numbers in bfloat16 that it holds exactly, but for `doubtful` ones: those are rounded.

    What it holds is the upper half of the bits: a third of the time that rounding takes.
    """
    small = buffer[: numbers.size]
    np.right_shift(numbers.view(np.uint32), 16, out=small.view(np.uint16), casting="unsafe")
    small[doubtful] = numbers[doubtful].astype(BFLOAT16)
    return small


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


def modest(numbers: Floats) -> bool:
    """Whether a block is so small that it surely stays finite in any dtype (four times as fast)."""
    return bool(np.dot(numbers, numbers) < MODEST_NORM)


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


def lost(restored: Floats, wanted: Floats, exact: Array) -> NDArray[np.int64]:
    """Return where `restored` does not round to `exact`, bit for bit; `wanted` is `exact`, wide.

    `restored` is used up. Read as integers, two floats of one sign are as far apart as there are
    floats between them; what lies within half a step of a bfloat16 number rounds to it.
    """
    if exact.dtype == BFLOAT16:
        distance = restored.view(np.int32)
        np.subtract(distance, wanted.view(np.int32), out=distance)
        within = np.add(distance, HALF_STEP, out=distance).view(np.uint32) <= 2 * HALF_STEP
        doubtful = np.flatnonzero(~within)
        bits = distance[doubtful] - np.int32(HALF_STEP) + wanted.view(np.int32)[doubtful]
        numbers = bits.view(np.float32)
    else:
        doubtful = np.flatnonzero(restored.view(np.uint32) != wanted.view(np.uint32))
        numbers = restored[doubtful]
    if not doubtful.size:
        return doubtful
    as_bits = f"u{exact.itemsize}"
    rounded = numbers.astype(exact.dtype).view(as_bits)
    return np.compress(rounded != exact[doubtful].view(as_bits), doubtful)
