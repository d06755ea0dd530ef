"""Tensors to safetensors files, streamed: the header is known before the first number is written.

Tensors are laid out in the order of their names, shards of at most `max_shard_bytes` are named as
the hub names them. The bytes depend on names, dtypes, shapes and numbers alone.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from fedgraft.weights.checkpoint import DTYPES, Array

MAX_SHARD_BYTES = 5_000_000_000

Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> dtype (as safetensors names it) and shape."""


class Writer:
    """Writes the tensors of a layout, in the order of their names, block by block."""

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        *,
        prefix: str = "model",
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self._layout = dict(sorted(layout.items()))
        self._folder = folder
        self._shards = _shards(self._layout, max_shard_bytes)
        count = len(self._shards)
        self._names = (
            [f"{prefix}.safetensors"]
            if count == 1
            else [f"{prefix}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        )
        self._prefix = prefix
        self._file: BinaryIO | None = None
        self._queue = [
            (name, shard) for shard, members in enumerate(self._shards) for name in members
        ]
        self._shard = -1

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self,
        error: type[BaseException] | None,
        _value: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if self._file:
            self._file.close()
        if error is None:
            assert not self._queue, f"tensors left unwritten: {self._queue[:3]}"
            self._write_index()

    def begin(self, name: str) -> None:
        """Say which tensor the next blocks belong to; tensors come in the order of their names."""
        expected, shard = self._queue.pop(0)
        assert name == expected, f"expected {expected}, got {name}"
        if shard != self._shard:
            self._shard = shard
            if self._file:
                self._file.close()
            self._file = (self._folder / self._names[shard]).open("wb", buffering=0)
            self._file.write(_header(self._layout, self._shards[shard]))

    def write(self, block: Array) -> None:
        """Append numbers of the tensor's dtype."""
        assert self._file
        data = memoryview(np.ascontiguousarray(block).view(np.uint8))
        while data:
            data = data[self._file.write(data) :]

    def _write_index(self) -> None:
        if len(self._shards) == 1:
            return
        places = {
            name: file
            for file, names in zip(self._names, self._shards, strict=True)
            for name in names
        }
        index = {
            "metadata": {"total_size": sum(_num_bytes(*self._layout[name]) for name in places)},
            "weight_map": places,
        }
        file = self._folder / f"{self._prefix}.safetensors.index.json"
        file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(layout: Layout, max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, (dtype, shape) in layout.items():
        num_bytes = _num_bytes(dtype, shape)
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return shards


def _header(layout: Layout, names: list[str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        dtype, shape = layout[name]
        end = position + _num_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize
