"""Rows of equal length, none of which lets one document see another; built when asked for.

    row        | doc A ......... | doc B .... | pad |
    input_ids  | a a a a a a eos | b b b  eos | eos |
    position   | 0 1 2 3 4 5 6   | 0 1 2  3   | 0 . |
    labels     | - a a a a a eos | - b b  eos | -   |   (- is IGNORED: no target crosses over)

What keeps the documents apart in attention is the positions that do not go on by 1, together with
`use_cache=False` and *no* attention mask in the forward pass; transformers then masks each run of
positions by itself. A mask of ones, or a cache, would let them see each other.

What is kept is flat, so that it may as well be a file that is mapped into memory:

    tokens   | A A A A A A eos B B B eos C C C C ... |   every document, one after the other
    pieces   (start, length, first position), ordered by row
    bounds   row r is made of pieces bounds[r] to bounds[r + 1]

Letters: b rows, t tokens per row, p pieces, n tokens in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.errors import CorpusError
from fedgraft.provenance import hash_bytes

IGNORED = -100
"""The label of a token that is no target, as in `torch.nn.CrossEntropyLoss`."""

PIECE = np.dtype([("start", "<i8"), ("length", "<i4"), ("position", "<i4")])
"""Where a piece begins in the tokens, how many it has, and the position of its first."""

Ints = NDArray[np.int32]
Tokens = NDArray[np.unsignedinteger[Any]]
"""uint16 where the vocabulary allows, else uint32."""
Pieces = NDArray[np.void]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedText:
    """A text cut into pieces, and the pieces laid into rows; in memory or mapped from files."""

    tokens: Tokens
    """[n]"""
    pieces: Pieces
    """[p] of PIECE; every row has one at least."""
    bounds: NDArray[np.int64]
    """[b + 1]"""
    row_length: int
    padding: int
    """The id that fills up a row."""
    highest_id: int
    content_hash: str
    """Hash of all of the above."""
    targets: NDArray[np.bool_] | None = None
    """[n], which tokens are to be predicted; all where None. A piece's first token never is."""

    def row(self, number: int) -> dict[str, Ints]:
        """Ids, positions and labels of a row, [t] each."""
        input_ids = np.full(self.row_length, self.padding, np.int32)
        position_ids = np.empty(self.row_length, np.int32)
        labels = np.full(self.row_length, IGNORED, np.int32)
        begin = 0
        members = self.pieces[self.bounds[number] : self.bounds[number + 1]]
        for start, length, position in members.tolist():
            end = begin + length
            input_ids[begin:end] = self.tokens[start : start + length]
            position_ids[begin:end] = np.arange(position, position + length)
            labels[begin + 1 : end] = input_ids[begin + 1 : end]
            if self.targets is not None:
                labels[begin:end][~self.targets[start : start + length]] = IGNORED
            begin = end
        position_ids[begin:] = np.arange(self.row_length - begin)
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows of one packed text or of several, in any order, some more than once; no token is copied.

    `rows[i]` builds row i: its input_ids, position_ids and labels, int32 [t]. Everything else
    is known without a look at the tokens.
    """

    texts: tuple[PackedText, ...]
    text_of: Ints
    """Which of the texts each row is from, [b]."""
    row_of: NDArray[np.int64]
    """The number that each row has in its text, [b]."""
    lengths: Ints
    """Tokens of each row that are not padding, [b]."""
    targets_of: Ints
    """Tokens of each row that are predicted, [b]."""
    positions_of: Ints
    """One more than the highest position of each row, [b]."""

    @classmethod
    def of(cls, text: PackedText) -> "Rows":
        """All rows of a text, in its order."""
        starts, num_rows = text.bounds[:-1], len(text.bounds) - 1
        sizes = text.pieces["length"]
        lengths = np.add.reduceat(sizes, starts, dtype=np.int32)
        if text.targets is None:
            targets = lengths - np.diff(text.bounds)
        else:
            before = np.concatenate([[0], np.cumsum(text.targets)])
            first = text.pieces["start"] + 1
            found = before[first + sizes - 1] - before[first]
            targets = np.add.reduceat(found, starts)
        positions = np.maximum.reduceat(text.pieces["position"] + sizes, starts)
        return cls(
            texts=(text,),
            text_of=np.zeros(num_rows, np.int32),
            row_of=np.arange(num_rows),
            lengths=lengths,
            targets_of=targets.astype(np.int32),
            positions_of=np.maximum(positions, text.row_length - lengths),
        )

    def __len__(self) -> int:
        return len(self.row_of)

    def __getitem__(self, row: int) -> dict[str, Ints]:
        text: PackedText = self.texts[int(self.text_of[row])]
        return text.row(int(self.row_of[row]))

    def take(self, rows: "NDArray[np.integer[Any]]") -> "Rows":
        """The rows of these numbers, in their order; a number may come more than once."""
        return Rows(
            texts=self.texts,
            text_of=self.text_of[rows],
            row_of=self.row_of[rows],
            lengths=self.lengths[rows],
            targets_of=self.targets_of[rows],
            positions_of=self.positions_of[rows],
        )

    def stacked(self) -> dict[str, Ints]:
        """All rows at once, [b, t] each: for a batch, not for a corpus."""
        built = [self[row] for row in range(len(self))]
        return {name: np.stack([row[name] for row in built]) for name in built[0]}

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def row_length(self) -> int:
        return self.texts[0].row_length

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted."""
        return int(self.targets_of.sum(dtype=np.int64))

    @property
    def fill(self) -> float:
        """Share of the row space that holds tokens."""
        return self.num_tokens / (len(self) * self.row_length)

    @property
    def highest_id(self) -> int:
        """The highest token id of the texts that the rows are from."""
        return max(text.highest_id for text in self.texts)

    @property
    def num_positions(self) -> int:
        """One more than the highest position: what a model must have."""
        return int(self.positions_of.max())

    @property
    def content_hash(self) -> str:
        """Hash over the texts, how they are packed, and which rows come when."""
        if len(self.texts) == 1 and np.array_equal(self.row_of, np.arange(self._num_packed)):
            return self.texts[0].content_hash
        return hash_bytes(
            *(text.content_hash.encode() for text in self.texts),
            self.text_of.tobytes(),
            self.row_of.tobytes(),
        )

    @property
    def _num_packed(self) -> int:
        return len(self.texts[0].bounds) - 1


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Rows of equal length, one part after the other.

    Raises CorpusError where their lengths differ.
    """
    if len(found := {part.row_length for part in parts}) > 1:
        raise CorpusError(
            f"expected rows of one length to put together, found {sorted(found)}; pack all texts "
            "with the same row length"
        )
    firsts = np.cumsum([0, *(len(part.texts) for part in parts[:-1])])
    return Rows(
        texts=tuple(text for part in parts for text in part.texts),
        text_of=np.concatenate(
            [part.text_of + np.int32(first) for part, first in zip(parts, firsts, strict=True)]
        ),
        row_of=np.concatenate([part.row_of for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        targets_of=np.concatenate([part.targets_of for part in parts]),
        positions_of=np.concatenate([part.positions_of for part in parts]),
    )


def mix(parts: Sequence[tuple[Rows, float]], *, num_rows: int, seed: int) -> Rows:
    """So many rows, drawn from each part by its share; a part is repeated, each time in new order.

    Raises CorpusError where the shares are not positive, or the lengths of the rows differ.
    """
    if not parts or min(share for _, share in parts) <= 0:
        raise CorpusError(
            f"expected shares above zero, found {[share for _, share in parts]}; leave out a part "
            "that should not be read"
        )
    rng = np.random.default_rng(seed)
    total = sum(share for _, share in parts)
    chosen = []
    for rows, share in parts:
        count = round(num_rows * share / total)
        epochs = -(-count // len(rows))
        order = np.concatenate([rng.permutation(len(rows)) for _ in range(max(1, epochs))])
        chosen.append(rows.take(order[:count]))
    joined = concatenate(chosen)
    return joined.take(rng.permutation(len(joined)))
