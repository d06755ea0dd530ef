"""The k numbers of a tensor with the largest magnitudes, found without sorting or holding them.

The bits of positive floats are ordered as the floats are. Two passes count them: by their upper 16
bits, then, where the k-th lies, by their lower 16 bits. Of equal magnitudes the first come first.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedgraft.weights.arithmetic import Floats
from fedgraft.weights.checkpoint import Array

Bits = NDArray[np.uint32]
Counts = NDArray[np.int64]
MAGNITUDE = np.uint32(0x7FFFFFFF)
"""All bits of a float32 but its sign."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """What divides the k largest numbers from the others."""

    bits: int
    """Of the smallest magnitude among the k."""
    num_equal: int
    """How many of just that magnitude are among the k: the first ones."""


def thresholds(blocks: Callable[[], Iterable[Array]], ranks: Sequence[int]) -> list[Threshold]:
    """Return for each k of `ranks` what divides the k largest magnitudes from the others.

    `blocks` gives the tensor's numbers anew, flat; it is called once, or twice where the numbers
    have more bits than bfloat16. No k may be larger than there are numbers; for 0 nothing is above.
    """
    upper = np.zeros(1 << 15, np.int64)
    has_lower = False
    for numbers in blocks():
        bits = magnitudes(numbers)
        upper += np.bincount(_upper(bits), minlength=upper.size)
        has_lower = has_lower or numbers.itemsize > 2
    places = [_bin_from_top(upper, k) for k in ranks]
    lower = {high: np.zeros(1 << 16, np.int64) for high, _ in places}
    if not has_lower:
        return [Threshold(high << 16, left) for high, left in places]
    for numbers in blocks():
        bits = magnitudes(numbers)
        upper_bits = _upper(bits)
        for high, counts in lower.items():
            inside = bits[upper_bits == high] & np.uint32(0xFFFF)
            counts += np.bincount(inside, minlength=counts.size)
    found = [(high, *_bin_from_top(lower[high], left)) for high, left in places]
    return [Threshold(high << 16 | low, left) for high, low, left in found]


def above(threshold: Threshold) -> Callable[[Bits], NDArray[np.bool_]]:
    """Return what tells, of the blocks of magnitudes in order, which are among the k largest."""
    left = threshold.num_equal

    def largest(bits: Bits) -> NDArray[np.bool_]:
        nonlocal left
        inside = bits > threshold.bits
        if left:
            equal = np.flatnonzero(bits == threshold.bits)[:left]
            inside[equal] = True
            left -= equal.size
        return inside

    return largest


def magnitudes(numbers: Array) -> Bits:
    """Return the bits of |numbers| in float32."""
    wide: Floats = numbers.astype(np.float32, copy=False)
    return np.bitwise_and(wide.view(np.uint32), MAGNITUDE)


def _upper(bits: Bits) -> Counts:
    return np.right_shift(bits, 16, dtype=np.int64, casting="unsafe")


def _bin_from_top(counts: Counts, k: int) -> tuple[int, int]:
    """Return the bin that the k-th largest lies in, and how many of that bin are among the k."""
    if k == 0:
        return counts.size - 1, 0
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, k))
    return counts.size - 1 - place, int(k - from_top[place] + counts[::-1][place])
