"""Documents to rows of equal length, none of which lets one document see another.

    row        | doc A ......... | doc B .... | pad |
    input_ids  | a a a a a a eos | b b b  eos | eos |
    position   | 0 1 2 3 4 5 6   | 0 1 2  3   | 0 . |
    labels     | - a a a a a eos | - b b  eos | -   |   (- is IGNORED: no target crosses over)

What keeps the documents apart in attention is the positions that start again at 0, together with
`use_cache=False` and *no* attention mask in the forward pass; transformers then masks each run of
positions by itself. A mask of ones, or a cache, would let them see each other.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedgraft.errors import CorpusError
from fedgraft.provenance import hash_bytes
from fedgraft.text.corpus import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is no target, as in `torch.nn.CrossEntropyLoss`."""

Ints = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Packed rows, each array [b rows, t tokens] of int32."""

    input_ids: Ints
    position_ids: Ints
    labels: Ints
    lengths: Ints
    """Tokens of each row that are not padding, [b rows]."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, row: int) -> dict[str, Ints]:
        return {
            "input_ids": self.input_ids[row],
            "position_ids": self.position_ids[row],
            "labels": self.labels[row],
        }

    def take(self, rows: NDArray[np.int64]) -> "Rows":
        """The rows of these numbers, in their order; a number may come more than once."""
        return Rows(
            input_ids=self.input_ids[rows],
            position_ids=self.position_ids[rows],
            labels=self.labels[rows],
            lengths=self.lengths[rows],
        )

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.lengths.sum())

    @property
    def row_length(self) -> int:
        return int(self.input_ids.shape[1])

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted."""
        return int((self.labels != IGNORED).sum())

    @property
    def fill(self) -> float:
        """Share of the row space that holds tokens."""
        return self.num_tokens / self.input_ids.size

    @property
    def content_hash(self) -> str:
        """Hash over the row length and every id, position and label."""
        arrays = (self.input_ids, self.position_ids, self.labels)
        shape = np.array(self.input_ids.shape, np.int64)
        return hash_bytes(*(array.tobytes() for array in (shape, *arrays)))


def pack(
    tokenizer: "PreTrainedTokenizerBase",
    documents: Iterable[Document],
    row_length: int,
    *,
    seed: int = 0,
) -> Rows:
    """Pack whole documents into rows, best fit first; each is closed by the end-of-text token.

    A document begins with the start-of-text token where the tokenizer sets one (Llama, Gemma). One
    longer than a row is cut into rows' lengths, each piece with positions from 0. The order of the
    rows is shuffled by the seed. Every token appears once.

    Raises CorpusError where there is no document, rows are shorter than 2 tokens, or the tokenizer
    has no end-of-text token.
    """
    if row_length < 2:
        raise CorpusError(
            f"expected rows of at least 2 tokens, so that one predicts another, found {row_length}"
        )
    end = tokenizer.eos_token_id
    if end is None:
        raise CorpusError(
            "expected a tokenizer with an end-of-text token to close documents with, found none; "
            "set eos_token in tokenizer_config.json"
        )
    start_of_text = [i for i in tokenizer.encode("")[:1] if i == tokenizer.bos_token_id]
    texts = [document.text for document in documents]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    pieces = []
    for ids in encoded:
        whole = [*start_of_text, *ids, end]
        for start in range(0, len(whole), row_length):
            piece = whole[start : start + row_length]
            pieces.append((piece, [IGNORED, *piece[1:]]))
    return pack_pieces(pieces, row_length, padding=end, seed=seed)


def pack_pieces(
    pieces: Sequence[tuple[Sequence[int], Sequence[int]]],
    row_length: int,
    *,
    padding: int,
    seed: int,
) -> Rows:
    """Pack (ids, labels) that each fit a row; the shared end of text and of dialogues."""
    if not pieces:
        raise CorpusError("expected text to pack into rows, found none; check the corpus")
    rows = _best_fit([len(ids) for ids, _ in pieces], row_length)
    Random(seed).shuffle(rows)
    shape = (len(rows), row_length)
    input_ids = np.full(shape, padding, np.int32)
    labels = np.full(shape, IGNORED, np.int32)
    position_ids = np.zeros(shape, np.int32)
    for row, members in enumerate(rows):
        start = 0
        for member in members:
            ids, targets = pieces[member]
            end = start + len(ids)
            input_ids[row, start:end] = ids
            labels[row, start:end] = targets
            position_ids[row, start:end] = np.arange(len(ids))
            start = end
        position_ids[row, start:] = np.arange(row_length - start)
    return Rows(
        input_ids=input_ids,
        position_ids=position_ids,
        labels=labels,
        lengths=np.array([sum(len(pieces[m][0]) for m in row) for row in rows], np.int32),
    )


def _best_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Members of each row: longest first, each into the fullest row that still has room."""
    order = sorted(range(len(lengths)), key=lambda member: -lengths[member])
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for member in order:
        found = bisect_left(room, (lengths[member], -1))
        if found == len(room):
            rows.append([])
            space, row = row_length, len(rows) - 1
        else:
            space, row = room.pop(found)
        rows[row].append(member)
        insort(room, (space - lengths[member], row))
    return rows


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Rows of equal length, one after the other."""
    return Rows(
        input_ids=np.concatenate([part.input_ids for part in parts]),
        position_ids=np.concatenate([part.position_ids for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
    )


def mix(parts: Sequence[tuple[Rows, float]], *, num_rows: int, seed: int) -> Rows:
    """So many rows, drawn from each part by its share; a part is repeated, each time in new order.

    Raises CorpusError where the shares are not positive.
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
