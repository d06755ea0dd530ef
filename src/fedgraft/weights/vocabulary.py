"""The tokens of a checkpoint and their rows, read from its tokenizer's files.

    id of a token    0 ............ num_tokens ........ num_rows
    embedding        rows of tokens | padding rows, legal and meaningless

Two vocabularies agree where no row means one token here and another there. A token that only one
side knows is legal if the other side keeps a padding row for it: so chat tokens are added.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgraft.errors import CheckpointError


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
        token = max(ids, key=ids.__getitem__)
        if ids[token] >= num_rows:
            raise CheckpointError(
                f"{folder}: expected a row of the embedding for each token, found token {token!r} "
                f"with id {ids[token]} but {num_rows} rows; is this another model's tokenizer?"
            )
        return cls(ids=ids, num_rows=num_rows)

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    def first_difference(self, other: "Vocabulary") -> str | None:
        """Say where the two contradict each other, at the lowest id; None where they agree."""
        if self.ids == other.ids:
            return None
        here, there = ({i: token for token, i in v.ids.items()} for v in (self, other))
        for i in sorted(here.keys() | there.keys()):
            a, b = here.get(i), there.get(i)
            if a is not None and b is not None and a != b:
                return f"id {i} is token {a!r} in the first and {b!r} in the second"
            token = b if a is None else a
            if token is not None and self.ids.get(token, i) != other.ids.get(token, i):
                return (
                    f"token {token!r} has id {self.ids[token]} in the first and "
                    f"{other.ids[token]} in the second"
                )
            if i >= min(self.num_rows, other.num_rows):
                lacking = "first" if self.num_rows <= i else "second"
                rows = min(self.num_rows, other.num_rows)
                return f"token {token!r} with id {i} has no row in the {lacking}, which has {rows}"
        return None


def _read_ids(folder: Path) -> dict[str, int]:
    if (folder / "tokenizer.json").exists():
        tokenizer = _read(folder / "tokenizer.json")
        vocabulary = tokenizer["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: (token, score) in the order of the ids
            vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    else:
        vocabulary = _read(folder / "vocab.json")
        added = {}
        if (folder / "added_tokens.json").exists():
            added = _read(folder / "added_tokens.json")
        if (folder / "tokenizer_config.json").exists():
            decoder = _read(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
            added |= {token["content"]: int(i) for i, token in decoder.items()}
    ids = {**vocabulary, **added}
    if not ids or not all(isinstance(i, int) for i in ids.values()):
        raise ValueError("no tokens with ids")
    return ids


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_bytes()))
