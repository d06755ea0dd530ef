"""The factors are as good as those of the exact decomposition, whatever blocks were read."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from fedgraft.weights.arithmetic import Floats
from fedgraft.weights.lowrank import low_rank


def rows(matrix: Floats, num_rows: int = 10) -> Callable[[], Iterator[Floats]]:
    return lambda: (matrix[i : i + num_rows] for i in range(0, len(matrix), num_rows))


def decaying(shape: tuple[int, int], power: float, seed: int = 0) -> Floats:
    """Return a random matrix whose singular values fall off like 1 / i^power."""
    generator = np.random.default_rng(seed)
    left, _, right = np.linalg.svd(generator.normal(size=shape), full_matrices=False)
    weights = 1e-3 / np.arange(1, min(shape) + 1) ** power
    matrix: Floats = ((left * weights) @ right).astype(np.float32)
    return matrix


@pytest.mark.parametrize("shape", [(120, 50), (50, 120), (70, 70)])
@pytest.mark.parametrize("power", [0.0, 0.2, 1.0, 3.0])
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_the_error_is_within_three_percent_of_the_best(
    shape: tuple[int, int], power: float, rank: int
) -> None:
    matrix = decaying(shape, power)
    left, right = low_rank(rows(matrix), shape, rank, seed=0)
    assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
    best = float(np.sqrt((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum()))
    error = float(np.linalg.norm(matrix - left @ right))
    assert error <= 1.03 * best + 1e-6 * float(np.linalg.norm(matrix))


def test_a_matrix_of_the_rank_comes_back() -> None:
    matrix = decaying((60, 5), 0.5) @ decaying((5, 40), 0.5)
    left, right = low_rank(rows(matrix), matrix.shape, 5, seed=0)
    assert left @ right == pytest.approx(matrix, abs=1e-5 * float(np.abs(matrix).max()))


def test_zeros_have_factors() -> None:
    left, right = low_rank(rows(np.zeros((30, 20), np.float32)), (30, 20), 4, seed=0)
    assert not (left @ right).any()


def test_the_full_rank_is_exact() -> None:
    matrix = decaying((30, 20), 0.0)
    left, right = low_rank(rows(matrix), (30, 20), 20, seed=0)
    assert left @ right == pytest.approx(matrix, abs=1e-5 * float(np.abs(matrix).max()))


def test_blocks_of_any_number_of_rows_give_the_same_factors_to_rounding() -> None:
    matrix = decaying((60, 40), 1.0)
    one, other = (
        np.matmul(*low_rank(rows(matrix, num_rows), (60, 40), 4, seed=0)) for num_rows in (7, 60)
    )
    assert one == pytest.approx(other, abs=1e-8)


def test_the_same_seed_gives_the_same_bytes() -> None:
    matrix = decaying((60, 40), 1.0)
    one, other, another = (low_rank(rows(matrix), (60, 40), 4, seed=seed) for seed in (0, 0, 1))
    assert [a.tobytes() for a in one] == [b.tobytes() for b in other]
    assert one[0].tobytes() != another[0].tobytes()


def test_both_factors_carry_the_weight_evenly() -> None:
    left, right = low_rank(rows(decaying((60, 40), 1.0)), (60, 40), 4, seed=0)
    assert np.linalg.norm(left, axis=0) == pytest.approx(np.linalg.norm(right, axis=1), rel=1e-3)
