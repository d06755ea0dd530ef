"""Laws of packing: every token once, no target across documents, packed equals alone."""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from fedgraft.errors import CorpusError
from fedgraft.testing import ARCHITECTURES, Architecture, tiny_model, tiny_tokenizer
from fedgraft.text.corpus import Document
from fedgraft.text.packing import IGNORED, Rows, concatenate, mix, pack

tokenizer = cache(tiny_tokenizer)


def documents_of(texts: list[str]) -> list[Document]:
    return [Document(id=str(n), text=text, source="test") for n, text in enumerate(texts)]


def members(rows: Rows) -> list[list[int]]:
    """The token ids of each piece in the rows, padding left out."""
    found = []
    for ids, positions, length in zip(rows.input_ids, rows.position_ids, rows.lengths, strict=True):
        starts = [*np.flatnonzero(positions[:length] == 0), length]
        found += [ids[a:b].tolist() for a, b in pairwise(starts)]
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
    assert (rows.labels[rows.position_ids == 0] == IGNORED).all()
    targets = rows.labels != IGNORED
    assert (rows.labels[targets] == rows.input_ids[targets]).all()
    padding = np.arange(row_length) >= rows.lengths[:, None]
    assert not targets[padding].any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_packed_row_gives_the_logits_of_its_documents_alone(architecture: Architecture) -> None:
    model = tiny_model(architecture)
    texts = ["The heron stands.", "A ticket is closed.", "Every morning", "the baker opens"] * 3
    rows = pack(tokenizer(), documents_of([t + str(n) for n, t in enumerate(texts)]), 64)
    assert len(rows) > 1
    assert max(np.count_nonzero(row == 0) for row in rows.position_ids) > 2
    batch = {name: torch.from_numpy(getattr(rows, name)).long() for name in rows[0]}
    model.config.use_cache = False
    with torch.no_grad():
        packed = model(**batch).logits
        for row, (ids, positions) in enumerate(zip(rows.input_ids, rows.position_ids, strict=True)):
            starts = [*np.flatnonzero(positions[: rows.lengths[row]] == 0), rows.lengths[row]]
            for begin, end in pairwise(starts):
                alone = model(torch.from_numpy(ids[None, begin:end]).long()).logits[0]
                torch.testing.assert_close(packed[row, begin:end], alone, atol=2e-5, rtol=0)


def test_a_mask_of_ones_would_let_documents_see_each_other() -> None:
    """The accident that the absent mask prevents; if this fails, transformers has changed."""
    model = tiny_model()
    rows = pack(tokenizer(), documents_of(["The heron stands.", "A ticket is closed."]), 64)
    batch = {name: torch.from_numpy(getattr(rows, name)).long() for name in rows[0]}
    with torch.no_grad():
        apart = model(**batch, use_cache=False).logits
        leaking = model(
            **batch, use_cache=False, attention_mask=torch.ones_like(batch["input_ids"])
        ).logits
    assert (apart - leaking).abs().max() > 1e-3


def test_rows_are_well_filled() -> None:
    random = np.random.default_rng(0)
    texts = ["a" * int(n) for n in random.integers(1, 300, 400)]
    assert pack(tokenizer(), documents_of(texts), 128).fill > 0.97


def test_another_seed_orders_the_same_rows_differently() -> None:
    documents = documents_of([f"Document {n} says {n * n}." for n in range(60)])
    one, two = (pack(tokenizer(), documents, 32, seed=seed) for seed in (1, 2))
    assert one.content_hash != two.content_hash
    assert sorted(map(tuple, one.input_ids)) == sorted(map(tuple, two.input_ids))
    assert one.content_hash == pack(tokenizer(), documents, 32, seed=1).content_hash


def test_a_mixture_has_the_shares_that_were_asked_for() -> None:
    new = pack(tokenizer(), documents_of(["new"] * 1 + [f"new {n}" for n in range(50)]), 16)
    old = pack(tokenizer(), documents_of([f"OLD {n}" for n in range(5)]), 16)
    mixed = mix([(new, 0.7), (old, 0.3)], num_rows=200, seed=0)
    from_old = {row.tobytes() for row in old.input_ids}
    assert sum(row.tobytes() in from_old for row in mixed.input_ids) == 60
    assert len(mixed) == 200


def test_a_mixture_repeats_a_part_evenly() -> None:
    old = pack(tokenizer(), documents_of([f"OLD {n}" * 4 for n in range(7)]), 16)
    mixed = mix([(old, 1.0)], num_rows=3 * len(old), seed=0)
    _, counts = np.unique([row.tobytes() for row in mixed.input_ids], return_counts=True)
    assert set(counts) == {3}


def test_rows_are_joined_in_order() -> None:
    one = pack(tokenizer(), documents_of(["one"]), 16)
    two = pack(tokenizer(), documents_of(["two"]), 16)
    joined = concatenate([one, two])
    assert len(joined) == 2
    assert joined.num_tokens == one.num_tokens + two.num_tokens
    assert (joined.take(np.array([1])).input_ids == two.input_ids).all()


def test_nothing_to_pack_is_refused() -> None:
    with pytest.raises(CorpusError, match="expected text to pack"):
        pack(tokenizer(), [], 16)


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


def test_a_share_of_zero_is_refused() -> None:
    rows = pack(tokenizer(), documents_of(["one"]), 16)
    with pytest.raises(CorpusError, match="shares above zero"):
        mix([(rows, 1.0), (rows, 0.0)], num_rows=4, seed=0)
