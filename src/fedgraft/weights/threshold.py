"""The k numbers of a tensor with the largest magnitudes, found without sorting or holding them.

The bits of positive floats are ordered as the floats are. Two passes count them: by their upper 16
bits, then, where the k-th lies, by their lower 16 bits. Of equal magnitudes the first come first.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedgraft.weights.checkpoint import DTYPES, Array

Bits = NDArray[np.unsignedinteger]
Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Threshold:
    """What divides the k largest numbers from the others."""

    bits: int
    """Of the smallest magnitude among the k, in float32."""
    num_equal: int
    """How many of just that magnitude are among the k: the first ones."""


NOTHING = Threshold(0x7FFFFFFF, 0)
"""What divides the 0 largest from the others."""


def thresholds(blocks: Callable[[], Iterable[Array]], ranks: Sequence[int]) -> list[Threshold]:
    """Return for each k of `ranks` what divides the k largest magnitudes from the others.

    `blocks` gives the tensor's numbers anew, flat; it is called once, or twice where the numbers
    have more bits than bfloat16. No k may be larger than there are numbers; for 0 nothing is above.
    """
    upper, wide = np.zeros(1 << 15, np.int64), False
    for block in blocks():
        bits = magnitudes(block)
        wide = bits.itemsize > 2
        bins = np.right_shift(bits, 16 if wide else 0, dtype=np.int64, casting="unsafe")
        upper += np.bincount(bins, minlength=upper.size)
    found = {k: _bin_from_top(upper, k) for k in ranks if k}
    if not wide:
        return [Threshold(found[k][0] << 16, found[k][1]) if k else NOTHING for k in ranks]
    lower = {high: np.zeros(1 << 16, np.int64) for high, _ in found.values()}
    for block in blocks():
        bits = magnitudes(block)
        for high, counts in lower.items():
            # Lower bits of zero are the most frequent (in zeros themselves); they are left over.
            others = bits - np.uint32((high << 16) + 1)
            np.add.at(counts, others[others < (1 << 16) - 1] + np.uint32(1), 1)
    for high, counts in lower.items():
        counts[0] = upper[high] - counts.sum()
    exact = {k: (high, *_bin_from_top(lower[high], left)) for k, (high, left) in found.items()}
    return [
        Threshold(exact[k][0] << 16 | exact[k][1], exact[k][2]) if k else NOTHING for k in ranks
    ]


def above(threshold: Threshold) -> Callable[[Bits], NDArray[np.bool_]]:
    """Return what tells, of the blocks of magnitudes in order, which are among the k largest."""
    left = threshold.num_equal

    def largest(bits: Bits) -> NDArray[np.bool_]:
        nonlocal left
        cut = threshold.bits >> (32 - 8 * bits.itemsize)
        inside = bits > cut
        if left:
            equal = bits == cut
            num_equal = int(np.count_nonzero(equal))
            if num_equal > left:
                equal[np.flatnonzero(equal)[left:]] = False
            inside |= equal
            left -= min(left, num_equal)
        return inside

    return largest


def magnitudes(numbers: Array) -> Bits:
    """Return the bits of |numbers|, without the sign: 16 for bfloat16, 32 for float32."""
    assert numbers.dtype in (DTYPES["BF16"], DTYPES["F32"]), f"numbers of {numbers.dtype}"
    all_but_sign = (1 << (8 * numbers.itemsize - 1)) - 1
    bits: Bits = numbers.view(f"u{numbers.itemsize}")
    return np.bitwise_and(bits, all_but_sign)


def _bin_from_top(counts: Counts, k: int) -> tuple[int, int]:
    """Return the bin that the k-th largest lies in, and how many of that bin are among the k."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, k))
    return counts.size - 1 - place, int(k - from_top[place] + counts[::-1][place])
