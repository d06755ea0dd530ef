"""What is packed comes back bit for bit, and what is damaged is told."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedgraft.weights.arithmetic import Floats
from fedgraft.weights.planes import pack, unpack

SPECIAL = (0.0, -0.0, 1e-45, -1e-45, np.inf, -np.inf, np.nan, 3.4028235e38, 1.0)


def difference(relative: float, size: int = 1 << 16, seed: int = 0) -> Floats:
    """Return the residual of two bfloat16 tensors after an update of the relative size."""
    generator = np.random.default_rng(seed)
    before = generator.normal(0, 0.02, size).astype(ml_dtypes.bfloat16).astype(np.float32)
    after = before + generator.normal(0, 0.02 * relative, size).astype(np.float32)
    return after.astype(ml_dtypes.bfloat16).astype(np.float32) - before


def restored(packed: bytes, size: int) -> Floats:
    out = np.full(size, 7.0, np.float32)  # what was in the buffer must not show through
    unpack(memoryview(packed), out)
    return out


@given(
    words=arrays(np.uint32, st.integers(0, 300)),
    special=st.lists(st.sampled_from(SPECIAL), max_size=300),
    zeros=st.floats(0, 1),
)
def test_every_bit_comes_back(words: Floats, special: list[float], zeros: float) -> None:
    block = np.concatenate([words.view(np.float32), np.array(special, np.float32)])
    block[: round(zeros * block.size)] = 0
    assert restored(pack(block), block.size).tobytes() == block.tobytes()


@pytest.mark.parametrize("relative", [0.0, 3e-4, 1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("size", [1 << 16, 65_537, 100, 1])
def test_a_residual_comes_back(relative: float, size: int) -> None:
    block = difference(relative, size)
    assert restored(pack(block), size).tobytes() == block.tobytes()


@pytest.mark.parametrize(
    ("relative", "times"), [(3e-4, 16), (1e-3, 7), (3e-3, 3.5), (1e-2, 2.5), (3e-2, 2)]
)
def test_it_is_several_times_smaller_than_bfloat16(relative: float, times: float) -> None:
    assert len(pack(difference(relative))) < 2 * (1 << 16) / times


def test_noise_costs_no_more_than_its_bytes_and_a_head() -> None:
    noise = np.frombuffer(np.random.default_rng(0).bytes(4 << 16), np.float32)
    assert len(pack(noise)) <= noise.nbytes + 24


def test_zeros_cost_next_to_nothing() -> None:
    assert len(pack(np.zeros(1 << 16, np.float32))) < 60


def test_threads_do_not_disturb_each_other() -> None:
    size = 1 << 19  # long enough in zstd for two threads to meet there
    blocks = [difference(1e-3, size, seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        packed = list(pool.map(pack, blocks))
        found = list(pool.map(lambda data: restored(data, size), packed))
    assert packed == [pack(block) for block in blocks]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(found, blocks, strict=True))


@given(place=st.integers(0, 2000), flip=st.integers(1, 255))
def test_damage_ends_in_a_value_error_or_other_numbers_never_in_a_crash(
    place: int, flip: int
) -> None:
    packed = bytearray(pack(difference(1e-3, 4096)))
    packed[place % len(packed)] ^= flip
    with contextlib.suppress(ValueError):
        restored(bytes(packed), 4096)


@pytest.mark.parametrize("size", [0, 10, 23, 24, 900])
def test_a_block_cut_short_is_a_value_error(size: int) -> None:
    with pytest.raises(ValueError, match="a packed block of"):
        restored(pack(difference(1e-3, 4096))[:size], 4096)


@pytest.mark.parametrize("size", [2048, 8192])
def test_a_block_of_another_size_is_a_value_error(size: int) -> None:
    with pytest.raises(ValueError, match=r"packed|plane|mask"):
        restored(pack(difference(1e-3, 4096)), size)


def test_a_mask_of_more_numbers_than_are_kept_is_a_value_error() -> None:
    packed = pack(np.array([0] * 15 + [1], np.float32))
    assert packed[24:26] == b"\x00\x01"
    with pytest.raises(ValueError, match="a mask of 2 numbers, where 1 were kept"):
        restored(packed[:24] + b"\x00\x03" + packed[26:], 16)
