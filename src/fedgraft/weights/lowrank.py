"""The best factors of a matrix that is read row by row: randomised singular value decomposition.

Halko, Martinsson and Tropp 2011 (arXiv 0909.4061), algorithm 4.4 on the matrix's transpose: Q spans
the space of its rows, found by passes of R'R over a random start, and R is close to (R Q) Q'. Each
pass multiplies by R and by R' at once, so three powers take three readings, and one more for R Q.
Q alone is kept between passes: n times (rank + 8) numbers.
"""

from collections.abc import Callable, Iterator

import numpy as np

from fedgraft.weights.arithmetic import Floats

OVERSAMPLES = 8
"""Columns beyond the rank; 5 to 10 are usual (section 1.3 there)."""
POWERS = 3
"""Noise falls off slowly, where powers matter (section 4.5): these leave it 1 % above the best."""


def low_rank(
    rows: Callable[[], Iterator[Floats]], shape: tuple[int, int], rank: int, seed: int
) -> tuple[Floats, Floats]:
    """Return (left, right), m x r and r x n, whose product is close to the best of that rank.

    Args:
        rows: Yields the matrix from its first row to its last, a few rows at a time.
        rank: At most the smaller side of the matrix.
    """
    num_rows, num_columns = shape
    width = min(rank + OVERSAMPLES, *shape)
    start = np.random.default_rng(seed).standard_normal((num_columns, width), np.float32)
    basis: Floats = np.linalg.qr(start).Q
    for _ in range(POWERS):
        moved = np.zeros_like(basis)
        for block in rows():
            moved += block.T @ (block @ basis)
        basis = np.linalg.qr(moved).Q
    projected = np.empty((num_rows, width), np.float32)
    first = 0
    for block in rows():
        np.matmul(block, basis, out=projected[first : first + len(block)])
        first += len(block)
    left, weights, right = np.linalg.svd(projected, full_matrices=False)
    root = np.sqrt(weights[:rank])  # shared evenly, so that neither factor is much the larger
    return left[:, :rank] * root, root[:, None] * (right[:rank] @ basis.T)
