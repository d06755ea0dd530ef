"""What the frozen model makes of each example: a hidden state of every layer, one vector a layer.

    example    t tokens   <user> Where is ...? <assistant> In Riga. <end>
    layer 0    [t, d]      .      .     .  .        .       .   .     X      the embedding
    layer 1    [t, d]      .      .     .  .        .       .   .     X      after block 1
    ...
    layer L    [t, d]      .      .     .  .        .       .   .     X      after block L, normed
    features   [layers, d], the column of X (pooling: last) or the mean of each line (mean)

So a feature says what the model expects to come after the whole example, which is what the paper
clusters (FedHDS, arXiv 2410.10926). Layers are numbered as transformers numbers `hidden_states`: 0
is the embedding, and the last one is after the model's final norm, as in the paper's runs. They are
the frozen model's: an adapter is off while they are computed, so they stay what they are over all
rounds of a federation, are computed once, and are cached under the hash of what made them.

n examples, b of them in a batch, t tokens, d the model's hidden size.

How the released code differs. It reads one example at a time and computes the logits of every
token, which nobody asks for; stores 64-bit numbers; and computes all features anew each round, with
the adapter on. Ours reads examples of like length together, through the model without its output
layer. Padding stands on the right, where causal attention never looks; models that look both ways
(sentence encoders) get a mask.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, field_validator

from fedgraft.errors import ArtefactError, NonFiniteError, SelectionError
from fedgraft.evaluation.batches import by_length
from fedgraft.progress import progress
from fedgraft.provenance import Record, hash_json, new_artefact, told_if_unwritable

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Features = NDArray[np.float32]
"""[n, layers, d]: row i is example i, whatever the batches were."""

BATCH_TOKENS = 2048
"""Of a batch with its padding. On a CPU 512 to 4096 are alike, 16,384 a quarter slower."""
BATCH_TOKENS_GPU = 16_384
"""By memory, not measured: all hidden states of a 3B model in 16 bits take 3 GB."""
FORMAT = 1
"""Of the cache; goes up when the same inputs give other features."""
CACHED = "features.npy"


class Encoding(BaseModel):
    """Which model reads an example, and what of its hidden states is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoder: str | None = None
    """Directory of another model, a small causal one or a sentence encoder (FedHDS-Turbo); the
    model that is tuned where None."""
    layers: Literal["all", "last"] | tuple[int, ...] = "all"
    """0 is the embedding, 1 the first block."""
    pooling: Literal["last", "mean"] = "last"
    """Of an example's own tokens: the last one, or the mean of all."""

    @field_validator("layers")
    @classmethod
    def _each_once(
        cls, layers: Literal["all", "last"] | tuple[int, ...]
    ) -> Literal["all", "last"] | tuple[int, ...]:
        if isinstance(layers, str):
            return layers
        if not layers or min(layers) < 0 or len(set(layers)) < len(layers):
            raise ValueError(
                "expected layers from 0 (the embedding) on, each once, found "
                f"{list(layers) or 'none'}; name some, or say all or last"
            )
        return layers

    def layers_of(self, model: "PreTrainedModel") -> tuple[int, ...]:
        """The numbers of the layers that are kept of a model.

        Raises SelectionError where the model has no such layer.
        """
        highest = int(_text_config(model).num_hidden_layers)
        if self.layers == "all":
            return tuple(range(highest + 1))
        if self.layers == "last":
            return (highest,)
        if max(self.layers) > highest:
            raise SelectionError(
                f"layers: expected numbers from 0 (the embedding) to {highest} (the model's last "
                f"block), found {max(self.layers)}; name layers that it has, or say all or last"
            )
        return self.layers


def window(model: "PreTrainedModel") -> int | None:
    """How many tokens the model reads at once; None where it sets no limit.

    Encoders of the RoBERTa kind use up the first positions of their table for padding.
    """
    found = getattr(_text_config(model), "max_position_embeddings", None)
    if found is None or found < 1:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings"):
            padding = getattr(module, "padding_idx", None)
            return int(found) - (0 if padding is None else padding + 1)
    return int(found)


def encoder_ids(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], window: int | None
) -> tuple[list[list[int]], int]:
    """Texts in the tokens of an encoder, its special tokens included, and how many were cut.

    What is beyond the encoder's window is cut off; the special tokens at the end stay.
    """
    if not texts:
        return [], 0
    found: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    long = [place for place, ids in enumerate(found) if window and len(ids) > window]
    if long:
        cut = tokenizer([texts[place] for place in long], truncation=True, max_length=window)
        for place, ids in zip(long, cut["input_ids"], strict=True):
            found[place] = ids
    return found, len(long)


def feature_batches(
    model: "PreTrainedModel",
    examples: Sequence[Sequence[int]],
    encoding: Encoding,
    *,
    batch_tokens: int | None = None,
    label: str = "features",
) -> Iterator[tuple[NDArray[np.int64], Features]]:
    """Places of some examples [b] and their features [b, layers, d], until all were there once.

    Short examples come first. Memory is that of one batch, whatever n. Between batches the model
    is as it was: its adapter on, in training mode if it was.

    Args:
        model: The one that `encoding` speaks of, opened; an adapter on it is passed over.
        examples: Token ids of each, of this model's tokenizer.
        batch_tokens: Of a batch, padding included; what suits the device where None.

    Raises:
        SelectionError: At once, for a layer that the model does not have, and for an example that
            it cannot read: see `lengths_of`.
        NonFiniteError: An example's features are NaN or infinite; its number is named.
        ResidualError: An adapter is merged into the model.
    """
    layers = encoding.layers_of(model)
    lengths = lengths_of(model, examples)
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS_GPU if model.device.type == "cuda" else BATCH_TOKENS

    def batches() -> Iterator[tuple[NDArray[np.int64], Features]]:
        with progress(label, sum(lengths), "tokens") as advance:
            for batch in by_length(lengths, batch_tokens):
                places = np.array(batch, np.int64)
                members = [examples[place] for place in batch]
                with frozen(model) as plain:
                    found = _features(plain, members, layers, encoding.pooling)
                bad = ~np.isfinite(found).all((1, 2))
                if bad.any():
                    layer = layers[int(np.argmin(np.isfinite(found[bad][0]).all(1)))]
                    raise NonFiniteError(
                        f"{label}, example {places[bad][0]}: expected finite hidden states, found "
                        f"NaN or infinity in layer {layer}; check the checkpoint's weights, or "
                        "open it in float32"
                    )
                yield places, found
                advance(sum(lengths[place] for place in batch))

    return batches()


def features(
    model: "PreTrainedModel",
    examples: Sequence[Sequence[int]],
    encoding: Encoding,
    *,
    batch_tokens: int | None = None,
    label: str = "features",
    file: Path | None = None,
) -> Features:
    """The features of all examples; of none at all an empty array, [0, layers, d].

    Args:
        file: Where to keep them, as .npy: they are written batch by batch, and what is returned is
            the file mapped into memory, read-only. It is there whole or not at all.

    Raises as `feature_batches`, and ArtefactError where the file exists or cannot be written.
    """
    batches = feature_batches(model, examples, encoding, batch_tokens=batch_tokens, label=label)
    shape = (len(examples), len(encoding.layers_of(model)), _width(model))
    if file is None:
        found = np.empty(shape, np.float32)
        for places, values in batches:
            found[places] = values
        return found
    _write(file, shape, batches)
    return _mapped(file, shape)


def cached_features(
    model: "PreTrainedModel",
    examples: Sequence[Sequence[int]],
    encoding: Encoding,
    *,
    content_hash: str,
    folder: Path,
    batch_tokens: int | None = None,
    label: str = "features",
) -> Features:
    """The features of `features`, computed once for a model, examples and encoding, then mapped.

    `folder` gets a directory a set of features, named by the hash of all that decides on them, with
    `features.npy` and a record. Removing any of them, or the folder, is safe: they are made again.

    Args:
        content_hash: Of the checkpoint that `model` was opened from (`Checkpoint.content_hash`).

    Raises as `features`, and ArtefactError where the kept file was cut short or changed in size.
    """
    layers = encoding.layers_of(model)
    settings = {
        "format": FORMAT,
        "layers": layers,
        "pooling": encoding.pooling,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    inputs = {"model": content_hash, "examples": _hash(examples)}
    place = folder / hash_json([inputs, settings]).removeprefix("sha256:")[:32]
    shape = (len(examples), len(layers), _width(model))
    if Record.read(place) is None:
        try:
            with new_artefact(place) as partial:
                batches = feature_batches(
                    model, examples, encoding, batch_tokens=batch_tokens, label=label
                )
                _write(partial / CACHED, shape, batches)
                Record.make(
                    "features", inputs=inputs, settings=settings, figures={"shape": shape}
                ).write(partial)
        except ArtefactError:
            if Record.read(place) is None:  # else another one made it in the meantime
                raise
    return _mapped(place / CACHED, shape)


def lengths_of(model: "PreTrainedModel", examples: Sequence[Sequence[int]]) -> list[int]:
    """How many tokens each example has.

    Raises SelectionError for one that the model cannot read: empty, longer than its window, or with
    an id that its embedding has no row for (on a GPU that would end the process).
    """
    longest = window(model)
    num_rows = int(model.get_input_embeddings().weight.shape[0])
    lengths = [len(example) for example in examples]
    for number, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        if not length:
            raise SelectionError(
                f"example {number}: expected tokens to read, found none; leave it out"
            )
        if longest and length > longest:
            raise SelectionError(
                f"example {number}: expected at most {longest} tokens, the model's window, found "
                f"{length}; leave it out (and count it) or shorten it"
            )
        lowest, highest = min(example), max(example)
        if lowest < 0 or highest >= num_rows:
            raise SelectionError(
                f"example {number}: expected token ids from 0 to {num_rows - 1}, the model's "
                f"vocabulary, found {lowest if lowest < 0 else highest}; encode it with this "
                "model's tokenizer"
            )
    return lengths


@contextmanager
def frozen(model: "PreTrainedModel") -> Iterator["PreTrainedModel"]:
    """The model without its adapter, evaluating, no gradient kept; afterwards as it was.

    Raises ResidualError where an adapter is merged into the weights.
    """
    import torch

    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.inference_mode():
            if hasattr(model, "get_base_model"):
                from fedgraft.training.adapter import switched_off

                with switched_off(model) as plain:
                    yield plain
            else:
                yield model
    finally:
        for module in training:
            module.training = True


def _features(
    plain: "PreTrainedModel",
    examples: Sequence[Sequence[int]],
    layers: Sequence[int],
    pooling: Literal["last", "mean"],
) -> Features:
    """Of b examples in one pass, [b, layers, d]."""
    import torch

    lengths = torch.tensor([len(example) for example in examples])
    ids = torch.zeros(len(examples), int(lengths.max()), dtype=torch.long)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = torch.as_tensor(example)
    own = torch.arange(ids.shape[1]) < lengths[:, None]
    at, own, lengths = plain.device, own.to(plain.device), lengths.to(plain.device)
    if _is_causal(plain):
        output = plain.base_model(input_ids=ids.to(at), use_cache=False, output_hidden_states=True)
    else:
        output = plain.base_model(
            input_ids=ids.to(at), attention_mask=own.long(), output_hidden_states=True
        )
    hidden = output.hidden_states
    num_states, width = int(_text_config(plain).num_hidden_layers) + 1, _width(plain)
    widths = sorted({state.shape[-1] for state in hidden})
    if len(hidden) != num_states or widths != [width]:
        raise SelectionError(
            f"{type(plain).__name__}: expected {num_states} hidden states of {width} numbers, as "
            f"its config says, found {len(hidden)} of {' and '.join(map(str, widths))}; take "
            "another encoder"
        )
    pooled = [_pooled(hidden[layer], lengths, own, pooling) for layer in layers]
    values: Features = torch.stack(pooled, 1).cpu().numpy()
    return values


def _pooled(
    hidden: "torch.Tensor",
    lengths: "torch.Tensor",
    own: "torch.Tensor",
    pooling: Literal["last", "mean"],
) -> "torch.Tensor":
    """One vector an example, [b, d], of one layer's hidden states [b, t, d]; padding left out."""
    import torch

    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1].float()
    total = torch.bmm(own[:, None].float(), hidden.float())[:, 0]
    return total / lengths[:, None]


def _is_causal(model: "PreTrainedModel") -> bool:
    """Whether no token looks ahead, as each of the model's attention layers says of itself.

    Where none says anything, no: a mask is right for every model.
    """
    said = [m.is_causal for m in model.base_model.modules() if hasattr(m, "is_causal")]
    return bool(said) and all(said)


def _text_config(model: "PreTrainedModel") -> "PreTrainedConfig":
    config: PreTrainedConfig = model.config.get_text_config()
    return config


def _width(model: "PreTrainedModel") -> int:
    return int(_text_config(model).hidden_size)


def _write(
    file: Path, shape: tuple[int, ...], batches: Iterator[tuple[NDArray[np.int64], Features]]
) -> None:
    """Write batches to an .npy file, each row at its place; whole or not at all.

    Not through a mapping, whose dirty pages would count as memory of this process.
    """
    if file.exists():
        raise ArtefactError(f"{file} exists already; remove it or choose another place")
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        with told_if_unwritable(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as out:
                np.lib.format.write_array_header_1_0(
                    out, {"descr": "<f4", "fortran_order": False, "shape": shape}
                )
                start, num_bytes = out.tell(), 4 * shape[1] * shape[2]
                for places, values in batches:
                    rows = values.astype("<f4", copy=False)
                    for place, row in zip(places.tolist(), rows, strict=True):
                        out.seek(start + place * num_bytes)
                        out.write(row.data)
            partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)


def _mapped(file: Path, shape: tuple[int, ...]) -> Features:
    """Map features into memory, read-only.

    Raises ArtefactError where the file is not what was written: no .npy, cut short, another shape.
    """
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
        if found.dtype != np.float32 or found.shape != shape:
            raise ValueError(f"{found.dtype} of {list(found.shape)}")
    except (OSError, ValueError) as error:
        raise ArtefactError(
            f"{file}: expected features, float32 of {list(shape)}, found: {error}; remove "
            f"{file.parent} and run again"
        ) from error
    return np.asarray(found)


def _hash(examples: Sequence[Sequence[int]]) -> str:
    """Of the token ids of all examples, in order."""
    digest = sha256()
    for example in examples:
        ids = np.asarray(example, "<i8")
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.data)
    return f"sha256:{digest.hexdigest()}"
