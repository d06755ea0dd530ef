"""Tiny real models, tokenizers and texts for tests, made in milliseconds; nothing is mocked."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Architecture = Literal["llama", "qwen2", "mistral", "gemma"]
ARCHITECTURES: tuple[Architecture, ...] = ("llama", "qwen2", "mistral", "gemma")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = (
    "The heron stands in the river. The river runs past the mill. Nobody at the mill is awake.",
    "Every morning the baker opens the door, sweeps the step and puts out the first bread.",
    "A ticket is closed when the person who opened it says so, and not before.",
)


def tiny_tokenizer(*, vocabulary: int = 320) -> "PreTrainedTokenizerBase":
    """A byte-level BPE with `<|endoftext|>`, turn markers and a chat template; spells any text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(
    architecture: Architecture = "qwen2",
    *,
    tied: bool = True,
    seed: int = 0,
    rows: int = 320,
    num_layers: int = 2,
    hidden_size: int = 32,
    dtype: torch.dtype = torch.float32,
) -> "PreTrainedModel":
    """A random model of the architecture with `rows` embedding rows."""
    configs = {
        "llama": LlamaConfig,
        "qwen2": Qwen2Config,
        "mistral": MistralConfig,
        "gemma": GemmaConfig,
    }
    from transformers import AutoModelForCausalLM

    config = configs[architecture](
        vocab_size=rows,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    return model.to(dtype).eval()


def save_tiny(
    folder: Path,
    architecture: Architecture = "qwen2",
    *,
    tied: bool = True,
    seed: int = 0,
    rows: int = 320,
    num_layers: int = 2,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
) -> Path:
    """A tiny checkpoint as transformers writes it, with its tokenizer; returns its folder."""
    model = tiny_model(
        architecture, tied=tied, seed=seed, rows=rows, num_layers=num_layers, dtype=dtype
    )
    model.generation_config.eos_token_id = [0, 2]
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_tiny_instruct(base: Path, folder: Path, *, step: float = 0.02, seed: int = 1) -> Path:
    """A second checkpoint of the family of `base`: each weight moved a little, at random."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * step
            parameter += (noise * parameter.float().std()).to(parameter.dtype)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
