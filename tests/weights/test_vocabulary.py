"""Vocabularies are compared by token string; padding rows are legal."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.errors import CheckpointError
from fedgraft.weights.vocabulary import Vocabulary

ADDED = {"id": 2, "content": "<|im_end|>"}


def vocabulary(*tokens: str, num_rows: int = 10) -> Vocabulary:
    return Vocabulary(ids={token: i for i, token in enumerate(tokens)}, num_rows=num_rows)


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [ADDED]}},
        {
            "tokenizer.json": {
                "model": {"vocab": [["a", -1.0], ["b", -2.0]]},
                "added_tokens": [ADDED],
            }
        },
        {"vocab.json": {"a": 0, "b": 1}, "added_tokens.json": {"<|im_end|>": 2}},
        {
            "vocab.json": {"a": 0, "b": 1},
            "tokenizer_config.json": {"added_tokens_decoder": {"2": ADDED}},
        },
    ],
    ids=["BPE", "Unigram", "vocab and added tokens", "vocab and tokenizer config"],
)
def test_tokens_are_read_from_every_layout(tmp_path: Path, files: dict[str, Any]) -> None:
    found = Vocabulary.read(write(tmp_path, files), num_rows=4)
    assert found.ids == {"a": 0, "b": 1, "<|im_end|>": 2}
    assert (found.num_tokens, found.num_rows) == (3, 4)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer.json": {}},
        {"tokenizer.json": []},
        {"tokenizer.json": {"model": {"vocab": {}}}},
        {"tokenizer.json": {"model": {"vocab": {"a": "0"}}}},
    ],
)
def test_a_missing_or_broken_tokenizer_is_refused_with_the_remedy(
    tmp_path: Path, files: dict[str, Any]
) -> None:
    with pytest.raises(
        CheckpointError, match=f"{tmp_path}: expected a tokenizer .*save_pretrained"
    ):
        Vocabulary.read(write(tmp_path, files), num_rows=4)


def test_a_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"tokenizer.json": {"model": {"vocab": {"a": 0, "z": 4}}}})
    with pytest.raises(CheckpointError, match="found token 'z' with id 4 but 4 rows"):
        Vocabulary.read(tmp_path, num_rows=4)


@pytest.mark.parametrize(
    ("first", "second", "rows"),
    [
        (vocabulary("a", "b"), vocabulary("a", "b"), range(10)),
        (vocabulary("a", "b", num_rows=2), vocabulary("a", "b"), [0, 1]),
        (vocabulary("a", "b", num_rows=4), vocabulary("a", "b", num_rows=3), [0, 1, 2, -1]),
        (vocabulary("a", "b", "c", num_rows=4), vocabulary("a", "c", "b"), [0, 2, 1, 3]),
        (vocabulary("a", "b", "c", num_rows=4), vocabulary("a", "b", num_rows=2), [0, 1, -1, -1]),
        (vocabulary("a", "b", "chat", num_rows=3), vocabulary("a", "b"), [0, 1, 2]),
        (vocabulary("a", "b", num_rows=4), vocabulary("a", "b", "chat"), [0, 1, -1, 3]),
        (vocabulary("a", "x", num_rows=2), vocabulary("a", "b"), [0, -1]),
        (
            vocabulary("a", "b", num_rows=8),
            Vocabulary(ids={"a": 0, "b": 7}, num_rows=8),
            [0, 7, 2, 3, 4, 5, 6, -1],
        ),
    ],
    ids=[
        "the same",
        "more padding rows there",
        "more padding rows here",
        "two tokens exchanged",
        "a token without a row there",
        "a token with a padding row there",
        "a padding row that is a token there",
        "another token at an id",
        "a token elsewhere",
    ],
)
def test_rows_belong_together_by_token_and_padding_by_number(
    first: Vocabulary, second: Vocabulary, rows: Sequence[int]
) -> None:
    assert first.rows_in(second).tolist() == list(rows)


@given(here=st.permutations("abcdefgh"), there=st.permutations("cdefghij"))
def test_no_row_belongs_to_two(here: list[str], there: list[str]) -> None:
    first, second = vocabulary(*here, num_rows=12), vocabulary(*there, num_rows=11)
    rows = first.rows_in(second)
    found = rows[rows >= 0]
    assert len(set(found)) == len(found)
    for token in set(here) & set(there):
        assert rows[first.ids[token]] == second.ids[token]


def test_tokenizers_of_one_making_share_nearly_all_tokens() -> None:
    tokens = [f"t{i}" for i in range(20)]
    first = vocabulary(*tokens, num_rows=40)
    assert first.first_difference(vocabulary(*reversed(tokens), "chat", num_rows=40)) is None
    assert first.first_difference(vocabulary(*tokens[:18], "x", "y", num_rows=40)) is None
    other = vocabulary(*tokens[:17], "x", "y", "z", num_rows=40)
    assert first.first_difference(other) == (
        "only 17 of 20 tokens are the same, the first other one is 't17' with id 17, where the "
        "second has 'x'"
    )
