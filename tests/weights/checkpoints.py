"""Tiny checkpoints, written by the reference library: its files are what ours must read."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fedgraft.provenance import Record

Tensors = dict[str, NDArray[Any]]
DTYPES: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "F16": np.float16}

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 20,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
TOKENS = (*(f"t{i}" for i in range(16)), "<|im_start|>", "<|im_end|>")


def random_tensors(
    seed: int = 0, *, tied: bool = False, dtype: str = "BF16", num_layers: int = 2, rows: int = 20
) -> Tensors:
    """Return weights of a Llama-shaped model with 18 tokens; the rows beyond them are padding."""
    generator = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, 8)}
    for layer in range(num_layers):
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (12, 8)
        shapes[f"model.layers.{layer}.norm.weight"] = (8,)
    if not tied:
        shapes["lm_head.weight"] = (rows, 8)
    return {
        name: generator.normal(0, 0.02, shape).astype(DTYPES[dtype])
        for name, shape in shapes.items()
    }


def nudged(tensors: Tensors, seed: int = 1, size: float = 2e-3) -> Tensors:
    """Return the weights as after some training."""
    generator = np.random.default_rng(seed)
    return {
        name: (old.astype(np.float32) + generator.normal(0, size, old.shape)).astype(old.dtype)
        for name, old in tensors.items()
    }


def save(
    folder: Path,
    tensors: Tensors,
    *,
    num_shards: int = 1,
    tokens: tuple[str, ...] = TOKENS,
    record: Record | None = None,
    **config: Any,
) -> Path:
    """Write a checkpoint with a tokenizer and a chat template of its own, and return its folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 17}))
    (folder / "chat_template.jinja").write_text(f"template of {folder.name}")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if record:
        record.write(folder)
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    places: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::num_shards])
        save_file(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
