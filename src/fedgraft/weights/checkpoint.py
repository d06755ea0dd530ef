"""A Hugging Face checkpoint on disk, read tensor by tensor and block by block.

The format is safetensors and nothing else: 8 bytes with the header's length, a JSON header (name ->
dtype, shape, offsets), then the raw numbers. Blocks are small enough to stay in the processor's
cache, so memory does not grow with the model; pickles are never opened.
"""

import json
import math
import mmap
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from fedgraft.errors import CheckpointError
from fedgraft.provenance import Record, hash_files, hash_json
from fedgraft.weights.workers import each_tensor

Array = NDArray[Any]

Fill = Callable[[int, Array], None]
"""Fills a flat array with a tensor's numbers, from the given index on."""

BLOCK_ELEMENTS = 1 << 18
"""Numbers in a block: 512 KB of bfloat16, which with the block that is made of two stay in a core's
cache; small blocks cost more calls from Python than they save."""

DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "F64": np.dtype("<f8"),
        "F32": np.dtype("<f4"),
        "F16": np.dtype("<f2"),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "I64": np.dtype("<i8"),
        "I32": np.dtype("<i4"),
        "I16": np.dtype("<i2"),
        "I8": np.dtype("i1"),
        "U8": np.dtype("u1"),
        "BOOL": np.dtype("?"),
    }
)
CONFIG_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What a config.json calls the dtypes of weights."""

OUTPUT_LAYER, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
READING = (
    *("config.json", "generation_config.json", "token*.*", "vocab*.*", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template*"),
)
"""Files beside the weights that decide on what the model reads and when it stops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """What a tensor is and where it lies."""

    dtype: str
    """As safetensors names it: F32, BF16, ..."""
    shape: tuple[int, ...]
    file: Path
    start: int
    """Offset of its first byte in the file."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * DTYPES[self.dtype].itemsize


class TensorFiles:
    """A directory's tensors by name: what checkpoints and residuals have in common.

    Holds no open file: any number of threads may read.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(sorted(tensors.items())))
        self._digests: Digests | dict[str, bytes] = Digests(self.tensors)

    def blocks(self, name: str, num_elements: int = BLOCK_ELEMENTS) -> Iterator[Array]:
        """Yield the tensor's numbers in order, flat, in arrays of at most `num_elements`.

        A block is valid until the next one is asked for: the buffer is used again. A tensor that
        was read to its end need not be read again for `content_hash`.
        """
        info = self.tensors[name]
        digest = None if name in self._digests else blake3()
        size = info.num_elements
        buffer = np.empty(min(num_elements, size), DTYPES[info.dtype])
        with self._opened(name) as fill:
            for first in range(0, size, num_elements):
                block = buffer[: size - first]
                fill(first, block)
                if digest:
                    digest.update(block.view(np.uint8).data)
                    if first + block.size == size:
                        self._digests[name] = digest.digest()
                yield block

    def rows(
        self, name: str, picks: NDArray[np.int64], num_elements: int = BLOCK_ELEMENTS
    ) -> Iterator[Array]:
        """Yield the rows `picks` of a tensor in that order, in such blocks; for -1 zeros."""
        info = self.tensors[name]
        width = info.num_elements // info.shape[0]
        breaks = np.flatnonzero((np.diff(picks) != 1) | (picks[:-1] < 0)) + 1
        starts = np.concatenate([[0], breaks, [len(picks)]]).tolist()
        runs = [(a * width, b * width, int(picks[a]) * width) for a, b in pairwise(starts)]
        total = len(picks) * width
        buffer = np.empty(min(num_elements, total), DTYPES[info.dtype])
        with self._opened(name) as fill:
            run = 0
            for first in range(0, total, num_elements):
                block = buffer[: total - first]
                end = first + block.size
                while run < len(runs):
                    a, b, source = runs[run]
                    part = block[max(a, first) - first : min(b, end) - first]
                    if source < 0:
                        part[:] = 0
                    else:
                        fill(source + max(a, first) - a, part)
                    if b > end:
                        break
                    run += 1
                yield block

    def read(self, name: str) -> Array:
        """Return the whole tensor in its shape."""
        info = self.tensors[name]
        whole = [np.empty(0, DTYPES[info.dtype]), *self.blocks(name, max(info.num_elements, 1))]
        return whole[-1].reshape(info.shape)

    @cached_property
    def content_hash(self) -> str:
        """Hash of names, dtypes, shapes and numbers: the same for any layout in files."""
        unread = {
            name: info.num_bytes
            for name, info in self.tensors.items()
            if info.num_bytes and name not in self._digests
        }
        each_tensor(f"hashing {self.path.name}", unread, self._exhaust)
        return hash_tensors({n: (i.dtype, i.shape) for n, i in self.tensors.items()}, self._digests)

    def _exhaust(self, name: str) -> None:
        for _ in self.blocks(name):
            pass

    @contextmanager
    def _opened(self, name: str) -> Iterator[Fill]:
        """Open what holds the tensor; where else numbers can come from, this is replaced."""
        info = self.tensors[name]
        with info.file.open("rb", buffering=0) as file:

            def fill(first: int, block: Array) -> None:
                left, place = block.view(np.uint8).data, info.start + first * block.itemsize
                while left:
                    num_read = os.preadv(file.fileno(), [left], place)
                    if not num_read:
                        raise CheckpointError(
                            f"{info.file}: the file ended inside tensor {name!r}; it changed while "
                            "it was read. Run the same command again when nothing writes to it"
                        )
                    left, place = left[num_read:], place + num_read

            yield fill


class Digests:
    """The digest of each tensor that was read, in memory that forked workers share."""

    SIZE = 32

    def __init__(self, names: Iterable[str]) -> None:
        self._places = {name: n * (1 + self.SIZE) for n, name in enumerate(names)}
        self._memory = mmap.mmap(-1, max(1, len(self._places) * (1 + self.SIZE)))

    def __contains__(self, name: str) -> bool:
        return bool(self._memory[self._places[name]])

    def get(self, name: str, default: bytes) -> bytes:
        first = self._places[name] + 1
        return self._memory[first : first + self.SIZE] if name in self else default

    def __setitem__(self, name: str, digest: bytes) -> None:
        first = self._places[name] + 1
        self._memory[first : first + self.SIZE] = digest
        self._memory[first - 1] = 1  # last, so that nobody reads half a digest


def hash_tensors(
    layout: Mapping[str, tuple[str, tuple[int, ...]]], digests: "Digests | Mapping[str, bytes]"
) -> str:
    """Content hash of tensors by name, dtype, shape and the BLAKE3 digest of their numbers."""
    nothing = blake3().digest()
    facts = [(name, *layout[name], digests.get(name, nothing).hex()) for name in sorted(layout)]
    return "blake3:" + blake3(json.dumps(facts).encode()).hexdigest()


class Checkpoint(TensorFiles):
    """A model on disk: its tensors, its config, and its record where fedgraft made it."""

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], config: dict[str, Any]
    ) -> None:
        super().__init__(path, tensors)
        self.config = config
        self.tied = is_tied(config, tensors)
        if self.tied and OUTPUT_LAYER in tensors:
            self._drop_tied_copy()

    @classmethod
    def open(cls, source: "str | Path | Checkpoint") -> "Checkpoint":
        """Open a directory, or a model of the hub by `organisation/name[@revision]`.

        What is open already is returned as it is.

        Raises CheckpointError where there is no such thing, it holds pickles only, a shard is
        missing, truncated or mislabelled, the index and the shards disagree, or the config is
        missing or broken.
        """
        if isinstance(source, Checkpoint):
            return source
        path = resolve(source)
        config = read_config(path)
        return cls(path, read_tensors(path, "model"), config)

    @property
    def num_parameters(self) -> int:
        """Numbers in the tensors; tied embeddings are counted once."""
        return sum(info.num_elements for info in self.tensors.values())

    @property
    def reading_hash(self) -> str:
        """Hash of config, tokenizer, chat template and stop tokens: what a score depends on besides
        the numbers, and what `content_hash` leaves out."""
        files = {file for pattern in READING for file in self.path.glob(pattern)}
        return hash_json({file.name: hash_files([file]) for file in files})

    @property
    def record(self) -> Record | None:
        return Record.read(self.path)

    def _drop_tied_copy(self) -> None:
        """Leave out an output layer that was stored although it is tied, if it is a true copy."""
        embedding = next((name for name in self.tensors if name.endswith(EMBEDDING)), None)
        if embedding is not None:
            pairs = zip(self.blocks(OUTPUT_LAYER), self.blocks(embedding), strict=True)
            if all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in pairs):
                self.tensors = MappingProxyType(
                    {name: info for name, info in self.tensors.items() if name != OUTPUT_LAYER}
                )
                return
        raise CheckpointError(
            f"{self.path}: config.json ties the embeddings, but {OUTPUT_LAYER!r} is stored with "
            f"other numbers than {embedding!r}; set tie_word_embeddings to false if both are meant"
        )


def is_tied(config: Mapping[str, Any], names: Container[str]) -> bool:
    """Whether the output layer is the embedding; a silent config leaves it to the tensors."""
    declared = config.get("tie_word_embeddings")
    return OUTPUT_LAYER not in names if declared is None else bool(declared)


def resolve(source: str | Path) -> Path:
    """Return the directory that `source` names, after fetching it where it is a hub id.

    Of a hub model only safetensors and the small files beside them are fetched.

    Raises CheckpointError where there is neither such a directory nor such a model.
    """
    path = Path(source)
    if path.is_dir():
        return path
    name, _, revision = str(source).partition("@")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise CheckpointError(
            f"{source}: expected a checkpoint, found no such directory; name a directory, or a "
            "model of the hub as organisation/name[@revision]"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,  # its client's
        RevisionResolutionError,
        XetDownloadError,
    )

    patterns = ["model*.safetensors*", "*.json", "*.txt", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except (
        *(HTTPError, HFValidationError, OSError),
        *(RevisionResolutionError, XetDownloadError),
    ) as error:
        raise CheckpointError(
            f"{source}: there is no such directory, and fetching it from the hub failed "
            f"({type(error).__name__}); check the name, the network and, for a gated model, that "
            "`hf auth login` was done"
        ) from error


def fetched(source: str | Path) -> Path | None:
    """The directory that `source` names or, for a hub id, where it was fetched to; else None.

    Asks no network.
    """
    if Path(source).is_dir():
        return Path(source)
    name, _, revision = str(source).partition("@")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return found if any(found.glob("model*.safetensors")) else None


def read_config(path: Path) -> dict[str, Any]:
    """Return a directory's config.json; raises CheckpointError where it is missing or broken."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_bytes())
        config["model_type"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: expected a checkpoint with a config.json, found {_listing(path)}; name the "
            "directory that holds config.json and the weights"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: expected a config with the model_type, found {error!r}; fetch it again"
        ) from error
    return dict(config)


def read_tensors(path: Path, prefix: str) -> dict[str, TensorInfo]:
    """Return what `PREFIX.safetensors`, or the shards of `PREFIX.safetensors.index.json`, hold.

    Raises CheckpointError where they are missing, damaged, or disagree with the index.
    """
    single, index = path / f"{prefix}.safetensors", path / f"{prefix}.safetensors.index.json"
    if single.exists():
        return read_header(single)
    if index.exists():
        return _read_shards(index)
    for name in PICKLES:
        if (path / name).exists():
            raise CheckpointError(
                f"{path}: expected safetensors, found the pickle {name}, which can run code when "
                "it is opened, so fedgraft never does. Convert it where you trust it: "
                "AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(NEW_PATH)"
            )
    raise CheckpointError(
        f"{path}: expected weights in {single.name}, or shards with {index.name}, found "
        f"{_listing(path)}; fetch the missing files"
    )


def _read_shards(index: Path) -> dict[str, TensorInfo]:
    try:
        places: dict[str, str] = dict(json.loads(index.read_bytes())["weight_map"])
        if any(Path(shard).name != shard for shard in places.values()):
            raise ValueError("a shard in another directory")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{index}: expected an index with a weight_map, found {error!r}; fetch it again"
        ) from error
    shards = sorted(set(places.values()))
    missing = [shard for shard in shards if not (index.parent / shard).exists()]
    if missing:
        raise CheckpointError(
            f"{index.parent}: expected the {len(shards)} shards that {index.name} names, missing "
            f"{', '.join(missing)}; fetch the missing files"
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in read_header(index.parent / shard).items():
            if name in tensors:
                raise CheckpointError(
                    f"{index.parent}: expected each tensor once, found {name!r} in both "
                    f"{tensors[name].file.name} and {shard}; fetch the checkpoint again"
                )
            tensors[name] = info
    for name in sorted(places.keys() | tensors.keys()):
        place = places.get(name, "no shard")
        found = tensors[name].file.name if name in tensors else "no shard"
        if place != found:
            raise CheckpointError(
                f"{index}: places tensor {name!r} in {place}, found it in {found}; fetch the index "
                "and the shards again, all of one revision"
            )
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return where each tensor of a safetensors file lies, after checks that the file is whole.

    Raises CheckpointError for a header that is too short, no JSON or of unknown dtypes, for sizes
    that do not fit, overlap or leave gaps, and for more or fewer bytes than the header promises.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            header = stream.read(length) if length <= min(size, MAX_HEADER_BYTES) else b""
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    if start == b"version ":
        raise CheckpointError(
            f"{file}: expected weights, found the pointer that git leaves in their place; run "
            "`git lfs pull` in that directory"
        )
    if not header or len(header) < length:
        raise CheckpointError(
            f"{file}: expected a safetensors file, found {size} bytes, of which the header would "
            f"be {length}; the file was cut short or is of another format. Fetch it again"
        )
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        spans = {name: tuple(entry["data_offsets"]) for name, entry in entries.items()}
        tensors = {
            name: _tensor_info(file, name, 8 + length + spans[name][0], entries[name])
            for name in sorted(spans, key=spans.__getitem__)
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{file}: expected a safetensors header, found {error!r}; fetch the file again"
        ) from error
    position = 0
    for name, info in tensors.items():
        expected = (position, position + info.num_bytes)
        if spans[name] != expected:
            raise CheckpointError(
                f"{file}: expected tensor {name!r} of {info.dtype} {list(info.shape)} to fill "
                f"bytes {list(expected)}, found {list(spans[name])}: the header leaves a gap, "
                "overlaps or has another shape. Fetch the file again"
            )
        position = expected[1]
    if 8 + length + position != size:
        raise CheckpointError(
            f"{file}: expected {8 + length + position} bytes, found {size}; the file is truncated "
            "or has a tail. Fetch it again"
        )
    return tensors


def _tensor_info(file: Path, name: str, start: int, entry: Mapping[str, Any]) -> TensorInfo:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: expected tensors of {', '.join(DTYPES)}, found {name!r} of {dtype}; take the "
            "model before it was quantised or, if it was not, fetch the file again"
        )
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"shape {list(shape)}")
    return TensorInfo(dtype=dtype, shape=shape, file=file, start=start)


def _listing(path: Path) -> str:
    if not path.is_dir():
        return "no such directory"
    names = sorted(child.name for child in path.iterdir())
    return ", ".join(names[:6] + ["..."] * (len(names) > 6)) or "an empty directory"
