"""Checkpoints of random numbers with the names, shapes and files of real models, bfloat16.

    .venv/bin/python benchmarks/synthetic.py 0.5b runs/synthetic/0.5b
    .venv/bin/python benchmarks/synthetic.py 8b runs/synthetic/8b base instruct

writes `base`, and as many as are asked for of

    instruct, second    base + an update of the relative size: two instruct models of one base
    newer               the same, with a record that it descends from the base, as a graft asks

The cost of weight arithmetic depends on shapes, dtypes and how many numbers an update changes, so
nothing else is real. Each tensor has a seed of its own; same arguments, same bytes.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, chain, islice, product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel

from fedgraft.provenance import Record, derive_seed, new_artefact
from fedgraft.weights.checkpoint import BLOCK_ELEMENTS, Array, Checkpoint
from fedgraft.weights.writer import Layout, write_tensors

UPDATED = ("instruct", "second", "newer")
SPREAD = 0.02
"""Standard deviation of the weights, and of a norm's weights around one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A model of the Llama kind without its numbers."""

    config: Mapping[str, Any]
    num_spelled: int
    """Tokens that the tokenizer merges out of bytes."""
    num_special: int

    def layout(self) -> Layout:
        """Return the tensors as the architecture names them."""
        c = self.config
        width, inner = c["hidden_size"], c["intermediate_size"]
        keys = width // c["num_attention_heads"] * c["num_key_value_heads"]
        projections = {"q": width, "k": keys, "v": keys}
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (c["vocab_size"], width),
            "model.norm.weight": (width,),
        }
        if not c["tie_word_embeddings"]:
            shapes["lm_head.weight"] = (c["vocab_size"], width)
        for layer in range(c["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            for letter, rows in projections.items():
                shapes[f"{prefix}.self_attn.{letter}_proj.weight"] = (rows, width)
                if c["model_type"] == "qwen2":
                    shapes[f"{prefix}.self_attn.{letter}_proj.bias"] = (rows,)
            shapes |= {
                f"{prefix}.self_attn.o_proj.weight": (width, width),
                f"{prefix}.mlp.gate_proj.weight": (inner, width),
                f"{prefix}.mlp.up_proj.weight": (inner, width),
                f"{prefix}.mlp.down_proj.weight": (width, inner),
                f"{prefix}.input_layernorm.weight": (width,),
                f"{prefix}.post_attention_layernorm.weight": (width,),
            }
        return {name: ("BF16", shape) for name, shape in shapes.items()}

    def tokenizer(self) -> dict[str, Any]:
        """Return a byte-level BPE of the real one's size: letters, pairs of them, triples, ..."""
        letters, by_bytes = (
            sorted(ByteLevel.alphabet()),
            {"type": "ByteLevel", "trim_offsets": True},
        )
        words = chain.from_iterable(product(letters, repeat=n) for n in range(1, 4))
        spelled = ["".join(word) for word in islice(words, self.num_spelled)]
        return {
            "version": "1.0",
            "added_tokens": [
                {
                    "id": self.num_spelled + n,
                    "content": f"<|special_{n}|>",
                    **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
                    "special": True,
                }
                for n in range(self.num_special)
            ],
            "pre_tokenizer": by_bytes | {"add_prefix_space": False, "use_regex": True},
            "decoder": by_bytes | {"add_prefix_space": False, "use_regex": True},
            "model": {
                "type": "BPE",
                "vocab": {token: i for i, token in enumerate(spelled)},
                "merges": [f"{word[:-1]} {word[-1]}" for word in spelled if len(word) > 1],
            },
        }


QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
SHAPES: Mapping[str, Shape] = {
    "0.5b": Shape(
        config=QWEN2
        | {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
        },
        num_spelled=151643,
        num_special=3,
    ),
    "1.5b": Shape(
        config=QWEN2
        | {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_attention_heads": 12,
            "num_hidden_layers": 28,
            "num_key_value_heads": 2,
        },
        num_spelled=151643,
        num_special=3,
    ),
    "8b": Shape(
        config={
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 128256,
        },
        num_spelled=128000,
        num_special=256,
    ),
}
"""Qwen2-0.5B, Qwen2-1.5B and Llama-3-8B."""


def write_base(shape: Shape, out: Path, *, seed: int = 0, overwrite: bool = False) -> None:
    """Write weights of mean zero, those of norms of mean one."""
    layout = shape.layout()

    def blocks(name: str) -> Iterator[Array]:
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        for noise, small in _noise(math.prod(layout[name][1]), derive_seed(seed, "base", name)):
            noise *= SPREAD
            noise += mean
            np.copyto(small, noise, casting="unsafe")
            yield small

    with new_artefact(out, overwrite=overwrite) as folder:
        write_tensors(folder, layout, blocks)
        _write_rest(shape, folder)


def write_zeros(shape: Shape, out: Path, *, overwrite: bool = False) -> None:
    """Write zeros, as holes in the file: they take no disk, and cost as much memory to work on."""
    layout = shape.layout()
    with new_artefact(out, overwrite=overwrite) as folder:
        _write_rest(shape, folder)
        sizes = {name: 2 * math.prod(form) for name, (_, form) in layout.items()}
        ends = list(accumulate(sizes.values()))
        header = {
            name: {"dtype": "BF16", "shape": form, "data_offsets": [end - sizes[name], end]}
            for (name, (_, form)), end in zip(layout.items(), ends, strict=True)
        }
        text = json.dumps(header).encode()
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + ends[-1])


def write_update(
    shape: Shape,
    base: Path,
    out: Path,
    *,
    relative: float = 1e-3,
    seed: int = 0,
    recorded: bool = False,
    overwrite: bool = False,
) -> None:
    """Write base + an update whose norm is `relative` times that of the weights' spread.

    `recorded` adds a record that names the base as the ancestor.
    """
    source = Checkpoint.open(base)

    def blocks(name: str) -> Iterator[Array]:
        noises = _noise(source.tensors[name].num_elements, derive_seed(seed, out.name, name))
        for old, (noise, small) in zip(source.blocks(name), noises, strict=True):
            noise *= SPREAD * relative
            noise += old
            np.copyto(small, noise, casting="unsafe")
            yield small

    with new_artefact(out, overwrite=overwrite) as folder:
        write_tensors(folder, shape.layout(), blocks)
        _write_rest(shape, folder)
        if recorded:
            Record.make("checkpoint", ancestors=(source.content_hash,)).write(folder)


def _noise(num_elements: int, seed: int) -> Iterator[tuple[NDArray[np.float32], Array]]:
    """Yield Gaussian numbers in blocks, each with a bfloat16 block to put the result into."""
    generator = np.random.Generator(np.random.SFC64(seed))
    wide = np.empty(BLOCK_ELEMENTS, np.float32)
    small = np.empty(BLOCK_ELEMENTS, ml_dtypes.bfloat16)
    for first in range(0, num_elements, BLOCK_ELEMENTS):
        size = min(BLOCK_ELEMENTS, num_elements - first)
        generator.standard_normal(dtype=np.float32, out=wide[:size])
        yield wide[:size], small[:size]


def _write_rest(shape: Shape, folder: Path) -> None:
    last = f"<|special_{shape.num_special - 1}|>"
    files = {
        "config.json": dict(shape.config),
        "generation_config.json": {"eos_token_id": shape.num_spelled + shape.num_special - 1},
        "tokenizer.json": shape.tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": last,
            "chat_template": "{% for m in messages %}{{ m['content'] }}" + last + "{% endfor %}",
        },
    }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help="base, instruct, second, newer")
    parser.add_argument("--relative", type=float, default=1e-3, help="size of an update")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--zeros", action="store_true", help="nothing but zeros, in sparse files")
    given = parser.parse_args()
    names = given.names or ["base", "instruct", "newer"]
    if unknown := set(names) - {"base", *UPDATED}:
        parser.error(f"expected base, {', '.join(UPDATED)}, found {', '.join(sorted(unknown))}")
    shape, base = SHAPES[given.shape], given.out / "base"
    for name in sorted(names, key=lambda name: name != "base"):
        started = time.monotonic()
        if given.zeros:
            write_zeros(shape, given.out / name)
        elif name == "base":
            write_base(shape, base, seed=given.seed)
        else:
            write_update(
                shape,
                base,
                given.out / name,
                relative=given.relative,
                seed=given.seed,
                recorded=name == "newer",
            )
        print(f"{given.out / name}: {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
