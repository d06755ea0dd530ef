"""Documents to rows: encoded in parallel, cut to the length of a row, laid where they fit best.

    documents  | A ..... | B .. | C ......................... | D . |
    pieces     | A ..... | B .. | C .......... | C' ..........  | D . |  none longer than a row
    rows       | C .......... |                          positions 0 to t - 1
               | C' ....... B |                          C' from t on, where the model has those
               | A ..... D .  |                          B, A and D from 0

A document is closed by the end-of-text token, and begins with the start-of-text token where the
tokenizer sets one (Llama, Gemma). A piece that goes on where another ended keeps its positions, all
multiples of t, and only the last piece of a document is shorter than t. So what follows a piece in
its row never begins at the position that would go on by 1: two neighbours do not look like one.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.errors import CorpusError
from fedgraft.provenance import hash_json
from fedgraft.text.corpus import Document
from fedgraft.text.rows import IGNORED as IGNORED
from fedgraft.text.rows import PIECE, PackedText, Pieces, Tokens
from fedgraft.text.rows import Rows as Rows
from fedgraft.text.rows import concatenate as concatenate
from fedgraft.text.rows import mix as mix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_CHARACTERS = 1 << 20
"""Text that one call of the tokenizer encodes; a longer document is a batch by itself."""
BATCHES_AHEAD = 2
"""Batches that are encoded while another is read; all are in memory."""

Longs = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """Some documents as tokens, one after the other, each with its end token."""

    tokens: Tokens
    lengths: Longs
    """Tokens of each document."""


def pack(
    tokenizer: "PreTrainedTokenizerBase",
    documents: Iterable[Document],
    row_length: int,
    *,
    seed: int = 0,
    num_positions: int | None = None,
) -> Rows:
    """Pack documents into rows in memory, best fit first; the seed shuffles the rows.

    Every token appears once. For a corpus that does not fit, `cache.pack_to_disk` gives the same
    rows.

    Args:
        num_positions: How many positions the model has; no limit where None. A piece that would
            reach beyond begins at position 0 again.

    Raises CorpusError where there is no document, rows are shorter than 2 tokens or longer than
    the model's positions, or the tokenizer has no end-of-text token.
    """
    padding = check(tokenizer, row_length, num_positions)
    batches = list(encode(tokenizer, documents))
    if not batches:
        raise nothing_to_pack()
    lengths = np.concatenate([batch.lengths for batch in batches])
    pieces, bounds = arrange(cut(lengths, row_length, num_positions), row_length, seed)
    tokens: Tokens = np.concatenate([batch.tokens for batch in batches])
    return Rows.of(in_memory(tokens, pieces, bounds, row_length, padding))


def pack_pieces(
    pieces: Sequence[tuple[Sequence[int], Sequence[int]]],
    row_length: int,
    *,
    padding: int,
    seed: int,
) -> Rows:
    """Pack (ids, labels) that each fit a row: dialogues, whose prompts are no targets.

    Raises CorpusError where there is none.
    """
    if not pieces:
        raise nothing_to_pack()
    ids = np.concatenate([np.asarray(ids, np.int64) for ids, _ in pieces])
    labels = np.concatenate([np.asarray(labels, np.int64) for _, labels in pieces])
    lengths = np.array([len(ids) for ids, _ in pieces])
    laid, bounds = arrange(cut(lengths, row_length, None), row_length, seed)
    tokens = ids.astype(token_type(max(int(ids.max()), padding)))
    return Rows.of(in_memory(tokens, laid, bounds, row_length, padding, labels != IGNORED))


def in_memory(
    tokens: Tokens,
    pieces: Pieces,
    bounds: Longs,
    row_length: int,
    padding: int,
    targets: NDArray[np.bool_] | None = None,
) -> PackedText:
    """A packed text of arrays in memory."""
    arrays: dict[str, NDArray[Any]] = {"tokens": tokens, "pieces": pieces, "bounds": bounds}
    if targets is not None:
        arrays["targets"] = targets
    hashes = {name: sha256(array.data).hexdigest() for name, array in arrays.items()}
    return PackedText(
        tokens=tokens,
        pieces=pieces,
        bounds=bounds,
        row_length=row_length,
        padding=padding,
        highest_id=max(int(tokens.max()), padding),
        content_hash=content_hash(hashes, tokens.dtype, row_length, padding),
        targets=targets,
    )


def content_hash(
    hashes: dict[str, str], dtype: "np.dtype[np.generic]", row_length: int, padding: int
) -> str:
    """Hash of a packed text from the SHA-256 of its arrays, in memory or on disk alike."""
    return hash_json([hashes, dtype.str, row_length, padding])


def check(tokenizer: "PreTrainedTokenizerBase", row_length: int, num_positions: int | None) -> int:
    """Return the end-of-text token, which is the padding too; raises CorpusError as `pack` does."""
    if row_length < 2:
        raise CorpusError(
            f"expected rows of at least 2 tokens, so that one predicts another, found {row_length}"
        )
    if num_positions is not None and row_length > num_positions:
        raise CorpusError(
            f"expected rows of at most {num_positions} tokens, the model's positions, found "
            f"{row_length}; choose shorter rows"
        )
    end = tokenizer.eos_token_id
    if end is None:
        raise CorpusError(
            "expected a tokenizer with an end-of-text token to close documents with, found none; "
            "set eos_token in tokenizer_config.json"
        )
    return int(end)


def nothing_to_pack() -> CorpusError:
    return CorpusError("expected text to pack into rows, found none; check the corpus")


def token_type(highest_id: int) -> type[np.unsignedinteger[Any]]:
    """The smallest type that holds the ids."""
    return np.uint16 if highest_id < 2**16 else np.uint32


def encode(
    tokenizer: "PreTrainedTokenizerBase", documents: Iterable[Document]
) -> Iterator[Encoded]:
    """Documents as tokens, in their order and in batches; read only as far as is asked for.

    The tokenizer works on all cores while a batch before is turned into numbers and written.
    """
    dtype = token_type(max(tokenizer.get_vocab().values()))
    # this call also takes back a truncation or padding that tokenizer.json asks for
    start = [i for i in tokenizer.encode("")[:1] if i == tokenizer.bos_token_id]
    end = tokenizer.eos_token_id

    def encode_batch(texts: list[str]) -> Encoded:
        flat: list[int] = []
        lengths = []
        for ids in _ids(tokenizer, texts):
            lengths.append(len(start) + len(ids) + 1)
            flat += start
            flat += ids
            flat.append(end)
        return Encoded(tokens=np.array(flat, dtype), lengths=np.array(lengths))

    waiting: deque[Future[Encoded]] = deque()
    with ThreadPoolExecutor(BATCHES_AHEAD) as pool:
        for texts in _batches(documents):
            waiting.append(pool.submit(encode_batch, texts))
            if len(waiting) > BATCHES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> Iterator[list[int]]:
    """Ids of each text; asked of the tokenizer in Rust where there is one, without offsets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield from tokenizer(texts, add_special_tokens=False)["input_ids"]
        return
    for encoding in backend.encode_batch_fast(texts, add_special_tokens=False):
        yield encoding.ids


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    texts: list[str] = []
    num_characters = 0
    for document in documents:
        if texts and num_characters + len(document.text) > BATCH_CHARACTERS:
            yield texts
            texts, num_characters = [], 0
        texts.append(document.text)
        num_characters += len(document.text)
    if texts:
        yield texts


def cut(lengths: Longs, row_length: int, num_positions: int | None) -> Pieces:
    """Pieces of documents that lie one after the other, none longer than a row.

    Each goes on at the position where the one before ended, or at 0 where the model's positions
    would not do.
    """
    counts = -(-lengths // row_length)
    document = np.repeat(np.arange(len(lengths)), counts)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces = np.empty(len(document), PIECE)
    pieces["start"] = (np.cumsum(lengths) - lengths)[document] + nth * row_length
    pieces["length"] = np.minimum(row_length, lengths[document] - nth * row_length)
    if num_positions is None:
        pieces["position"] = nth * row_length
    else:
        per_run = num_positions // row_length
        nth_of_run = nth % per_run
        end_of_run = per_run * row_length
        fits_behind = (
            (nth > 0) & (nth_of_run == 0) & (end_of_run + pieces["length"] <= num_positions)
        )
        pieces["position"] = np.where(fits_behind, end_of_run, nth_of_run * row_length)
    return pieces


def arrange(pieces: Pieces, row_length: int, seed: int) -> tuple[Pieces, Longs]:
    """The pieces ordered by row, and the bounds of the rows, [b + 1]; the seed shuffles rows."""
    members, bounds = best_fit(pieces["length"].astype(np.int64), row_length)
    numbers = list(range(len(bounds) - 1))
    Random(seed).shuffle(numbers)
    counts = np.diff(bounds)[numbers]
    shuffled = np.concatenate([[0], np.cumsum(counts)])
    places = np.repeat(bounds[:-1][numbers] - shuffled[:-1], counts) + np.arange(len(pieces))
    return pieces[members[places]], shuffled


def best_fit(lengths: Longs, row_length: int) -> tuple[Longs, Longs]:
    """Members of each row: longest first, each into the fullest row that still has room.

    Of rows with the same room the first. Pieces of one length are placed together: a row that is
    the fullest with room stays so until it has no more, so it takes as many of them as fit.

    Returns:
        Numbers of the pieces ordered by row, [p], and the bounds of the rows in them, [b + 1].
    """
    rows_with: list[list[Longs]] = [[] for _ in range(row_length + 1)]
    has_rows = np.zeros(row_length + 1, bool)

    def put(rows: Longs, room: int) -> None:
        if len(rows) and room:
            rows_with[room].append(rows)
            has_rows[room] = True

    row_of = np.empty(len(lengths), np.int64)
    num_rows = num_placed = 0
    sizes, counts = np.unique(lengths, return_counts=True)
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        left = count
        while left:
            room = size + int(has_rows[size:].argmax())
            if has_rows[room]:
                rows = np.sort(np.concatenate(rows_with[room]))
                rows_with[room], has_rows[room] = [], False
            else:
                room = row_length
                rows = np.arange(num_rows, num_rows - (-left // (room // size)))
                num_rows += len(rows)
            fit = room // size
            num_taken = min(len(rows), -(-left // fit))
            placed = np.repeat(rows[:num_taken], fit)[:left]
            row_of[num_placed : num_placed + len(placed)] = placed
            num_placed += len(placed)
            left -= len(placed)
            last = len(placed) - (num_taken - 1) * fit
            put(rows[: num_taken - 1], room - fit * size)
            put(rows[num_taken - 1 : num_taken], room - last * size)
            put(rows[num_taken:], room)
    order = np.argsort(-lengths, kind="stable")
    members = order[np.argsort(row_of, kind="stable")]
    bounds = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=num_rows))])
    return members, bounds
