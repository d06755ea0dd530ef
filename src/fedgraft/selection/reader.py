"""Who reads examples so that they can be compared: the model, or the encoder of a selection.

examples ── tokens of the model ───> the model, without an adapter ──> features
         └─ text ─ tokens of the ──> the encoder (Turbo) ────────────┘
                   encoder, cut to its window
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedgraft.models import open_encoder, open_model, open_tokenizer
from fedgraft.selection.features import (
    Encoding,
    Features,
    cached_features,
    encoder_ids,
    features,
    window,
)
from fedgraft.selection.quality import answer_gains
from fedgraft.text.dialogues import Template
from fedgraft.text.examples import Examples, encode_examples, example_texts, tokenizer_for
from fedgraft.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class Reader:
    """A model directory that reads examples; it and encoders are opened when they are needed."""

    def __init__(
        self, path: str | Path, opened: Callable[[], "PreTrainedModel"] | None = None
    ) -> None:
        """
        Args:
            opened: Gives the model, where somebody else has opened it; it may have an adapter.

        Raises CheckpointError.
        """
        self._source = Checkpoint.open(path)
        self._opened = opened or self._open
        self._models: dict[Path, PreTrainedModel] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def path(self) -> Path:
        """Where the model stands, also one that was named as on the hub."""
        return self._source.path

    def features(
        self,
        examples: Examples,
        encoding: Encoding,
        *,
        window: int,
        prompt: Template = "chat",
        folder: Path | None = None,
    ) -> Features:
        """The features of examples, [n, layers, d].

        Args:
            window: Tokens of a document that are looked at, from its beginning.
            folder: Where they are kept for the next time; made anew each time where None.

        Raises as `selection.features` does, and DialogueError as `text.examples`.
        """
        if encoding.encoder:
            model, ids = self._encoder(Path(encoding.encoder), examples)
        else:
            model = self._opened()
            ids = [ids for ids, _ in self._encoded(examples, window, prompt)]
        if folder is None:
            return features(model, ids, encoding)
        content_hash = self.encoder_hash(encoding) or self.content_hash
        return cached_features(model, ids, encoding, content_hash=content_hash, folder=folder)

    def gains(
        self, examples: Examples, *, window: int, prompt: Template = "chat"
    ) -> NDArray[np.float32]:
        """How much each answer gains by its prompt, see `selection.quality`."""
        return answer_gains(self._opened(), self._encoded(examples, window, prompt))

    @property
    def content_hash(self) -> str:
        """Of the model."""
        return self._source.content_hash

    def encoder_hash(self, encoding: Encoding) -> str:
        """Content hash of the encoder; empty where the model itself reads."""
        return Checkpoint.open(encoding.encoder).content_hash if encoding.encoder else ""

    def _encoded(
        self, examples: Examples, window: int, prompt: Template
    ) -> list[tuple[list[int], list[int]]]:
        self._tokenizer = self._tokenizer or open_tokenizer(self._source.path)
        tokenizer = tokenizer_for(self._tokenizer, examples, prompt)
        return encode_examples(tokenizer, examples, window)

    def _encoder(self, path: Path, examples: Examples) -> tuple["PreTrainedModel", list[list[int]]]:
        model = self._models.setdefault(path, self._models.get(path) or open_encoder(path))
        ids, num_cut = encoder_ids(open_tokenizer(path), example_texts(examples), window(model))
        if num_cut:
            log.warning(
                "%d of %d examples are longer than the window of the encoder %s and are compared "
                "by their beginnings",
                num_cut,
                len(ids),
                path.name,
            )
        return model, ids

    def _open(self) -> "PreTrainedModel":
        path = self._source.path
        self._models[path] = self._models.get(path) or open_model(path)
        return self._models[path]
