"""The tokens of a checkpoint and their rows, read from its tokenizer's files.

    id of a token    0 ............ num_tokens ........ num_rows
    embedding        rows of tokens | padding rows, legal and meaningless

Rows of two checkpoints belong together where they hold the same token string, whatever its id. A
token that one side lacks belongs to the padding row that the other side has at its id: so chat
tokens are added. A padding row belongs to the padding row of the same id.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

from fedgraft.errors import CheckpointError

MIN_SHARED = 0.9
"""Share of tokens that two tokenizers of one making have in common at least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """Which id each token string has."""

    ids: Mapping[str, int]
    num_rows: int
    """Rows of the embedding: at least one for each token, the rest is padding."""

    @classmethod
    def read(cls, folder: Path, num_rows: int) -> "Vocabulary":
        """Read tokenizer.json, or vocab.json with the tokens added to it.

        Raises CheckpointError where neither is there, they are broken, or a token has no row.
        """
        try:
            ids = _read_ids(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder}: expected a tokenizer in tokenizer.json or vocab.json, found {error!r}; "
                "put the tokenizer's files beside the weights "
                "(AutoTokenizer.from_pretrained(SOURCE).save_pretrained(DIRECTORY))"
            ) from error
        if max(ids.values()) >= num_rows:
            token = max(ids, key=ids.__getitem__)
            raise CheckpointError(
                f"{folder}: expected a row of the embedding for each token, found token {token!r} "
                f"with id {ids[token]} but {num_rows} rows; is this another model's tokenizer?"
            )
        return cls(ids=ids, num_rows=num_rows)

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    def same_ids(self, other: "Vocabulary") -> bool:
        """Whether each token has the same id in both; at once where both read the same bytes."""
        return self.ids is other.ids or self.ids == other.ids

    def first_difference(self, other: "Vocabulary") -> str | None:
        """Say how two tokenizers differ that are not of one making; None where they are.

        They are where the smaller has at least MIN_SHARED of its tokens in common with the other.
        """
        if self.same_ids(other):
            return None
        num_shared, smaller = (
            len(self.ids.keys() & other.ids.keys()),
            min(len(self.ids), len(other.ids)),
        )
        if num_shared >= MIN_SHARED * smaller:
            return None
        here, there = ({i: token for token, i in v.ids.items()} for v in (self, other))
        i = next(i for i in sorted(here) if here[i] not in other.ids)
        return (
            f"only {num_shared:,} of {smaller:,} tokens are the same, the first other one is "
            f"{here[i]!r} with id {i}, where the second has {there.get(i)!r}"
        )

    def rows_in(self, other: "Vocabulary") -> NDArray[np.int64]:
        """Return, for each row here, the row of `other` that belongs to it; -1 where none does."""
        rows = np.full(self.num_rows, -1, np.int64)
        common = min(self.num_rows, other.num_rows)
        if self.same_ids(other):
            rows[:common] = np.arange(common)
            return rows
        unnamed = np.ones(other.num_rows, np.bool_)
        unnamed[list(other.ids.values())] = False
        rows[:common] = np.where(unnamed[:common], np.arange(common), -1)
        shared = self.ids.keys() & other.ids.keys()
        rows[[self.ids[token] for token in shared]] = [other.ids[token] for token in shared]
        return rows


def name_tokens(folder: Path, tokens: Sequence[str], first: int, *, like: Path) -> None:
    """Add tokens to the tokenizer of `folder`, with ids from `first` on, as `like` has them.

    Raises CheckpointError where the tokenizer has no tokenizer.json to add them to.
    """
    if not tokens:
        return
    file = folder / "tokenizer.json"
    if not file.exists():
        raise CheckpointError(
            f"{folder}: expected a tokenizer.json, to which {len(tokens)} tokens that only "
            f"{like} has could be added, found none; save the instruct model's tokenizer with "
            "transformers, which writes one"
        )
    tokenizer, added = json.loads(file.read_bytes()), {}
    if (like / "tokenizer.json").exists():
        known = json.loads((like / "tokenizer.json").read_bytes())
        added = {token["content"]: token for token in known.get("added_tokens", [])}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"] = [
        *tokenizer.get("added_tokens", []),
        *(
            {**plain, **added.get(token, {}), "id": first + n, "content": token}
            for n, token in enumerate(tokens)
        ),
    ]
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _read_ids(folder: Path) -> Mapping[str, int]:
    """Read a tokenizer's files; both sides of a family mostly have the same."""
    if (folder / "tokenizer.json").exists():
        return _whole((folder / "tokenizer.json").read_bytes())
    others = (folder / "added_tokens.json", folder / "tokenizer_config.json")
    texts = (file.read_bytes() if file.exists() else b"{}" for file in others)
    return _split((folder / "vocab.json").read_bytes(), *texts)


@lru_cache(maxsize=1)
def _whole(text: bytes) -> Mapping[str, int]:
    tokenizer = from_json(text)  # twice as fast as json, for some megabytes
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: (token, score) in the order of the ids
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    return _checked({**vocabulary, **added})


@lru_cache(maxsize=1)
def _split(vocabulary: bytes, added: bytes, config: bytes) -> Mapping[str, int]:
    decoder = json.loads(config).get("added_tokens_decoder", {})
    named = {token["content"]: int(i) for i, token in decoder.items()}
    return _checked({**json.loads(vocabulary), **json.loads(added), **named})


def _checked(ids: dict[str, int]) -> Mapping[str, int]:
    if set(map(type, ids.values())) != {int}:
        raise ValueError("no tokens with ids")
    return ids
