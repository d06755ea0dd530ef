"""Language models in memory: opened for training, scoring or reading, and saved.

The only caller of transformers' Auto classes. Weights come from safetensors alone, code that ships
with a checkpoint is never run.
"""

import ctypes
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, logging

from fedgraft.errors import ArtefactError, CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Precision = Literal["float32", "bfloat16"]


def open_model(path: str | Path, *, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """The model of a directory, its weights in `dtype`, in evaluation mode, on the best device.

    Raises CheckpointError where the directory is none, or holds no model that transformers knows.
    """
    return _open(AutoModelForCausalLM, path, dtype, "a causal language model")


def open_encoder(path: str | Path, *, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """A model that reads texts and answers nothing: of any kind, without its output layer.

    A causal model or a sentence encoder, opened as `open_model` does. How a sentence encoder pools
    its tokens (`1_Pooling`, a dense layer behind it) is not read.

    Raises CheckpointError as `open_model` does, and for a model that is more than a reader of text.
    """
    model = _open(AutoModel, path, dtype, "a causal language model or a sentence encoder")
    reads_text = isinstance(model.get_input_embeddings(), torch.nn.Embedding)
    if model.config.is_encoder_decoder or not reads_text:
        kind = "reads and writes (encoder-decoder)" if reads_text else "does not read text alone"
        raise CheckpointError(
            f"{path}: expected a causal language model or a sentence encoder, found "
            f"{type(model).__name__}, which {kind}; name another one"
        )
    return model


def open_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a directory.

    Raises CheckpointError where there is none that transformers can open.
    """
    _check_directory(path)
    remedy = "copy the tokenizer's files of the original model beside the weights"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: expected a tokenizer (tokenizer.json), found: {_first_line(error)}; {remedy}"
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made up where the files are missing
        raise CheckpointError(
            f"{path}: expected a tokenizer (tokenizer.json), found none; {remedy}"
        )
    return tokenizer


def fresh_model(like: str | Path, sizes: Mapping[str, int], *, seed: int) -> "PreTrainedModel":
    """Random weights of the architecture of a checkpoint and its number of tokens, in its dtype.

    Args:
        sizes: What is to be otherwise in its config, e.g. `{"num_hidden_layers": 2}`.

    Raises CheckpointError where there is no such checkpoint, or sizes that do not go together.
    """
    _check_directory(like)
    _quiet()
    try:
        config = AutoConfig.from_pretrained(
            like, trust_remote_code=False, local_files_only=True, **sizes
        )
        layers = getattr(config, "layer_types", None)
        if layers and len(layers) != config.num_hidden_layers:
            config.layer_types = layers[:1] * config.num_hidden_layers
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"{config.hidden_size} numbers for {config.num_attention_heads} heads alike"
            )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{like}: expected a config that a model of other sizes can be made from, found: "
            f"{_first_line(error)}; correct the sizes"
        ) from error
    take_generation_config(model, Path(like))
    return model


def take_generation_config(model: "PreTrainedModel", folder: Path) -> None:
    """Give a model the generation config of a directory, its end tokens among others, if any."""
    if (folder / GENERATION_CONFIG_NAME).exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)


def save_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    *,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write weights in their dtype, configs, tokenizer, chat template; same model, same bytes.

    Args:
        tensors: Of one dtype, written instead of the model's own, which are left as they are; tied
            ones once.
    """
    chosen = None
    if tensors is not None:
        tied = model.all_tied_weights_keys
        chosen = {name: tensor for name, tensor in tensors.items() if name not in tied}
    with saving(folder):
        model.save_pretrained(folder, state_dict=chosen)
    tokenizer.save_pretrained(folder)
    if tensors is not None:
        dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
        file = folder / CONFIG_NAME
        config = json.loads(file.read_bytes()) | {"dtype": dtype, "use_cache": True}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """Turn a failed write into an ArtefactError.

    On a full disk safetensors and torch raise errors of their own, not OSError; torch's does not
    even say why.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise ArtefactError(
            f"could not write {folder}: {_first_line(error)}. Is the disk full? Free some space or "
            "choose another place, then run the same command again"
        ) from error


def device() -> torch.device:
    """The GPU of this process (the first one where it is alone), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks instead of handing them back to the kernel.

    Each batch frees and takes the same hundreds of megabytes; mapping them anew costs a page fault
    for every 4 KB (see docs/performance.md, training and choosing examples).
    """
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another C library, e.g. musl: nothing to tell
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 64 * 2**20)


def training_precision() -> Precision:
    """What forward and backward passes are computed in; the weights stay in float32.

    bfloat16 where the hardware multiplies matrices in it: GPUs since 2020, CPUs with AMX. A CPU
    with AVX512-BF16 but no AMX is slower in bfloat16 (measured: 0.5 to 0.8 of float32 on models of
    1M to 6M parameters), so it stays in float32.
    """
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"


def _open(auto: type[Any], path: str | Path, dtype: torch.dtype, noun: str) -> "PreTrainedModel":
    _check_directory(path)
    _quiet()
    keep_freed_memory()
    model: PreTrainedModel
    try:
        model, loaded = auto.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="sdpa",
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: expected {noun} in safetensors that transformers can open, "
            f"found: {_first_line(error)}"
        ) from error
    _refuse_other_tensors(path, loaded, is_whole=auto is AutoModelForCausalLM)
    return model.to(device()).eval()


HEADS = ("pooler.", "lm_head.", "cls.")
"""What a reader of text has no use for."""
LAYER = re.compile(r"layers?\.\d+\.")
"""In the names of tensors that a reader of text has a use for, whatever its kind."""


def _refuse_other_tensors(path: str | Path, loaded: Mapping[str, Any], *, is_whole: bool) -> None:
    """Refuse a checkpoint whose tensors are not those of its config.

    transformers fills what is missing with random numbers and drops what is left over.

    Args:
        loaded: What transformers says that it did.
        is_whole: Every tensor of the checkpoint has its place in the model.
    """
    for name, theirs, ours in sorted(map(tuple, loaded["mismatched_keys"])):
        raise CheckpointError(
            f"{path}: expected {name} of shape {list(ours)}, as config.json has it, found "
            f"{list(theirs)}; take config.json and weights of one model"
        )
    missing = sorted(n for n in loaded["missing_keys"] if is_whole or not _is_of_a_head(n))
    if missing:
        others = f", and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{path}: expected {missing[0]} among the weights, as config.json has it, found it "
            f"missing{others}; fetch the checkpoint again, or take config.json and weights of one "
            "model"
        )
    left_over = sorted(n for n in loaded["unexpected_keys"] if is_whole or LAYER.search(n))
    if left_over:
        others = f", and {len(left_over) - 1} others" if len(left_over) > 1 else ""
        raise CheckpointError(
            f"{path}: expected the tensors that config.json asks for, found {left_over[0]} "
            f"too{others}; take config.json and weights of one model"
        )


def _is_of_a_head(name: str) -> bool:
    return any(f".{head}" in f".{name}" for head in HEADS)


def _quiet() -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _check_directory(path: str | Path) -> None:
    if not Path(path).is_dir():
        raise CheckpointError(
            f"expected a checkpoint at {path}, found no such directory; name one that holds "
            "config.json, the weights and the tokenizer"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
