"""Proof that two checkpoints can be subtracted: one architecture, vocabulary and set of tensors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedgraft.errors import CheckpointError, FamilyError
from fedgraft.weights.checkpoint import OUTPUT_LAYER, Checkpoint, TensorInfo, is_tied
from fedgraft.weights.vocabulary import Vocabulary

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "n_embd",
    "n_layer",
    "n_head",
    "num_kv_heads",
)
"""Sizes in a config, as GPT-2, BLOOM and Falcon spell them too. The heads matter: no tensor's shape
tells 4 heads of 16 from 8 heads of 8."""

EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")

ROW_TENSORS = (
    "embed_tokens.weight",
    "embed_in.weight",
    "wte.weight",
    "lm_head.weight",
    "lm_head.bias",
    "embed_out.weight",
)
"""Ends of the names of tensors with a row for each token; only they may have padding rows."""
OUTPUT_LAYERS = (OUTPUT_LAYER, "embed_out.weight")

Kind = Literal["embedding", "output", "attention", "mlp", "norm", "other"]
"""Kinds of modules; a tied output layer is the embedding."""
MODULES: Mapping[Kind, tuple[str, ...]] = {
    "attention": ("self_attn", "attn", "attention"),
    "mlp": ("mlp", "block_sparse_moe", "feed_forward"),
}
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")

ARITHMETIC_DTYPES = ("F32", "F16", "BF16")
"""Dtypes that float32 holds exactly; a quantised tensor cannot be subtracted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Anatomy:
    """What two sets of weights must have in common before one is added to the other."""

    architecture: str
    sizes: Mapping[str, Any]
    settings: Mapping[str, Any]
    """What no tensor shows, but the weights were trained under: see `_settings`."""
    tied: bool
    shapes: Mapping[str, tuple[int, ...]]
    vocabulary: Vocabulary

    @classmethod
    def of(
        cls,
        folder: Path,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
    ) -> "Anatomy":
        """Put together the facts; `folder` holds the tokenizer.

        Raises CheckpointError where a tensor cannot be computed with, the output layer is missing,
        or there is no tokenizer.
        """
        for name, info in tensors.items():
            if info.dtype not in ARITHMETIC_DTYPES:
                raise CheckpointError(
                    f"{info.file}: expected weights of {', '.join(ARITHMETIC_DTYPES)}, found "
                    f"tensor {name!r} of {info.dtype}; take the model before it was quantised"
                )
        rows = [info.shape[0] for name, info in tensors.items() if has_rows(name)]
        if not rows or len(set(rows)) > 1:
            raise CheckpointError(
                f"{folder}: expected an embedding and an output layer with a row for each token, "
                f"found {rows or 'none'} rows; is this a causal language model?"
            )
        tied = is_tied(config, tensors)
        if not tied and not any(name.endswith(OUTPUT_LAYERS) for name in tensors):
            raise CheckpointError(
                f"{folder}: expected an output layer {OUTPUT_LAYER!r}, for config.json says that "
                "it is not the embedding, found none; it would be random. Fetch the missing "
                "weights, or set tie_word_embeddings to true if the embedding is meant"
            )
        return cls(
            architecture=str((config.get("architectures") or [config["model_type"]])[0]),
            sizes={key: config[key] for key in SIZES if config.get(key) is not None},
            settings=_settings(config),
            tied=tied,
            shapes={name: info.shape for name, info in tensors.items()},
            vocabulary=Vocabulary.read(folder, rows[0]),
        )

    def first_difference(self, other: "Anatomy") -> str | None:
        """Say what differs, with both values; None where arithmetic is sound.

        A size that only one config states is left to the shapes, and such a setting is taken for
        the default. Rows of the embedding may differ.
        """
        if self.architecture != other.architecture:
            return f"the architecture is {self.architecture} and {other.architecture}"
        for ours, theirs in ((self.sizes, other.sizes), (self.settings, other.settings)):
            for key in ours:
                if key in theirs and ours[key] != theirs[key]:
                    return f"{key} is {ours[key]} and {theirs[key]}"
        if self.tied != other.tied:
            return f"the embeddings are {_tied(self.tied)} and {_tied(other.tied)}"
        for name in sorted(self.shapes.keys() | other.shapes.keys()):
            if name not in self.shapes or name not in other.shapes:
                lacking = "first" if name not in self.shapes else "second"
                return f"tensor {name!r} is missing in the {lacking}"
            a, b = self.shapes[name], other.shapes[name]
            if a[has_rows(name) :] != b[has_rows(name) :]:
                return f"tensor {name!r} has shape {list(a)} and {list(b)}"
        return self.vocabulary.first_difference(other.vocabulary)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A base and the instruct model that was tuned from it."""

    base: Checkpoint
    instruct: Checkpoint
    anatomy: Anatomy
    """Of the instruct side."""
    base_rows: NDArray[np.int64]
    """For each row for a token on the instruct side, the base's row; -1 where it has none."""

    @classmethod
    def open(cls, base: str | Path | Checkpoint, instruct: str | Path | Checkpoint) -> "Family":
        """Open both, where they are not open yet, and prove that they are of one build.

        Raises FamilyError naming the first difference, CheckpointError where one cannot be read.
        """
        first, second = Checkpoint.open(base), Checkpoint.open(instruct)
        before, anatomy = anatomy_of(first), anatomy_of(second)
        difference = before.first_difference(anatomy)
        if difference:
            raise FamilyError(
                f"{first.path} and {second.path} are not one family: {difference}. Take the base "
                "that this instruct model was tuned from"
            )
        rows = anatomy.vocabulary.rows_in(before.vocabulary)
        return cls(base=first, instruct=second, anatomy=anatomy, base_rows=rows)

    @property
    def num_tokens(self) -> int:
        return self.anatomy.vocabulary.num_tokens

    @property
    def num_rows(self) -> int:
        return self.anatomy.vocabulary.num_rows

    @property
    def num_parameters(self) -> int:
        """Numbers in the instruct model; tied embeddings are counted once."""
        return self.instruct.num_parameters

    def describe(self) -> list[tuple[str, str]]:
        """Return (fact, value) rows for a person."""
        sizes = self.anatomy.sizes
        dtypes = sorted({info.dtype for info in self.instruct.tensors.values()})
        return [
            ("architecture", self.anatomy.architecture),
            ("parameters", f"{self.num_parameters:,}"),
            ("tensors", f"{len(self.instruct.tensors)}, {' and '.join(dtypes)}"),
            ("layers", f"{sizes.get('num_hidden_layers', '?')} of {sizes.get('hidden_size', '?')}"),
            ("tokens", f"{self.num_tokens:,} in {self.num_rows:,} rows"),
            ("embeddings", _tied(self.anatomy.tied)),
        ]


def anatomy_of(checkpoint: Checkpoint) -> Anatomy:
    return Anatomy.of(checkpoint.path, checkpoint.config, checkpoint.tensors)


def has_rows(name: str) -> bool:
    """Whether the tensor has a row for each token."""
    return name.endswith(ROW_TENSORS)


def kind_of(name: str) -> Kind:
    """What kind of module a tensor belongs to, by its name in Llama, Qwen, Mistral and Gemma."""
    if has_rows(name):
        return "output" if name.startswith(("lm_head", "embed_out")) else "embedding"
    *path, _ = name.split(".")
    if path and "norm" in path[-1]:
        return "norm"
    for kind, modules in MODULES.items():
        if any(module in modules for module in path):
            return kind
    return "other"


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor stands in; None outside the layers."""
    found = LAYER.search(name)
    return int(found[1]) if found else None


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config states of activation, norms and rotary positions, whichever way it is spelled.

    Rotary base, share and scaling stand on top (the last in rope_scaling) or, since transformers 5,
    in rope_parameters, there by kind of layer where the kinds differ. Gemma's hidden_act gives way
    to its hidden_activation, and means the tanh form where it says gelu; so all forms of gelu, a
    thousandth apart, count as one.
    """
    names = ("hidden_activation", "hidden_act", "activation_function")
    activation = next((str(config[name]) for name in names if config.get(name)), "")
    if activation.startswith("gelu"):
        activation = "gelu"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get("full_attention") or rope
    base = config.get("rope_theta", config.get("rotary_emb_base"))
    share = config.get("partial_rotary_factor", config.get("rotary_pct"))
    stated = {
        "hidden_act": {"": None, "swish": "silu"}.get(activation, activation),
        **{key: config.get(key) for key in EPSILONS},
        "rope_theta": rope.get("rope_theta", base),
        "partial_rotary_factor": rope.get("partial_rotary_factor", share),
        "rope_type": rope.get("rope_type", rope.get("type")),
        "rope factor": rope.get("factor"),
    }
    return {key: value for key, value in stated.items() if value is not None}


def _tied(tied: bool) -> str:
    return "tied" if tied else "not tied"
