"""Laws of packing: every token once, no target across documents, as well filled as one by one."""

import os
from bisect import bisect_left, insort
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from fedgraft.errors import CorpusError
from fedgraft.models import open_tokenizer
from fedgraft.pocket.weights import folder as pocket
from fedgraft.testing import tiny_tokenizer
from fedgraft.text import packing
from fedgraft.text.corpus import Corpus, Document
from fedgraft.text.packing import best_fit, cut, encode, pack, pack_pieces
from fedgraft.text.rows import IGNORED, Rows

NEWS = Path(os.environ.get("FEDGRAFT_DATA", "../shared/data")) / "news"
tokenizer = cache(tiny_tokenizer)


def documents_of(texts: list[str]) -> list[Document]:
    return [Document(id=str(n), text=text, source="test") for n, text in enumerate(texts)]


def members(rows: Rows) -> list[list[int]]:
    """The token ids of each piece in the rows, padding left out."""
    found = []
    for row, length in enumerate(rows.lengths):
        ids, positions = rows[row]["input_ids"][:length], rows[row]["position_ids"][:length]
        starts = np.flatnonzero(np.diff(positions) != 1) + 1
        found += [piece.tolist() for piece in np.split(ids, starts)]
    return found


texts = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), min_size=1)


@given(texts, st.integers(8, 48))
def test_every_token_appears_once(texts: list[str], row_length: int) -> None:
    rows = pack(tokenizer(), documents_of(texts), row_length)
    end = tokenizer().eos_token_id
    expected = [
        whole[start : start + row_length]
        for text in texts
        for whole in [[*tokenizer().encode(text, add_special_tokens=False), end]]
        for start in range(0, len(whole), row_length)
    ]
    assert sorted(members(rows)) == sorted(expected)
    assert rows.num_tokens == sum(map(len, expected))


@given(texts, st.integers(8, 48))
def test_no_target_crosses_a_document(texts: list[str], row_length: int) -> None:
    rows = pack(tokenizer(), documents_of(texts), row_length)
    for row, length in enumerate(rows.lengths):
        built = rows[row]
        begins = np.diff(built["position_ids"], prepend=-9) != 1
        assert (built["labels"][begins] == IGNORED).all()
        inside = ~begins & (np.arange(row_length) < length)
        assert (built["labels"][inside] == built["input_ids"][inside]).all()
        assert (built["labels"][length:] == IGNORED).all()


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=8), st.integers(2, 20), st.integers(0, 70)
)
@example([10], 4, 6)  # the last piece fits the positions exactly
def test_a_piece_goes_on_where_the_one_before_ended_while_the_model_has_positions(
    lengths: list[int], row_length: int, more: int
) -> None:
    num_positions = row_length + more
    expected, start = [], 0
    for length in lengths:
        position, end = 0, start + length
        while start < end:
            size = min(row_length, end - start)
            if position + size > num_positions:
                position = 0
            expected.append((start, size, position))
            start, position = start + size, position + size
    assert cut(np.array(lengths), row_length, num_positions).tolist() == expected
    unlimited = cut(np.array(lengths), row_length, None)
    assert unlimited.tolist() == cut(np.array(lengths), row_length, 1000).tolist()


def test_the_second_piece_of_a_document_keeps_its_positions() -> None:
    rows = pack(tokenizer(), documents_of(["the river runs " * 30]), 32)
    starts = sorted(int(rows[row]["position_ids"][0]) for row in range(len(rows)))
    assert starts == [32 * nth for nth in range(len(rows))]
    assert len(rows) > 2
    limited = pack(tokenizer(), documents_of(["the river runs " * 30]), 32, num_positions=64)
    assert limited.num_positions == 64


def one_by_one(lengths: list[int], row_length: int) -> list[list[int]]:
    """Best fit decreasing as it is defined: each piece into the fullest row that has room."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for member in sorted(range(len(lengths)), key=lambda member: -lengths[member]):
        found = bisect_left(room, (lengths[member], -1))
        if found == len(room):
            rows.append([])
            space, row = row_length, len(rows) - 1
        else:
            space, row = room.pop(found)
        rows[row].append(member)
        insort(room, (space - lengths[member], row))
    return rows


@given(
    st.integers(1, 40).flatmap(
        lambda t: st.tuples(st.lists(st.integers(1, t), min_size=1), st.just(t))
    )
)
def test_pieces_placed_by_length_lie_where_they_would_one_by_one(
    case: tuple[list[int], int],
) -> None:
    lengths, row_length = case
    found, bounds = best_fit(np.array(lengths), row_length)
    rows = [part.tolist() for part in np.split(found, bounds[1:-1])]
    assert rows == one_by_one(lengths, row_length)


def test_many_pieces_lie_where_they_would_one_by_one() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4, 1, 20_000), 1, 512).astype(np.int64)
    found, bounds = best_fit(lengths, 512)
    rows = [part.tolist() for part in np.split(found, bounds[1:-1])]
    assert rows == one_by_one(lengths.tolist(), 512)


def test_rows_are_well_filled() -> None:
    random = np.random.default_rng(0)
    texts = ["a" * int(n) for n in random.integers(1, 300, 400)]
    assert pack(tokenizer(), documents_of(texts), 128).fill > 0.97


@pytest.mark.skipif(not NEWS.is_dir(), reason=f"no real text at {NEWS}: set FEDGRAFT_DATA")
def test_news_use_99_percent_of_the_row_space() -> None:
    news = Corpus.load(NEWS).documents
    assert pack(open_tokenizer(pocket / "base"), news, 4096).fill > 0.99


def test_another_seed_orders_the_same_rows_differently() -> None:
    documents = documents_of([f"Document {n} says {n * n}." for n in range(60)])
    one, two = (pack(tokenizer(), documents, 32, seed=seed) for seed in (1, 2))
    assert one.content_hash != two.content_hash
    ids = [sorted(map(tuple, rows.stacked()["input_ids"])) for rows in (one, two)]
    assert ids[0] == ids[1]
    assert one.content_hash == pack(tokenizer(), documents, 32, seed=1).content_hash


@given(texts, st.integers(1, 100))
def test_batches_change_no_token(texts: list[str], batch_characters: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BATCH_CHARACTERS", batch_characters)
        batches = list(encode(tokenizer(), documents_of(texts)))
    end = tokenizer().eos_token_id
    asked = tokenizer()(texts, add_special_tokens=False)["input_ids"]
    assert [batch for part in batches for batch in part.tokens.tolist()] == [
        token for ids in asked for token in [*ids, end]
    ]
    lengths = [length for part in batches for length in part.lengths.tolist()]
    assert lengths == [len(ids) + 1 for ids in asked]


def test_documents_are_read_no_further_than_they_are_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 10)
    num_read = 0

    def documents() -> Iterator[Document]:
        nonlocal num_read
        for document in documents_of(["0123456789"] * 50):
            num_read += 1
            yield document

    next(encode(tokenizer(), documents()))
    assert num_read <= packing.BATCHES_AHEAD + 2


def test_a_truncation_that_the_tokenizer_brings_cuts_no_document() -> None:
    cutting = tiny_tokenizer()
    cutting.backend_tokenizer.enable_truncation(4)
    cutting.backend_tokenizer.enable_padding(length=100)
    documents = documents_of(["The heron stands in the river."])
    expected = pack(tokenizer(), documents, 64)
    assert pack(cutting, documents, 64).content_hash == expected.content_hash


def test_a_tokenizer_that_is_not_written_in_rust_gives_the_same_rows() -> None:
    class Plain:
        """What is left where there is no backend: the calls that packing makes."""

        eos_token_id, bos_token_id = tokenizer().eos_token_id, None

        def __call__(self, texts: list[str], *, add_special_tokens: bool) -> object:
            return tokenizer()(texts, add_special_tokens=add_special_tokens)

        def encode(self, text: str) -> list[int]:
            return list(tokenizer().encode(text))

        def get_vocab(self) -> dict[str, int]:
            return dict(tokenizer().get_vocab())

    documents = documents_of(["The heron.", "A ticket."])
    rows = pack(Plain(), documents, 16)
    assert rows.content_hash == pack(tokenizer(), documents, 16).content_hash


def test_flash_attention_must_not_find_the_documents_by_their_positions() -> None:
    """The accident: transformers' flash call cuts where positions are lowest, not where they jump.

    Whoever opens a model with flash attention must hand it the lengths (cu_seq_lens). If this
    fails, transformers has learnt to, and models.py may open it so.
    """
    rows = pack(tokenizer(), documents_of(["the river runs " * 30, "The mill."]), 64)
    bounds = rows.texts[0].bounds
    (shared,) = np.flatnonzero(np.diff(bounds) == 2)
    positions = rows[int(shared)]["position_ids"]
    (cuts, _), _ = prepare_fa_kwargs_from_position_ids(torch.from_numpy(positions)[None])
    jumps = np.flatnonzero(np.diff(positions) != 1) + 1
    assert len(jumps) == 2
    assert set(cuts.tolist()) < {0, *jumps.tolist(), 64}


def test_ids_above_two_bytes_are_kept() -> None:
    rows = pack_pieces([([1, 70_000, 2], [IGNORED, 70_000, 2])], 4, padding=0, seed=0)
    assert rows[0]["input_ids"].tolist() == [1, 70_000, 2, 0]
    assert rows[0]["labels"].tolist() == [IGNORED, 70_000, 2, IGNORED]
    assert rows.texts[0].tokens.dtype == np.uint32
    assert rows.highest_id == 70_000


def test_the_first_token_of_a_piece_is_no_target_whatever_its_label() -> None:
    """What would predict it is another document, or nothing."""
    rows = pack_pieces([([1, 2], [1, 2]), ([3, 4, 5], [3, IGNORED, 5])], 5, padding=0, seed=0)
    assert rows[0]["labels"].tolist() == [IGNORED, IGNORED, 5, IGNORED, 2]
    assert rows.num_targets == 2


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(CorpusError, match="expected text to pack"):
        pack(tokenizer(), [], 16)
    with pytest.raises(CorpusError, match="expected text to pack"):
        pack_pieces([], 16, padding=0, seed=0)


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    endless = tiny_tokenizer()
    endless.eos_token = None
    with pytest.raises(CorpusError, match="end-of-text token"):
        pack(endless, documents_of(["a"]), 16)


def test_a_document_begins_with_the_start_token_where_the_tokenizer_sets_one() -> None:
    starting = tiny_tokenizer()
    starting.add_special_tokens({"bos_token": "<|im_start|>"})
    assert starting.bos_token_id not in members(pack(starting, documents_of(["a"]), 16))[0]
    starting.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", starting.bos_token_id)]
    )
    rows = pack(starting, documents_of(["ab", "c"]), 16)
    whole = [[starting.bos_token_id, *starting.encode(t)[1:], 0] for t in ("ab", "c")]
    assert sorted(members(rows)) == sorted(whole)
    assert rows.num_targets == rows.num_tokens - 2


def test_rows_of_one_token_are_refused() -> None:
    with pytest.raises(CorpusError, match=r"at least 2 tokens, .* found 1"):
        pack(tokenizer(), documents_of(["one"]), 1)


def test_rows_longer_than_the_positions_of_the_model_are_refused() -> None:
    with pytest.raises(CorpusError, match=r"at most 8 tokens, the model's positions, found 16"):
        pack(tokenizer(), documents_of(["one"]), 16, num_positions=8)
