"""Laws of rows: what is taken, joined or mixed is what it was, and no token is copied for it."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.masking_utils import find_packed_sequence_indices

from fedgraft.errors import CorpusError
from fedgraft.testing import tiny_tokenizer
from fedgraft.text.corpus import Document
from fedgraft.text.packing import pack
from fedgraft.text.rows import IGNORED, Ints, Rows, concatenate, mix

tokenizer = cache(tiny_tokenizer)


def rows_of(texts: list[str], row_length: int = 16, *, num_positions: int | None = None) -> Rows:
    documents = [Document(id=str(n), text=text, source="test") for n, text in enumerate(texts)]
    return pack(tokenizer(), documents, row_length, num_positions=num_positions)


texts = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=90), min_size=1)


@given(texts, st.integers(8, 48), st.integers(1, 4), st.booleans())
def test_what_is_known_without_the_tokens_is_what_the_tokens_say(
    texts: list[str], row_length: int, times: int, limited: bool
) -> None:
    rows = rows_of(texts, row_length, num_positions=times * row_length if limited else None)
    built = rows.stacked()
    assert all(array.dtype == np.int32 for array in built.values())
    assert built["input_ids"].shape == (len(rows), rows.row_length) == (len(rows), row_length)
    assert rows.num_targets == (built["labels"] != IGNORED).sum()
    assert rows.num_positions == built["position_ids"].max() + 1
    assert rows.highest_id == built["input_ids"].max()
    assert rows.fill == rows.num_tokens / built["input_ids"].size
    end = tokenizer().eos_token_id
    for row, length in enumerate(rows.lengths):
        assert (built["input_ids"][row, length:] == end).all()
        assert (built["position_ids"][row, length:] == np.arange(row_length - length)).all()


@given(texts, st.integers(2, 40), st.integers(0, 90))
def test_transformers_tells_the_documents_of_a_row_apart(
    texts: list[str], row_length: int, more: int
) -> None:
    """Neighbours whose positions went on by 1 would be one document to it."""
    rows = rows_of(texts, row_length, num_positions=row_length + more if more else None)
    for row in range(len(rows)):
        text = rows.texts[0]
        pieces = text.pieces[text.bounds[row] : text.bounds[row + 1]]
        lengths = [*pieces["length"].tolist(), row_length - int(rows.lengths[row])]
        expected = np.repeat(np.arange(len(lengths)), lengths)
        positions = torch.from_numpy(rows[row]["position_ids"])[None]
        found = find_packed_sequence_indices(positions)
        if found is None:
            assert not expected.any()
        else:
            assert found[0].tolist() == expected.tolist()


def test_taking_joining_and_mixing_copy_no_token() -> None:
    one, two = rows_of([f"one {n}" for n in range(30)]), rows_of([f"two {n}" for n in range(30)])
    mixed = mix([(one, 0.5), (two, 0.5)], num_rows=500, seed=0)
    again = concatenate([mixed.take(np.array([1, 1, 0])), one])
    assert [id(text) for text in again.texts[:2]] == [id(one.texts[0]), id(two.texts[0])]
    assert again.texts[2] is one.texts[0]
    assert (again[0]["input_ids"] == mixed[1]["input_ids"]).all()
    assert (again[4]["input_ids"] == one[1]["input_ids"]).all()


def copied_mix(
    parts: list[tuple[dict[str, Ints], float]], num_rows: int, seed: int
) -> dict[str, Ints]:
    """The mixture as it was before rows were built when asked for: every array copied."""
    rng = np.random.default_rng(seed)
    chosen = []
    for arrays, share in parts:
        count = round(num_rows * share / sum(s for _, s in parts))
        b = len(arrays["labels"])
        order = np.concatenate([rng.permutation(b) for _ in range(max(1, -(-count // b)))])
        chosen.append({name: array[order[:count]] for name, array in arrays.items()})
    joined = {name: np.concatenate([part[name] for part in chosen]) for name in chosen[0]}
    last = rng.permutation(len(joined["labels"]))
    return {name: array[last] for name, array in joined.items()}


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 9))
def test_a_mixture_equals_one_of_copied_arrays(num_rows: int, share: float, seed: int) -> None:
    new, old = rows_of([f"new {n}" * 3 for n in range(20)]), rows_of([f"OLD {n}" for n in range(5)])
    mixed = mix([(new, 1 - share), (old, share)], num_rows=num_rows, seed=seed)
    expected = copied_mix([(new.stacked(), 1 - share), (old.stacked(), share)], num_rows, seed)
    for name, array in mixed.stacked().items():
        assert (array == expected[name]).all()
    assert mixed.num_targets == (expected["labels"] != IGNORED).sum()
    assert mixed.num_positions == expected["position_ids"].max() + 1


def test_a_mixture_has_the_shares_that_were_asked_for() -> None:
    new = rows_of(["new"] * 1 + [f"new {n}" for n in range(50)])
    old = rows_of([f"OLD {n}" for n in range(5)])
    mixed = mix([(new, 0.7), (old, 0.3)], num_rows=200, seed=0).stacked()
    from_old = {row.tobytes() for row in old.stacked()["input_ids"]}
    assert sum(row.tobytes() in from_old for row in mixed["input_ids"]) == 60
    assert len(mixed["input_ids"]) == 200


def test_a_mixture_repeats_a_part_evenly() -> None:
    old = rows_of([f"OLD {n}" * 4 for n in range(7)])
    mixed = mix([(old, 1.0)], num_rows=3 * len(old), seed=0).stacked()
    _, counts = np.unique([row.tobytes() for row in mixed["input_ids"]], return_counts=True)
    assert set(counts) == {3}


def test_rows_are_joined_in_order() -> None:
    one, two = rows_of(["one"]), rows_of(["two"])
    joined = concatenate([one, two])
    assert len(joined) == 2
    assert joined.num_tokens == one.num_tokens + two.num_tokens
    assert (joined.take(np.array([1]))[0]["input_ids"] == two[0]["input_ids"]).all()


def test_other_rows_or_another_order_have_another_hash() -> None:
    rows, other = rows_of([f"a {n}" for n in range(20)]), rows_of([f"b {n}" for n in range(20)])
    backwards = np.arange(len(rows))[::-1]
    found = {
        part.content_hash
        for part in (
            rows,
            other,
            rows.take(backwards),
            concatenate([rows, other]),
            concatenate([other, rows]),
        )
    }
    assert len(found) == 5
    assert rows.take(np.arange(len(rows))).content_hash == rows.content_hash
    assert rows.take(backwards).take(backwards).content_hash == rows.content_hash


def test_rows_of_two_lengths_are_not_joined() -> None:
    with pytest.raises(CorpusError, match=r"rows of one length .* found \[8, 16\]"):
        concatenate([rows_of(["one"]), rows_of(["one"], 8)])


def test_a_share_of_zero_is_refused() -> None:
    rows = rows_of(["one"])
    with pytest.raises(CorpusError, match="shares above zero"):
        mix([(rows, 1.0), (rows, 0.0)], num_rows=4, seed=0)
