"""A Hugging Face checkpoint on disk, opened to be read tensor by tensor, block by block.

The format is safetensors and nothing else: 8 bytes with the header's length, a JSON header (name ->
dtype, shape, offsets), then the raw numbers. We read it with `pread` into buffers of our own, so
memory stays at a few blocks whatever the model's size; pickles are never opened.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fedgraft.errors import CheckpointError
from fedgraft.provenance import Record

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BLOCK_BYTES = 1 << 20
"""Size of a read: large enough to keep the disk busy, small enough to stay in the cache."""

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
FLOATS = ("F64", "F32", "F16", "BF16")
TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.bin")

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """Where a tensor lies."""

    dtype: str
    """As safetensors names it: F32, BF16, ..."""
    shape: tuple[int, ...]
    file: Path
    start: int
    """Offset of its first byte in the file."""

    @property
    def num_elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def num_bytes(self) -> int:
        return self.num_elements * DTYPES[self.dtype].itemsize


class TensorFiles:
    """The tensors of one or more safetensors files, by name; open until closed.

    The ground of checkpoints and residuals alike.
    """

    def __init__(self, path: Path, tensors: dict[str, TensorInfo]) -> None:
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(sorted(tensors.items())))
        self._open_files: dict[Path, int] = {}

    def close(self) -> None:
        for file in self._open_files.values():
            os.close(file)
        self._open_files.clear()

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def blocks(self, name: str, num_elements: int = BLOCK_BYTES // 4) -> Iterator[Array]:
        """The tensor's numbers in order, flat, at most so many at a time; each a fresh array."""
        info = self.tensors[name]
        dtype = DTYPES[info.dtype]
        for first in range(0, info.num_elements, num_elements):
            count = min(num_elements, info.num_elements - first)
            yield self._read(info, name, first, count).view(dtype)

    def read(self, name: str) -> Array:
        """The whole tensor in its shape."""
        info = self.tensors[name]
        data = self._read(info, name, 0, info.num_elements)
        return data.view(DTYPES[info.dtype]).reshape(info.shape)

    @cached_property
    def content_hash(self) -> str:
        """Hash over names, dtypes, shapes and numbers: the same for any layout of shards."""
        digest = hashlib.sha256()
        for name, info in self.tensors.items():
            digest.update(json.dumps([name, info.dtype, info.shape]).encode())
            for block in self.blocks(name):
                digest.update(block.view(np.uint8))
        return "sha256:" + digest.hexdigest()

    def _read(self, info: TensorInfo, name: str, first: int, count: int) -> NDArray[np.uint8]:
        size = DTYPES[info.dtype].itemsize
        data = np.empty(count * size, np.uint8)
        view = memoryview(data)
        if info.file not in self._open_files:
            self._open_files[info.file] = os.open(info.file, os.O_RDONLY)
        file, offset, done = self._open_files[info.file], info.start + first * size, 0
        while done < len(view):
            got = os.preadv(file, [view[done:]], offset + done)
            if not got:
                raise CheckpointError(
                    f"{info.file}: the file ended inside tensor {name!r}; it was changed while "
                    "fedgraft read it. Fetch it again"
                )
            done += got
        return data


class Checkpoint(TensorFiles):
    """A model on disk: its tensors and its config."""

    def __init__(
        self, path: Path, tensors: dict[str, TensorInfo], config: dict[str, Any], source: str
    ) -> None:
        super().__init__(path, tensors)
        self.config = config
        self.source = source
        """What the user called it: a directory or a hub id."""

    @classmethod
    def open(cls, source: "str | Path | Checkpoint") -> "Checkpoint":
        """Open a directory, or a model of the hub by `organisation/name[@revision]`.

        Raises CheckpointError where there is no such thing, it holds pickles only, a shard is
        missing, truncated or mislabelled, the index and the shards disagree, or the config is
        missing or broken.
        """
        if isinstance(source, Checkpoint):
            return source
        path = Path(source)
        if not path.is_dir():
            path = _download(str(source))
        config = _read_config(path)
        files = _weight_files(path)
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in read_header(file).items():
                if name in tensors:
                    raise CheckpointError(
                        f"{path}: tensor {name!r} stands in both {tensors[name].file.name} and "
                        f"{file.name}; fetch the checkpoint again"
                    )
                tensors[name] = info
        _check_index(path, tensors)
        return cls(path, tensors, config, str(source))

    def __enter__(self) -> "Checkpoint":
        return self

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding itself and stands on disk once."""
        declared = self.config.get("tie_word_embeddings", False)
        return bool(declared) or "lm_head.weight" not in self.tensors

    @property
    def num_parameters(self) -> int:
        """Floating-point numbers in the tensors, tied ones counted once."""
        names = [n for n, i in self.tensors.items() if i.dtype in FLOATS]
        if self.tied and len(names) > 1:
            names = [name for name in names if name != "lm_head.weight"]
        return sum(self.tensors[name].num_elements for name in names)

    @property
    def record(self) -> Record | None:
        return Record.read(self.path)


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: expected a Hugging Face checkpoint with a config.json, found "
            f"{_listing(path)}; name the directory that holds config.json and the weights"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{file}: expected JSON, found {error}; fetch it again") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise CheckpointError(
            f"{file}: expected a model's config with `model_type`, found none; is this a model?"
        )
    return config


def _weight_files(path: Path) -> list[Path]:
    if (path / INDEX).exists():
        names = sorted(set(_read_index(path).values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{path}: expected the {len(names)} shards that {INDEX} names, missing: "
                f"{', '.join(missing)}; fetch them"
            )
        return [path / name for name in names]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    pickles = [name for name in PICKLES if (path / name).exists()]
    if pickles:
        raise CheckpointError(
            f"{path}: expected safetensors, found the pickle {pickles[0]}, which can run code when "
            "it is read; fedgraft never opens one. Convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(PATH).save_pretrained(NEW_PATH)"
        )
    raise CheckpointError(
        f"{path}: expected weights in {SINGLE} or shards with {INDEX}, found {_listing(path)}"
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        places = json.loads((path / INDEX).read_bytes())["weight_map"]
        if not all(isinstance(name, str) and Path(name).name == name for name in places.values()):
            raise ValueError("a shard's name that is no plain file name")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path / INDEX}: expected an index with a `weight_map`, found {error!r}; fetch it again"
        ) from error
    return dict(places)


def _check_index(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    if not (path / INDEX).exists():
        return
    for name, file in _read_index(path).items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(
                f"{path}: {INDEX} places tensor {name!r} in {file}, which does not hold it; fetch "
                "the index and that shard again"
            )
    unlisted = tensors.keys() - _read_index(path).keys()
    if unlisted:
        raise CheckpointError(
            f"{path}: the shards hold tensor {min(unlisted)!r}, which {INDEX} does not name; fetch "
            "the index again"
        )


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Where each tensor of a safetensors file lies, after checks that the file is whole.

    Raises CheckpointError for a header that is too short, no JSON, of unknown dtypes, with sizes that
    do not fit, overlapping or leaving gaps, or promising more bytes than the file has.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(
                f"{file}: expected a safetensors file, found {size} bytes with a header that claims "
                f"{length}; the download was cut short or this is another format. Fetch it again"
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = sorted(header.items(), key=lambda entry: entry[1]["data_offsets"])
            tensors = {name: _tensor_info(file, 8 + length, entry) for name, entry in entries}
            ends = [entry["data_offsets"] for _, entry in entries]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{file}: expected a safetensors header, found {error}; fetch the file again"
            ) from error
    position = 0
    for (name, info), (start, end) in zip(tensors.items(), ends, strict=True):
        if start != position or end - start != info.num_bytes:
            raise CheckpointError(
                f"{file}: tensor {name!r} of shape {list(info.shape)} and dtype {info.dtype} should "
                f"fill bytes {position} to {position + info.num_bytes}, the header says {start} to "
                f"{end}; fetch the file again"
            )
        position = end
    if 8 + length + position != size:
        raise CheckpointError(
            f"{file}: expected {8 + length + position} bytes by its header, found {size}; the file "
            "is truncated or damaged. Fetch it again"
        )
    return tensors


def _tensor_info(file: Path, origin: int, entry: dict[str, Any]) -> TensorInfo:
    dtype, shape = entry["dtype"], tuple(int(n) for n in entry["shape"])
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}, where fedgraft reads {', '.join(DTYPES)}")
    if any(n < 0 for n in shape):
        raise ValueError(f"shape {list(shape)}")
    start = origin + int(entry["data_offsets"][0])
    return TensorInfo(dtype=dtype, shape=shape, file=file, start=start)


def _listing(path: Path) -> str:
    names = sorted(child.name for child in path.iterdir())
    shown = ", ".join(names[:6])
    return (shown + (", ..." if len(names) > 6 else "")) or "an empty directory"


def _download(source: str) -> Path:
    """The local copy of a hub model; only weights in safetensors and the small files are fetched."""
    name, _, revision = source.partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or not all(name.split("/")):
        raise CheckpointError(
            f"expected a checkpoint at {source}, found no such directory; name a directory or a "
            "model of the hub as organisation/name[@revision]"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=patterns)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"could not fetch {source} from the hub: {type(error).__name__}; check the name, the "
            "network and, for a gated model, that `hf auth login` was done. A local directory with "
            "the files works as well"
        ) from error
