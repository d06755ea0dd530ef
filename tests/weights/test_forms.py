"""What each form stores comes back as its definition says, at any place and in any blocks."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.weights.test_planes import difference

from fedgraft.errors import CheckpointError
from fedgraft.weights import forms
from fedgraft.weights.arithmetic import Floats
from fedgraft.weights.checkpoint import Array, TensorFiles, read_tensors
from fedgraft.weights.forms import (
    Parts,
    int8_parts,
    logical,
    low_rank_parts,
    opened,
    packed_parts,
    sign_parts,
)
from fedgraft.weights.writer import write_growing

Encode = Callable[[Floats], Parts]


@pytest.fixture(autouse=True)
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "FRAME", 256)


def blocks(tensor: Floats) -> Iterator[Array]:
    flat = tensor.reshape(-1)
    yield from (flat[first : first + 256] for first in range(0, flat.size, 256))


def factors(tensor: Floats) -> tuple[Floats, Floats]:
    return tensor[:, :3].copy(), tensor[:3].copy()


def low_rank(tensor: Floats) -> Parts:
    return low_rank_parts(*factors(tensor))


def packed(tensor: Floats) -> Parts:
    return packed_parts(tensor.shape, blocks(tensor))


def sign(tensor: Floats) -> Parts:
    return sign_parts(tensor.shape, blocks(tensor))


def int8(tensor: Floats) -> Parts:
    return int8_parts(tensor.shape, blocks(tensor))


def stored(folder: Path, **tensors: Parts) -> TensorFiles:
    write_growing(folder, dict.fromkeys(tensors, 1), tensors.__getitem__)
    return TensorFiles(folder, read_tensors(folder, "model"))


def whole(parts: TensorFiles, name: str = "t", num_elements: int = 10**6) -> Floats:
    """Read a tensor in steps of the given size."""
    info = logical(parts)[name]
    out = np.full(info.shape, np.nan, np.float32)
    flat = out.reshape(-1)
    with opened(parts, name, info.shape) as fill:
        for first in range(0, flat.size, num_elements):
            fill(first, flat[first : first + num_elements])
    return out


def matrix(*shape: int, seed: int = 0) -> Floats:
    return difference(1e-3, int(np.prod(shape)), seed).reshape(shape)


@pytest.mark.parametrize("shape", [(), (1,), (256,), (300,), (17, 33), (3, 4, 50), (0,), (0, 5)])
def test_packed_is_exact(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensor = matrix(*shape)
    found = whole(stored(tmp_path, t=packed(tensor)))
    assert found.shape == shape
    assert found.tobytes() == tensor.tobytes()


def test_sign_has_the_sign_of_each_number_and_their_mean_magnitude(tmp_path: Path) -> None:
    tensor = matrix(17, 33)
    found = whole(stored(tmp_path, t=sign(tensor)))
    scale = np.abs(tensor).mean(dtype=np.float64)
    assert found == pytest.approx(np.where(tensor < 0, -scale, scale), rel=1e-6)


def test_the_mean_magnitude_is_the_scale_of_least_squared_error() -> None:
    tensor = matrix(17, 33).astype(np.float64)
    signs = np.where(tensor < 0, -1.0, 1.0)
    errors = {f: np.square(tensor - f * np.abs(tensor).mean() * signs).sum() for f in (0.9, 1, 1.1)}
    assert min(errors, key=errors.__getitem__) == 1


@given(size=st.integers(1, 700), magnitude=st.floats(1e-44, 1e38), seed=st.integers(0, 99))
def test_int8_is_off_by_half_a_step_at_most(
    tmp_path_factory: pytest.TempPathFactory, size: int, magnitude: float, seed: int
) -> None:
    noise = np.random.default_rng(seed).normal(0, 0.3, size).clip(-1, 1)
    tensor = (noise * magnitude).astype(np.float32)
    found = whole(stored(tmp_path_factory.mktemp("int8"), t=int8(tensor)))
    for first in range(0, size, 128):
        part = slice(first, first + 128)
        step = np.abs(tensor[part]).max().astype(float) / 127
        # a subnormal scale is itself a multiple of 1.4e-45, up to half of which is lost 127 times
        slack = 0.51 * step + (127 * 0.71e-45 if step < 1e-37 else 0.0)
        assert np.abs(found[part].astype(float) - tensor[part]).max() <= slack


def test_int8_of_zeros_is_zeros(tmp_path: Path) -> None:
    assert not whole(stored(tmp_path, t=int8(np.zeros(300, np.float32)))).any()


def test_low_rank_is_the_product_of_the_factors(tmp_path: Path) -> None:
    tensor = matrix(91, 40)
    left, right = factors(tensor)
    found = whole(stored(tmp_path, t=low_rank(tensor)))
    assert found == pytest.approx(left @ right, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("encode", [packed, sign, int8, low_rank])
@pytest.mark.parametrize("step", [1, 7, 128, 256, 300, 512])
def test_any_reader_gets_the_same_numbers(tmp_path: Path, encode: Encode, step: int) -> None:
    parts = stored(tmp_path, t=encode(matrix(20, 37)))
    assert whole(parts, num_elements=step).tobytes() == whole(parts).tobytes()
    with opened(parts, "t", (20, 37)) as fill:  # backwards, and again where it was
        for first in (700, 255, 40, 255, 0):
            block = np.empty(40, np.float32)
            fill(first, block)
            assert block.tobytes() == whole(parts).reshape(-1)[first : first + 40].tobytes()


def test_one_file_holds_tensors_of_several_forms(tmp_path: Path) -> None:
    tensors = {"a.shape": matrix(20, 30), "a": matrix(9), "b.signs": matrix(8, 8), "c": matrix(3)}
    encodes = {"a.shape": low_rank, "a": packed, "b.signs": sign, "c": int8}
    parts = stored(tmp_path, **{name: encodes[name](t) for name, t in tensors.items()})
    assert {name: info.shape for name, info in logical(parts).items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    assert whole(parts, "a").tobytes() == tensors["a"].tobytes()


def test_parts_of_no_form_are_refused_by_name(tmp_path: Path) -> None:
    parts = stored(tmp_path, t=iter([("shape", "I64", [np.array([3])])]))
    with pytest.raises(CheckpointError, match="expected tensor 't' in one form, found 0"):
        logical(parts)


@pytest.mark.parametrize("encode", [packed, sign, int8, low_rank])
def test_parts_of_another_size_are_refused_by_name(tmp_path: Path, encode: Encode) -> None:
    *others, _ = encode(matrix(20, 30))
    made = [(part, dtype, list(numbers)) for part, dtype, numbers in encode(matrix(20, 30))][:-1]
    assert others
    parts = stored(tmp_path, t=iter([*made, ("shape", "I64", [np.array([31, 41])])]))
    with pytest.raises(CheckpointError, match="expected parts of 1271 numbers for tensor 't'"):
        logical(parts)


def test_a_damaged_block_is_told_with_the_tensors_name(tmp_path: Path) -> None:
    parts = stored(tmp_path, t=packed(matrix(20, 30)))
    info = parts.tensors["t.packed"]
    with info.file.open("r+b") as file:
        file.seek(info.start)
        file.write(b"\xff" * 40)
    with pytest.raises(CheckpointError, match=r"tensor 't': expected numbers as they were written"):
        whole(parts)
