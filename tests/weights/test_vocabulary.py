"""Vocabularies are compared by token string; padding rows are legal."""

import json
from pathlib import Path
from typing import Any

import pytest

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
    ("first", "second", "difference"),
    [
        (vocabulary("a", "b"), vocabulary("a", "b"), None),
        (vocabulary("a", "b", num_rows=2), vocabulary("a", "b"), None),
        (vocabulary("a", "b"), vocabulary("a", "b", "chat"), None),
        (
            vocabulary("a", "b"),
            vocabulary("a", "x"),
            "id 1 is token 'b' in the first and 'x' in the second",
        ),
        (
            vocabulary("a", "b", "c"),
            vocabulary("a", "c", "b"),
            "id 1 is token 'b' in the first and 'c' in the second",
        ),
        (
            vocabulary("a", "b", num_rows=2),
            vocabulary("a", "b", "chat"),
            "token 'chat' with id 2 has no row in the first, which has 2",
        ),
        (
            vocabulary("a", "b", "chat"),
            vocabulary("a", "b", num_rows=2),
            "token 'chat' with id 2 has no row in the second, which has 2",
        ),
        (
            vocabulary("a", "b"),
            Vocabulary(ids={"a": 0, "b": 7}, num_rows=10),
            "token 'b' has id 1 in the first and 7 in the second",
        ),
    ],
    ids=[
        "the same",
        "more padding rows",
        "a chat token in a padding row",
        "another token",
        "two tokens exchanged",
        "a chat token without a row in the base",
        "a chat token without a row in the instruct model",
        "a token elsewhere",
    ],
)
def test_the_first_contradiction_is_named(
    first: Vocabulary, second: Vocabulary, difference: str | None
) -> None:
    assert first.first_difference(second) == difference
