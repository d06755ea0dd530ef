"""The k largest numbers of a tensor, exactly, in blocks of any size."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.weights.checkpoint import Array
from fedgraft.weights.threshold import above, magnitudes, thresholds


def split(numbers: Array, size: int) -> list[Array]:
    return [numbers[first : first + size] for first in range(0, numbers.size, size)]


@given(
    numbers=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False)
        | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0000001, 0.99999994]),
        min_size=1,
        max_size=40,
    ),
    data=st.data(),
    size=st.integers(1, 41),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16]),
)
def test_the_k_largest_are_those_of_a_stable_sort(
    numbers: list[float], data: st.DataObject, size: int, dtype: type
) -> None:
    with np.errstate(over="ignore"):
        tensor: Array = np.clip(np.array(numbers, np.float32), -3e38, 3e38).astype(dtype)
    ranks = data.draw(st.lists(st.integers(0, tensor.size), min_size=1, max_size=3))
    order = np.argsort(-np.abs(tensor.astype(np.float64)), kind="stable")
    for k, threshold in zip(ranks, thresholds(lambda: split(tensor, size), ranks), strict=True):
        largest = above(threshold)
        found = np.concatenate([largest(magnitudes(block)) for block in split(tensor, size)])
        expected = np.zeros(tensor.size, np.bool_)
        expected[order[:k]] = True
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("k", [1, 500, 99_999, 100_000])
def test_many_numbers_are_divided_exactly(k: int) -> None:
    tensor = np.random.default_rng(0).normal(0, 1e-3, 100_000).astype(np.float32)
    (threshold,) = thresholds(lambda: split(tensor, 1 << 14), [k])
    found = above(threshold)(magnitudes(tensor))
    assert found.sum() == k
    assert np.abs(tensor[found]).min() >= np.abs(tensor[~found]).max(initial=0)


def test_magnitudes_around_a_step_of_the_upper_bits_are_told_apart() -> None:
    one = np.float32(1)
    tensor = np.array([one, np.nextafter(one, 0), np.nextafter(one, 2), -one], np.float32)
    for k, expected in enumerate(([2], [0, 2], [0, 2, 3], [0, 1, 2, 3]), start=1):
        (threshold,) = thresholds(lambda: [tensor], [k])
        assert np.flatnonzero(above(threshold)(magnitudes(tensor))).tolist() == expected
