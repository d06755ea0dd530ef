"""The reference library reads what was written; the same numbers give the same bytes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tests.weights.checkpoints import DTYPES, Tensors, random_tensors, save

from fedgraft.errors import ArtefactError
from fedgraft.weights.checkpoint import Array, read_tensors
from fedgraft.weights.writer import copy_companions, write_growing, write_tensors


def write(folder: Path, tensors: Tensors, *, block: int = 50, **options: Any) -> dict[str, bytes]:
    """Write the tensors in small blocks; returns the bytes of each file."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}

    def blocks(name: str) -> Iterator[Array]:
        flat = tensors[name].reshape(-1)
        yield from (flat[first : first + block] for first in range(0, flat.size, block))

    layout = {name: (names[tensor.dtype], tensor.shape) for name, tensor in tensors.items()}
    write_tensors(folder, layout, blocks, **options)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=8),
    dtypes=st.lists(st.sampled_from(sorted(DTYPES)), min_size=8, max_size=8),
    max_shard_bytes=st.integers(1, 2000),
    block=st.integers(1, 100),
)
def test_the_reference_library_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[tuple[int, int]],
    dtypes: list[str],
    max_shard_bytes: int,
    block: int,
) -> None:
    generator = np.random.default_rng(0)
    tensors = {
        f"t{i}": generator.normal(size=shape).astype(DTYPES[dtype])
        for i, (shape, dtype) in enumerate(zip(sizes, dtypes, strict=False))
    }
    folder = tmp_path_factory.mktemp("written")
    write(folder, tensors, block=block, max_shard_bytes=max_shard_bytes)
    found: Tensors = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == tensors.keys() == read_tensors(folder, "model").keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].tobytes() == tensor.tobytes()


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = random_tensors()
    written = []
    for i, order in enumerate((tensors, dict(reversed(tensors.items())))):
        folder = tmp_path / str(i)
        folder.mkdir()
        written.append(write(folder, order, block=30 + i, max_shard_bytes=500))
    assert len(written[0]) > 2
    assert written[0] == written[1]


def test_files_are_named_as_the_hub_names_them(tmp_path: Path) -> None:
    tensors = {name: np.zeros(10, np.float32) for name in "abc"}
    files = write(tmp_path, tensors, max_shard_bytes=80, prefix="residual")
    first, second = (f"residual-0000{i}-of-00002.safetensors" for i in (1, 2))
    assert sorted(files) == [first, second, "residual.safetensors.index.json"]
    assert json.loads(files["residual.safetensors.index.json"]) == {
        "metadata": {"total_size": 120},
        "weight_map": {"a": first, "b": first, "c": second},
    }
    header = json.loads(files[second][8:].partition(b"}}")[0] + b"}}")
    assert header["__metadata__"] == {"format": "pt"}


def test_a_single_file_has_no_index(tmp_path: Path) -> None:
    assert list(write(tmp_path, random_tensors())) == ["model.safetensors"]


def test_each_tensor_starts_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    tensors: Tensors = {
        "a": np.ones(3, DTYPES["BF16"]),
        "b": np.ones(3, np.float32),
        "c": np.ones(3, np.float32),
    }
    write(tmp_path, tensors)
    assert all(
        info.start % tensors[name].itemsize == 0
        for name, info in read_tensors(tmp_path, "model").items()
    )


def test_a_disk_with_too_little_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=39))
    with pytest.raises(ArtefactError, match=r"expected 0.00 GB of free space, found 0.00 GB; free"):
        write(tmp_path, {"a": np.zeros(10, np.float32)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [9, 11])
def test_too_few_or_too_many_numbers_are_a_bug(tmp_path: Path, count: int) -> None:
    with pytest.raises(AssertionError, match=f"a: {4 * count} of 40 bytes"):
        write_tensors(tmp_path, {"a": ("F32", (10,))}, lambda _: [np.zeros(count, np.float32)])


def test_numbers_of_another_dtype_are_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="a: a block of float64"):
        write_tensors(tmp_path, {"a": ("F32", (10,))}, lambda _: [np.zeros(10)])


def grow(folder: Path, made: dict[str, Tensors], **options: Any) -> dict[str, bytes]:
    """Write flat tensors in small blocks, without saying how long they are."""
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}

    def parts(name: str) -> Iterator[tuple[str, str, Iterator[Array]]]:
        for part, tensor in made[name].items():
            blocks = (tensor[first : first + 7] for first in range(0, tensor.size, 7))
            yield part, names[tensor.dtype], blocks

    folder.mkdir()
    write_growing(folder, dict.fromkeys(made, 1), parts, **options)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def grown() -> dict[str, Tensors]:
    flat = {name: tensor.reshape(-1) for name, tensor in random_tensors().items()}
    return {
        name: {"a": tensor, "b": tensor[:3].astype(np.float32), "c": tensor[:0]}
        for name, tensor in flat.items()
    }


@pytest.mark.parametrize("max_shard_bytes", [100, 10**6])
def test_tensors_of_unknown_size_are_written_as_if_their_size_were_known(
    tmp_path: Path, max_shard_bytes: int
) -> None:
    made = grown()
    found = grow(tmp_path / "growing", made, max_shard_bytes=max_shard_bytes)
    (tmp_path / "known").mkdir()
    flat = {f"{name}.{part}": t for name, parts in made.items() for part, t in parts.items()}
    assert found == write(tmp_path / "known", flat, max_shard_bytes=max_shard_bytes)
    assert (len(found) > 2) == (max_shard_bytes == 100)


def test_a_part_may_follow_from_the_part_before(tmp_path: Path) -> None:
    def parts(_: str) -> Iterator[tuple[str, str, Iterator[Array]]]:
        seen: list[float] = []

        def numbers() -> Iterator[Array]:
            for i in range(3):
                seen.append(i)
                yield np.full(2, i, np.float32)

        yield "numbers", "F32", numbers()
        yield "sum", "F32", iter([np.array([sum(seen)], np.float32)])

    write_growing(tmp_path, {"t": 1}, parts)
    found = load_file(tmp_path / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "t.numbers": [0, 0, 1, 1, 2, 2],
        "t.sum": [3],
    }


def test_growing_numbers_of_another_dtype_are_a_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"a\.b: a block of float64"):
        write_growing(tmp_path, {"a": 1}, lambda _: [("b", "F32", [np.zeros(10)])])


def test_companions_are_the_config_the_tokenizer_and_the_templates(tmp_path: Path) -> None:
    source = save(tmp_path / "source", random_tensors())
    for name in ("README.md", "LICENSE", "training_args.bin", "tokenizer_config.json"):
        (source / name).touch()
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").touch()
    copy = tmp_path / "copy"
    copy.mkdir()
    copy_companions(source, copy)
    assert sorted(str(f.relative_to(copy)) for f in copy.rglob("*") if f.is_file()) == [
        "LICENSE",
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
