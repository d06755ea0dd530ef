"""Tensors to safetensors files, streamed: headers first, then the numbers of each tensor in place.

The bytes depend on names, dtypes, shapes and numbers alone; files are named as the hub names them.
The caller writes into the folder of a `new_artefact`, so that a failure leaves nothing behind.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from fedgraft.errors import ArtefactError
from fedgraft.weights.checkpoint import BLOCK_ELEMENTS, DTYPES, Array, hash_tensors
from fedgraft.weights.workers import each_tensor

MAX_SHARD_BYTES = 5_000_000_000

Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> dtype (as safetensors names it) and shape."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a writer tells."""

    content: str
    """Content hash of what was written."""
    reports: Mapping[str, Any]
    """By tensor, what `report` returned."""


COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
    "NOTICE*",
)
"""The files that make weights a model that loads as it is."""


def write_tensors(
    folder: Path,
    layout: Layout,
    blocks: Callable[[str], Iterable[Array]],
    *,
    prefix: str = "model",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    report: Callable[[str], Any] = lambda _: None,
) -> Written:
    """Write each tensor of `layout` from `blocks(name)`: its numbers in order, flat, of its dtype.

    Several workers write, see workers.py; what `blocks` finds out on the way is lost, unless
    `report` returns it, which is called by the same worker when a tensor is written.

    Raises ArtefactError where the disk has less room than the tensors need.
    """
    num_bytes = {name: _num_bytes(*layout[name]) for name in layout}
    needed, free = sum(num_bytes.values()), shutil.disk_usage(folder).free
    if free < needed:
        raise ArtefactError(
            f"{folder.parent}: expected {needed / 1e9:.2f} GB of free space, found "
            f"{free / 1e9:.2f} GB; free some, or choose another place"
        )
    shards = _shards(num_bytes, max_shard_bytes)
    files = [
        f"{prefix}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
    ]
    if len(shards) == 1:
        files = [f"{prefix}.safetensors"]
    else:
        index = {
            "metadata": {"total_size": needed},
            "weight_map": {
                name: file
                for file, names in zip(files, shards, strict=True)
                for name in sorted(names)
            },
        }
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{prefix}.safetensors.index.json").write_text(text, encoding="utf-8")
    places: dict[str, tuple[Path, int]] = {}
    for file, names in zip(files, shards, strict=True):
        header, starts = _header(layout, names)
        (folder / file).write_bytes(header)
        places |= {name: (folder / file, len(header) + start) for name, start in starts.items()}

    def write(name: str) -> tuple[bytes, Any]:
        path, start = places[name]
        num_written, digest = 0, blake3()
        with path.open("r+b", buffering=0) as stream:
            stream.seek(start)
            for block in blocks(name):
                assert block.dtype == DTYPES[layout[name][0]], f"{name}: a block of {block.dtype}"
                left = np.ascontiguousarray(block).view(np.uint8).data
                num_written += len(left)
                digest.update(left)
                while left:
                    left = left[stream.write(left) :]
        assert num_written == num_bytes[name], f"{name}: {num_written} of {num_bytes[name]} bytes"
        return digest.digest(), report(name)

    written = each_tensor(f"writing {prefix}", num_bytes, write)
    return Written(
        content=hash_tensors(layout, {name: digest for name, (digest, _) in written.items()}),
        reports={name: reported for name, (_, reported) in written.items()},
    )


def write_growing(
    folder: Path,
    num_bytes: Mapping[str, int],
    parts: Callable[[str], Iterable[tuple[str, str, Iterable[Array]]]],
    *,
    prefix: str = "model",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    report: Callable[[str], Any] = lambda _: None,
) -> Written:
    """Write tensors whose sizes are known only once they are made, such as compressed ones.

    They are made by several workers, into files that are gone at the end, and laid out by
    `write_tensors` once their sizes are known: the same parts give the same bytes. `report` is
    called by the worker that has made a tensor's parts.

    Args:
        num_bytes: By name, what has to be worked through; for the progress that is shown.
        parts: Yields for a name (part, dtype, blocks): a flat tensor `<name>.<part>`. Its blocks
            are written before the next part is asked for, so a part may follow from earlier ones.

    Raises ArtefactError where the disk has not as much room again as the parts take.
    """
    with tempfile.TemporaryDirectory(dir=folder) as workshop:

        def place(tensor: str) -> Path:
            return Path(workshop, blake3(tensor.encode()).hexdigest())

        def make(name: str) -> tuple[dict[str, tuple[str, tuple[int, ...]]], Any]:
            made_parts: dict[str, tuple[str, tuple[int, ...]]] = {}
            for part, dtype, made in parts(name):
                tensor, size = f"{name}.{part}", 0
                with place(tensor).open("wb") as stream:
                    for block in made:
                        assert block.dtype == DTYPES[dtype], f"{tensor}: a block of {block.dtype}"
                        size += block.size
                        stream.write(block.view(np.uint8).data)
                made_parts[tensor] = dtype, (size,)
            return made_parts, report(name)

        def blocks(tensor: str) -> Iterator[Array]:
            with place(tensor).open("rb", buffering=0) as stream:
                while data := stream.read(BLOCK_ELEMENTS * 8):
                    yield np.frombuffer(data, DTYPES[layout[tensor][0]])
            place(tensor).unlink()

        made = each_tensor(f"making {prefix}", num_bytes, make)
        layout = {
            tensor: form for parts_made, _ in made.values() for tensor, form in parts_made.items()
        }
        written = write_tensors(
            folder, layout, blocks, prefix=prefix, max_shard_bytes=max_shard_bytes
        )
    return Written(written.content, {name: reported for name, (_, reported) in made.items()})


def copy_companions(source: Path, folder: Path) -> None:
    """Copy a model's config, generation config, tokenizer and chat templates."""
    for pattern in COMPANIONS:
        for file in filter(Path.is_file, sorted(source.glob(pattern))):
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def _shards(num_bytes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Group the names, in their order, into shards that are as full as the limit allows."""
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name in sorted(num_bytes):
        if shards[-1] and num_bytes[name] > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= num_bytes[name]
    return shards


def _header(layout: Layout, names: list[str]) -> tuple[bytes, dict[str, int]]:
    """Return a file's header and the offset of each tensor behind it; wide dtypes come first.

    So each tensor starts at a multiple of its item size, as in files of the reference library.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    position = 0
    for name in sorted(names, key=lambda name: (-DTYPES[layout[name][0]].itemsize, name)):
        dtype, shape = layout[name]
        starts[name], end = position, position + _num_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize
