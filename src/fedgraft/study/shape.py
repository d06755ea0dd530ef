"""The shape of a model: the sizes that say how many numbers it has, without a single one of them.

    token ids -> embedding [v, h]
    layer x l:   norm [h] -> q [a, h]  k [g, h]  v [g, h] -> attention -> o [h, a]
                 norm [h] -> gate [f, h]  up [f, h] -> product -> down [h, f]
    norm [h] -> output [v, h]   (the embedding itself where it is tied)

Letters: v vocabulary, h hidden size, f intermediate size, l layers, a heads x head size,
g key-value heads x head size.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedgraft.errors import StudyError
from fedgraft.weights.checkpoint import Checkpoint

ModelType = Literal["qwen2", "llama", "mistral", "gemma"]
"""Architectures drawn above, as config.json names them."""


class Shape(BaseModel):
    """What a config.json says of a model's sizes, under the same keys: copy them from there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: ModelType
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    """Rows of the embedding, padding rows included."""
    max_position_embeddings: int = Field(gt=0)
    tie_word_embeddings: bool = False
    head_dim: int | None = Field(default=None, gt=0)
    """Size of a head; hidden size over heads where None."""
    attention_bias: bool = False
    """Biases on q, k, v and o; Qwen2 has them on q, k and v always."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What the weights are stored in."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(
                f"expected num_key_value_heads to divide num_attention_heads, found {groups} and "
                f"{heads}; copy both from config.json"
            )
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"expected num_attention_heads to divide hidden_size, found {heads} and "
                f"{self.hidden_size}; copy both from config.json, and head_dim where it is there"
            )
        return self

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Shape":
        """The shape of a checkpoint on disk, held against every tensor's header.

        Raises StudyError for an architecture that is not the one drawn above, or a tensor that the
        config does not lead one to expect.
        """
        config = checkpoint.config
        sizes = {key: config[key] for key in cls.model_fields if config.get(key) is not None}
        sizes.setdefault("num_key_value_heads", config.get("num_attention_heads"))
        sizes["tie_word_embeddings"] = checkpoint.tied
        if "torch_dtype" in config:  # what transformers called it before 5.0
            sizes.setdefault("dtype", config["torch_dtype"])
        try:
            shape = cls.model_validate(sizes)
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()
            )
            raise StudyError(
                f"{checkpoint.path}: expected the config of a model that can be planned for "
                f"({', '.join(get_args(ModelType))}), found {faults}; `fedgraft study run` asks "
                "for no plan"
            ) from error
        shape.check(checkpoint)
        return shape

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise StudyError, naming the first tensor, where a checkpoint has other tensors."""
        expected = self.tensors
        found = {name: info.shape for name, info in checkpoint.tensors.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise StudyError(
                    f"{checkpoint.path}: expected tensor {name!r} with shape "
                    f"{_said(expected.get(name))}, found {_said(found.get(name))}; correct "
                    "`family.shape` in the study, or take it out: the checkpoint is at hand"
                )

    @property
    def attention_size(self) -> int:
        """The width of all heads together."""
        return self.num_attention_heads * self._head_size

    @property
    def matrices(self) -> Mapping[str, tuple[int, int]]:
        """The matrices that a layer multiplies tokens with: outputs by inputs."""
        hidden, inner, heads = self.hidden_size, self.intermediate_size, self.attention_size
        groups = self.num_key_value_heads * self._head_size
        return {
            "self_attn.q_proj": (heads, hidden),
            "self_attn.k_proj": (groups, hidden),
            "self_attn.v_proj": (groups, hidden),
            "self_attn.o_proj": (hidden, heads),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    @property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor of a checkpoint, by the name that transformers gives it."""
        embedding = (self.vocab_size, self.hidden_size)
        whole: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": embedding,
            "model.norm.weight": (self.hidden_size,),
        }
        if not self.tie_word_embeddings:
            whole["lm_head.weight"] = embedding
        for number in range(self.num_hidden_layers):
            layer = f"model.layers.{number}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                whole[f"{layer}.{norm}.weight"] = (self.hidden_size,)
            for name, size in self.matrices.items():
                whole[f"{layer}.{name}.weight"] = size
                if name.startswith("self_attn") and self._has_bias(name):
                    whole[f"{layer}.{name}.bias"] = size[:1]
        return whole

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors; a tied output layer is counted once."""
        return sum(prod(size) for size in self.tensors.values())

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer."""
        return sum(prod(size) for size in self.matrices.values())

    @property
    def output_weights(self) -> int:
        """Numbers in the matrix that makes logits."""
        return self.vocab_size * self.hidden_size

    def adapter_parameters(self, rank: int) -> int:
        """Numbers in LoRA factors of a rank on every matrix of every layer (arXiv 2106.09685)."""
        return self.num_hidden_layers * sum(rank * sum(size) for size in self.matrices.values())

    @property
    def _head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def _has_bias(self, matrix: str) -> bool:
        if self.model_type == "qwen2":
            return not matrix.endswith("o_proj")
        return self.attention_bias


def _said(size: tuple[int, ...] | None) -> Any:
    return "none of that name" if size is None else list(size)
