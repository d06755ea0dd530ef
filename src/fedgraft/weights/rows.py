"""Which row of a target's embedding, and which of a residual's, makes each row of a graft.

    row of the graft      0 ...... instruct side's tokens ...... | kept tokens | padding
    row of the target     the one that belongs to it by token    | their own   | the same
    row of the residual   the same number                        | none        | the same

A row that a residual has whole, because the base lacks its token, moves the target's own row
towards the instruct side's; where the target lacks the token too, it is taken as it is.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedgraft.errors import ResidualError
from fedgraft.weights.arithmetic import Floats, widen
from fedgraft.weights.checkpoint import BLOCK_ELEMENTS, Array
from fedgraft.weights.vocabulary import Vocabulary

Flags = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowMap:
    """For each row of the graft, where its numbers come from."""

    picks: NDArray[np.int64]
    """The target's row; -1 where it has none."""
    bare: Flags
    """Nothing is added: a token that only the target has, or a row beyond the residual's."""
    whole: Flags
    """The residual has the instruct side's row itself, not a difference."""
    kept: tuple[str, ...]
    """Tokens that only the target has; their ids follow the instruct side's highest."""
    first_kept: int
    straight: bool
    """Each row of the target meets the row of the residual with the same number."""

    @classmethod
    def match(
        cls, target: Vocabulary, instruct: Vocabulary, whole_rows: NDArray[np.int64], place: Path
    ) -> "RowMap":
        """Match rows by token string.

        Raises ResidualError where the target lacks a token of which there is only a difference.
        """
        others = () if target.same_ids(instruct) else target.ids.keys() - instruct.ids.keys()
        kept = sorted(others, key=target.ids.__getitem__)
        first_kept = max(instruct.ids.values()) + 1
        needed = first_kept + len(kept)
        num_rows = target.num_rows
        if needed > num_rows:
            num_rows = max(needed, instruct.num_rows)
        ids = instruct.ids
        if kept:
            ids = {**ids, **{token: first_kept + n for n, token in enumerate(kept)}}
        picks = Vocabulary(ids=ids, num_rows=num_rows).rows_in(target)
        bare = np.arange(num_rows) >= instruct.num_rows
        bare[first_kept:needed] = True
        whole = np.zeros(num_rows, np.bool_)
        whole[whole_rows[whole_rows < num_rows]] = True
        whole &= ~bare
        lacking = (picks < 0) & ~whole & ~bare
        for token, i in instruct.ids.items() if lacking.any() else ():
            if lacking[i]:
                raise ResidualError(
                    f"{place}: expected a row for token {token!r}, which the residual's base has, "
                    "found none; take a target with the base's tokenizer"
                )
        bare |= lacking
        straight = (
            num_rows == target.num_rows == instruct.num_rows
            and not bare.any()
            and not whole.any()
            and bool(np.array_equal(picks, np.arange(num_rows)))
        )
        return cls(
            picks=picks,
            bare=bare,
            whole=whole,
            kept=tuple(kept),
            first_kept=first_kept,
            straight=straight,
        )

    def fitted(
        self, sums: Iterable[Array], olds: Iterable[Array], width: int, factor: float
    ) -> Iterator[tuple[Array, Floats]]:
        """Pair each block of the target with what is added to it.

        Args:
            sums: What the residual has: where a row is whole, unscaled numbers; else scaled ones.
            olds: The target's rows in the order of `picks`, in blocks of BLOCK_ELEMENTS.
            width: Numbers in a row.
            factor: The scale, where `sums` are unscaled.
        """
        numbers, first = iter(sums), 0
        missing = self.whole & (self.picks < 0)
        added = np.empty(min(BLOCK_ELEMENTS, len(self.picks) * width), np.float32)
        wide = np.empty_like(added)
        for old in olds:
            block = added[: old.size]
            found = next(numbers, old[:0])[: old.size]
            np.copyto(block[: found.size], found)
            row = np.arange(first, first + old.size) // width
            block[found.size :] = 0
            block[self.bare[row]] = 0
            if self.whole.any():
                whole = self.whole[row]
                block[whole] -= widen(old, wide)[whole]
                block *= np.where(missing[row], np.float32(1), np.float32(factor))
            first += old.size
            yield old, block
