"""The compiled loops say bit for bit what numpy says, whatever the numbers and however many."""

import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.weights.checkpoints import DTYPES

from fedgraft.weights import arithmetic
from fedgraft.weights.arithmetic import BFLOAT16, Floats, add, all_finite, lost, subtract
from fedgraft.weights.checkpoint import Array

FINITE = st.integers(0, 2**16 - 1).filter(lambda bits: bits & 0x7F80 != 0x7F80)
AWKWARD = st.sampled_from([0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x3F80, 0x3F7F, 0x7F7F])
STEPS = st.integers(-300, 300) | st.integers(-(2**15), 2**15)
PAIRS = st.lists(st.tuples(FINITE | AWKWARD, STEPS), min_size=1, max_size=40)
WIDE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def in_bfloat16(words: list[int]) -> Array:
    return np.array(words, np.uint16).view(BFLOAT16)


def in_float32(numbers: list[float]) -> Floats:
    return np.array(numbers, np.float32)


def both(pairs: list[tuple[int, int]]) -> tuple[Array, Array]:
    """Numbers, and those so many steps on where these are finite."""
    olds = [bits for bits, _ in pairs]
    news = [(bits + step) % 2**16 for bits, step in pairs]
    news = [new if new & 0x7F80 != 0x7F80 else old for old, new in zip(olds, news, strict=True)]
    return in_bfloat16(olds), in_bfloat16(news)


def bits(block: Array) -> NDArray[np.unsignedinteger]:
    found: NDArray[np.unsignedinteger] = block.view(f"u{block.itemsize}")
    return found


@given(pairs=PAIRS, dtype=st.sampled_from([BFLOAT16, np.dtype(np.float32)]))
@example(pairs=[(0, 0x8000)], dtype=BFLOAT16)
@example(pairs=[(0x3F80, 1)] * 7, dtype=BFLOAT16)
@example(pairs=[(0x3F80, 1)] * 9, dtype=np.dtype(np.float32))
@example(pairs=[(0, 23989), (0, 24447)], dtype=BFLOAT16)  # a sum that float32 alone cannot hold
def test_a_bfloat16_difference_is_numpys_bit_for_bit(
    pairs: list[tuple[int, int]], dtype: np.dtype[np.generic]
) -> None:
    old, new = both(pairs)
    with np.errstate(over="ignore"):
        wide = new.astype(np.float32) - old.astype(np.float32)
        block = wide.astype(dtype)
        restored = (old.astype(np.float32) + block.astype(np.float32)).astype(BFLOAT16)
        sides = (old.astype(np.float32), wide)
        squares = [float(np.square(side, dtype=np.float64).sum()) for side in sides]
        found = subtract(old, new, np.empty(old.size + 3, dtype))
    assert np.array_equal(bits(found.block), bits(block))
    assert found.lost.tolist() == np.flatnonzero(bits(restored) != bits(new)).tolist()
    for square, wanted in zip((found.squared_base, found.squared_residual), squares, strict=True):
        beyond_float32 = np.isinf(square) and wanted > (1 - 1e-5) * np.finfo(np.float32).max
        assert beyond_float32 or square == pytest.approx(wanted, rel=1e-5, nan_ok=True)


@given(numbers=st.lists(st.tuples(FINITE | AWKWARD, WIDE), min_size=1, max_size=40))
@example(numbers=[(0x7F7F, 2.0**119)] * 9)  # a tie that rounds to infinity
@example(numbers=[(0x3F80, 1.00390625)] * 8)
def test_a_bfloat16_sum_is_numpys_bit_for_bit(numbers: list[tuple[int, float]]) -> None:
    old, added = in_bfloat16([o for o, _ in numbers]), in_float32([a for _, a in numbers])
    with np.errstate(over="ignore"):
        wanted = (old.astype(np.float32) + added).astype(BFLOAT16)
        found, finite = add(old, added, np.empty(old.size + 3, BFLOAT16))
    assert np.array_equal(bits(found), bits(wanted))
    assert finite == bool(np.isfinite(wanted.astype(np.float32)).all())


@given(place=st.integers(0, 20), word=st.integers(0x7F80, 0x7FFF), sign=st.booleans())
def test_a_sum_with_infinity_or_nan_in_it_is_not_finite(place: int, word: int, sign: bool) -> None:
    old, added = np.zeros(21, BFLOAT16), np.zeros(21, np.float32)
    bits(old)[place] = word | sign << 15
    assert not add(old, added, np.empty_like(old))[1]
    bits(old)[place] = 0
    added.view(np.uint32)[place] = (word << 16 | 0xFFFF) if word > 0x7F80 else word << 16
    assert not add(old, added, np.empty_like(old))[1]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("word", [0x7F80, 0xFF80, 0x7FC0, 0x7F81])
@pytest.mark.parametrize("place", [0, 7, 8, 16])
def test_infinity_and_nan_show_in_the_sums_of_squares(side: int, word: int, place: int) -> None:
    sides = np.ones((2, 17), BFLOAT16)
    bits(sides)[side, place] = word
    found = subtract(sides[0], sides[1], np.empty(17, BFLOAT16))
    assert not math.isfinite(found.squared_base + found.squared_residual)


@given(pairs=PAIRS, moved=st.lists(WIDE, min_size=1), dtype=st.sampled_from(sorted(DTYPES)))
def test_what_is_lost_is_what_does_not_round_to_the_number(
    pairs: list[tuple[int, int]], moved: list[float], dtype: str
) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        old, new = (side.astype(np.float32).astype(DTYPES[dtype]) for side in both(pairs))
        residual = np.subtract(new, old, dtype=np.float32)
        other = np.resize(in_float32(moved), old.size)
        residual[::2] = other[::2]
        rounded = (old.astype(np.float32) + residual).astype(DTYPES[dtype])
        wrong = np.flatnonzero(bits(rounded) != bits(new))
        assert lost(old, residual, new).tolist() == wrong.tolist()


@pytest.mark.parametrize("count", [*range(1, 18), 1023, 1024, 1025, 4096 + 5])
def test_nothing_beyond_a_block_is_read_or_written(count: int) -> None:
    random = np.random.default_rng(count)
    old, new = (random.normal(size=count).astype(BFLOAT16) for _ in range(2))
    out = np.full(count + 8, 7, BFLOAT16)
    found = subtract(old, new, out)
    assert found.block.size == count
    assert (out[count:] == 7).all()
    wide = np.subtract(new, old, dtype=np.float32)
    assert found.squared_residual == pytest.approx(float(np.square(wide).sum()), rel=1e-6)
    assert (add(old, wide, out)[0] == (old.astype(np.float32) + wide).astype(BFLOAT16)).all()
    assert (out[count:] == 7).all()


def test_blocks_of_other_sizes_never_reach_the_loops() -> None:
    """They read as far as they are told to."""
    long, short = np.zeros(9, BFLOAT16), np.zeros(8, BFLOAT16)
    wide = np.zeros(8, np.float32)
    for call in (
        lambda: subtract(long, short, long.copy()),
        lambda: subtract(long, long, short.copy()),
        lambda: lost(long, wide, long),
        lambda: add(long, wide, long.copy()),
    ):
        with pytest.raises(ValueError, match="blocks of 8 and 9 numbers"):
            call()


@given(
    words=st.lists(st.integers(0, 2**16 - 1), max_size=6), dtype=st.sampled_from(["BF16", "F16"])
)
def test_all_finite_tells_by_the_bits_what_numpy_tells(words: list[int], dtype: str) -> None:
    numbers: Array = np.array(words, np.uint16).view(DTYPES[dtype])
    with np.errstate(invalid="ignore"):  # a signalling NaN
        assert all_finite(numbers) == bool(np.isfinite(numbers).all())


def test_without_its_compiled_loops_fedgraft_says_how_to_get_them(tmp_path: Path) -> None:
    package = Path(arithmetic.__file__).parents[1]
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "pocket")
    shutil.copytree(package, tmp_path / "fedgraft", ignore=ignored)
    code = (
        "import numpy, ml_dtypes\n"
        "from fedgraft.errors import ArtefactError\n"
        "from fedgraft.weights.arithmetic import subtract\n"
        "block = numpy.ones(3, ml_dtypes.bfloat16)\n"
        "try:\n    subtract(block, block, block.copy())\n"
        "except ArtefactError as error:\n    print(error)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert f"{tmp_path}/fedgraft/weights/loops.so: expected the loops" in told.stdout
    assert "run `pip install --editable .` in the source tree" in told.stdout
