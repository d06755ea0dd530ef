"""What is read is what the reference library wrote; what is damaged is refused with its place."""

import builtins
import importlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tests.weights.checkpoints import CONFIG, Tensors, random_tensors, save

from fedgraft.errors import CheckpointError
from fedgraft.weights.checkpoint import Checkpoint, read_config

UP = "model.layers.0.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_tensor_is_read_as_it_was_written(
    tmp_path: Path, dtype: str, num_shards: int
) -> None:
    written = random_tensors(dtype=dtype)
    checkpoint = Checkpoint.open(save(tmp_path / "model", written, num_shards=num_shards))
    assert list(checkpoint.tensors) == sorted(written)
    for name, tensor in written.items():
        info, found = checkpoint.tensors[name], checkpoint.read(name)
        assert (info.dtype, info.shape) == (dtype, tensor.shape)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert found.tobytes() == tensor.tobytes()


@given(num_elements=st.integers(1, 100))
def test_blocks_of_any_size_put_together_are_the_tensor(
    tmp_path_factory: pytest.TempPathFactory, num_elements: int
) -> None:
    checkpoint = Checkpoint.open(
        save(tmp_path_factory.mktemp("blocks") / "model", random_tensors(seed=3))
    )
    blocks = [block.copy() for block in checkpoint.blocks(UP, num_elements)]
    assert all(block.size <= num_elements for block in blocks)
    assert np.concatenate(blocks).tobytes() == checkpoint.read(UP).tobytes()


def test_scalars_and_empty_tensors_are_read(tmp_path: Path) -> None:
    tensors: Tensors = {"scalar": np.array(3, np.float32), "none": np.zeros((0, 4), np.float32)}
    checkpoint = Checkpoint.open(save(tmp_path / "model", tensors))
    assert checkpoint.read("scalar") == 3
    assert checkpoint.read("none").shape == (0, 4)
    assert checkpoint.content_hash.startswith("blake3:")


def test_the_content_hash_does_not_depend_on_shards(tmp_path: Path) -> None:
    tensors = random_tensors()
    backwards = dict(reversed(tensors.items()))
    hashes = {
        Checkpoint.open(save(tmp_path / f"{i}", t, num_shards=i)).content_hash
        for i, t in ((1, tensors), (2, tensors), (4, backwards))
    }
    assert len(hashes) == 1


def test_the_content_hash_changes_with_a_bit_a_name_a_dtype_and_a_shape(tmp_path: Path) -> None:
    tensors = random_tensors()
    bit = {name: tensor.copy() for name, tensor in tensors.items()}
    bit[UP].view(np.uint16)[5, 3] ^= 1
    variants = {
        "same": tensors,
        "bit": bit,
        "name": {name.replace("up", "down"): tensor for name, tensor in tensors.items()},
        "dtype": {name: tensor.view(np.float16) for name, tensor in tensors.items()},
        "shape": tensors | {UP: tensors[UP].reshape(8, 12)},
    }
    hashes = {
        Checkpoint.open(save(tmp_path / name, tensors)).content_hash
        for name, tensors in variants.items()
    }
    assert len(hashes) == len(variants)


def test_tensors_that_were_streamed_need_not_be_read_again_for_the_hash(tmp_path: Path) -> None:
    path = save(tmp_path / "model", random_tensors())
    expected = Checkpoint.open(path).content_hash
    checkpoint = Checkpoint.open(path)
    for name in checkpoint.tensors:
        blocks = checkpoint.blocks(name, 7)
        for _ in range(-(-checkpoint.tensors[name].num_elements // 7)):  # never past the last one
            next(blocks)
    (path / "model.safetensors").unlink()
    assert checkpoint.content_hash == expected


def test_a_tensor_that_was_left_half_read_is_hashed_whole(tmp_path: Path) -> None:
    path = save(tmp_path / "model", random_tensors())
    checkpoint = Checkpoint.open(path)
    next(checkpoint.blocks(UP, 7))
    assert checkpoint.content_hash == Checkpoint.open(path).content_hash


def test_a_tied_embedding_that_is_stored_twice_counts_once(tmp_path: Path) -> None:
    once = random_tensors(tied=True)
    twice = once | {"lm_head.weight": once["model.embed_tokens.weight"].copy()}
    a = Checkpoint.open(save(tmp_path / "once", once, tie_word_embeddings=True))
    b = Checkpoint.open(save(tmp_path / "twice", twice, tie_word_embeddings=True))
    assert b.tied
    assert a.num_parameters == b.num_parameters == sum(t.size for t in once.values())
    assert a.content_hash == b.content_hash


def test_a_tied_output_layer_with_numbers_of_its_own_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "model", random_tensors(), tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is stored with other numbers"):
        Checkpoint.open(path)


@pytest.mark.parametrize("tied", [True, False])
def test_where_the_config_is_silent_the_tensors_tell_whether_it_is_tied(
    tmp_path: Path, tied: bool
) -> None:
    path = save(tmp_path / "model", random_tensors(tied=tied), tie_word_embeddings=None)
    assert Checkpoint.open(path).tied is tied


def edit_header(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit_index(path: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((path / INDEX).read_bytes())
    edit(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def no_weights(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()


def only_a_pickle(path: Path) -> None:
    no_weights(path)
    (path / "pytorch_model.bin").write_bytes(b"")


def a_directory_for_a_shard(path: Path) -> None:
    (path / SECOND).unlink()
    (path / SECOND).mkdir()


def a_tensor_in_both_shards(path: Path) -> None:
    first = load_file(path / "model-00001-of-00002.safetensors")
    second = load_file(path / SECOND)
    save_file(second | dict([first.popitem()]), path / SECOND)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda p: (p / "config.json").unlink(), "config.json, found chat_template"),
    "a broken config": (
        lambda p: (p / "config.json").write_text("{"),
        "config.json: expected a config",
    ),
    "a config of no model": (lambda p: (p / "config.json").write_text("[]"), "the model_type"),
    "only a pickle": (only_a_pickle, "pytorch_model.bin, which can run code .*save_pretrained"),
    "no weights": (no_weights, "expected weights in model"),
    "a missing shard": (lambda p: (p / SECOND).unlink(), f"the 2 shards .* missing {SECOND}"),
    "a truncated shard": (
        lambda p: os.truncate(p / SECOND, (p / SECOND).stat().st_size - 5),
        r"expected \d+ bytes, found \d+; the file is truncated",
    ),
    "a shard cut within its header": (
        lambda p: os.truncate(p / SECOND, 20),
        "expected a safetensors file, found 20 bytes",
    ),
    "an empty shard": (lambda p: os.truncate(p / SECOND, 0), "found 0 bytes"),
    "a shard with a tail": (
        lambda p: (p / SECOND).write_bytes((p / SECOND).read_bytes() + b"x"),
        "or has a tail",
    ),
    "a text in place of a shard": (
        lambda p: (p / SECOND).write_text("<html>404</html>"),
        "expected a safetensors file",
    ),
    "a pointer of git lfs": (
        lambda p: (p / SECOND).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "a directory in place of a shard": (
        a_directory_for_a_shard,
        "cannot be read: Is a directory",
    ),
    "a header that is no JSON": (
        lambda p: (p / SECOND).write_bytes(struct.pack("<Q", 4) + b"{no}"),
        "expected a safetensors header",
    ),
    "a header that is a list": (
        lambda p: (p / SECOND).write_bytes(struct.pack("<Q", 2) + b"[]"),
        "expected a safetensors header",
    ),
    "an unknown dtype": (
        lambda p: edit_header(p / SECOND, lambda h: h[UP].update(dtype="F4")),
        f"expected tensors of F64.*found '{UP}' of F4; take the model before it was quantised",
    ),
    "a negative size": (
        lambda p: edit_header(p / SECOND, lambda h: h[UP].update(shape=[-12, -8])),
        r"shape \[-12, -8\]",
    ),
    "another shape": (
        lambda p: edit_header(p / SECOND, lambda h: h[UP].update(shape=[12, 9])),
        r"tensor 'model.layers.0.mlp.up_proj.weight' of BF16 \[12, 9\] to fill bytes",
    ),
    "tensors that overlap": (
        lambda p: edit_header(p / SECOND, lambda h: h[UP].update(data_offsets=[8, 200])),
        "leaves a gap, overlaps",
    ),
    "a broken index": (lambda p: (p / INDEX).write_text("{}"), "an index with a weight_map"),
    "an index that leaves the directory": (
        lambda p: edit_index(p, lambda i: i.update({UP: "../other.safetensors"})),
        "a shard in another directory",
    ),
    "an index naming an absent tensor": (
        lambda p: edit_index(p, lambda i: i.update(absent=SECOND)),
        f"places tensor 'absent' in {SECOND}, found it in no shard",
    ),
    "an index placing a tensor elsewhere": (
        lambda p: edit_index(p, lambda i: i.update({UP: "model-00001-of-00002.safetensors"})),
        f"in model-00001-of-00002.safetensors, found it in {SECOND}",
    ),
    "an index lacking a tensor": (
        lambda p: edit_index(p, lambda i: i.pop(UP)),
        f"places tensor '{UP}' in no shard, found it in {SECOND}",
    ),
    "a tensor in both shards": (a_tensor_in_both_shards, "expected each tensor once, found"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_refused_with_its_place(tmp_path: Path, fault: str) -> None:
    path = save(tmp_path / "model", random_tensors(), num_shards=2)
    assert UP in load_file(path / SECOND)
    Checkpoint.open(path)
    damage, message = FAULTS[fault]
    damage(path)
    with pytest.raises(CheckpointError, match=f"{path}.*{message}"):
        Checkpoint.open(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save(tmp_path / "model", random_tensors()))
    os.truncate(tmp_path / "model" / "model.safetensors", 1000)
    with pytest.raises(CheckpointError, match="the file ended inside tensor"):
        checkpoint.read("model.layers.1.norm.weight")


@pytest.mark.parametrize("source", ["nowhere", "./no/where", "/no/such/place", "a/b/c"])
def test_a_place_that_is_neither_a_directory_nor_a_hub_id_is_refused(source: str) -> None:
    with pytest.raises(CheckpointError, match=f"{source}: expected a checkpoint, found no such"):
        Checkpoint.open(source)


def test_a_hub_id_is_fetched_at_its_revision_without_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "model", random_tensors())
    asked: dict[str, Any] = {}

    def fetch(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert Checkpoint.open("organisation/name@v1.0").config == CONFIG
    assert (asked["name"], asked["revision"]) == ("organisation/name", "v1.0")
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


@pytest.mark.parametrize(
    "fault",
    [
        *("ConnectionError", "ProxyError", "ConnectError", "RemoteProtocolError", "ReadTimeout"),
        *("XetDownloadError", "RevisionResolutionError"),
    ],
)
def test_a_hub_that_cannot_be_reached_is_one_clear_message(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    client = importlib.import_module(huggingface_hub.errors.HTTPError.__module__.split(".")[0])

    def fetch(*_: Any, **__: Any) -> str:
        for place in (builtins, huggingface_hub.errors, client):
            if hasattr(place, fault):
                raise getattr(place, fault)("broken")
        raise AssertionError(f"nobody has {fault}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(CheckpointError, match=rf"organisation/name.*\({fault}\); check"):
        Checkpoint.open("organisation/name")


def test_a_config_in_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"with a config\.json, found no such directory; name"
    ):
        read_config(tmp_path / "nowhere")
