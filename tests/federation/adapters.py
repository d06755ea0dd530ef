"""Random adapters of clients over layers that are not square, as the federation sees them."""

import numpy as np
from numpy.typing import NDArray

from fedgraft.federation.aggregate import Change
from fedgraft.federation.update import Size, Template, Tensors, Update, named

BASE = "sha256:0123456789abcdef"
LAYERS = {"layers.0.q_proj": (24, 16), "layers.0.down_proj": (7, 30)}
"""Module -> (out, in)."""
MODULE = "layers.0.q_proj"
Wide = NDArray[np.float64]


def tensors_of(
    seed: int, rank: int = 4, layers: dict[str, tuple[int, int]] = LAYERS
) -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(seed)
    found = {}
    for module, (num_out, num_in) in layers.items():
        found[named(module, "A")] = generator.normal(size=(rank, num_in)).astype(np.float32)
        found[named(module, "B")] = generator.normal(size=(num_out, rank)).astype(np.float32)
    return found


def update_of(
    client: str,
    seed: int = 0,
    *,
    num_examples: int = 10,
    size: Size = Size(4, 8.0),  # noqa: B008
    layers: dict[str, tuple[int, int]] = LAYERS,
    tensors: Tensors | None = None,
) -> Update:
    return Update(
        client=client,
        num_examples=num_examples,
        tensors=tensors_of(seed, size.rank, layers) if tensors is None else tensors,
        rank=size.rank,
        alpha=size.alpha,
        base=BASE,
        round=3,
    )


def template(*sizes: Size, max_norm: float = 1e3) -> Template:
    return Template(
        base=BASE, round=3, layers=LAYERS, sizes=sizes or (Size(4, 8.0),), max_norm=max_norm
    )


def change_of(tensors: Tensors, module: str, scale: float) -> Wide:
    a, b = (tensors[named(module, factor)].astype(np.float64) for factor in ("A", "B"))
    change: Wide = scale * b @ a
    return change


def ideal(updates: list[Update], module: str = MODULE) -> Wide:
    """The mean of the clients' changes, as dense matrices."""
    total = sum(update.num_examples for update in updates)
    return np.asarray(
        sum(
            update.num_examples
            / total
            * change_of(update.tensors, module, update.alpha / update.rank)
            for update in updates
        )
    )


def dense(change: Change | None) -> Wide:
    assert change
    return change.left.astype(np.float64) @ change.right.astype(np.float64)


def distance(found: Wide, expected: Wide) -> float:
    """||found - expected|| / ||expected||."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
