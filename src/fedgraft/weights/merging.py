"""What is added to a target when residuals are combined: a method, a scale each, a factor a tensor.

    plain          sum of scale * r
    ties           TIES (arXiv 2306.01708): keep the largest `density` of each tensor of each
                   residual, elect a sign for each number, average those that agree with it
    dare           DARE (arXiv 2311.03099): drop numbers at random, keep each with probability
                   `density`, divide by that; sum
    dare_ties      drop as DARE does, elect as TIES does, sum those that agree
    breadcrumbs    Model Breadcrumbs (arXiv 2312.06795): leave out the largest `gamma` of each
                   tensor, of the rest keep the largest, `density` of all; sum

Arithmetic is in float32, where mergekit's is in the checkpoint's dtype unless told otherwise
(`dtype: float32`, `out_dtype: bfloat16`). In float32 our results are those of mergekit 0.1.5, bit
for bit but for what is listed below: task arithmetic and `breadcrumbs` with any weights as our
scales, `ties` with its default `normalize: true` and weights of 1. Its `lambda` is our scale up to
rounding; our `dare_ties` is its own with `normalize: false`. `benchmarks/merging_methods.py` runs
both. The differences:

- Of equal magnitudes at the cut we keep the first; mergekit keeps whichever its sort leaves. Of a
  tensor with fewer numbers than 1 / density we keep one; mergekit's Breadcrumbs keeps none.
- Our scales count towards the elected sign and the sum. `ties` divides by the number of agreeing
  residuals, so that a scale is never divided out again; mergekit divides by the sum of the agreeing
  weights, or by nothing (`normalize: false`).
- DARE divides by the density, as its paper does. mergekit by default matches each tensor's L1 norm
  instead, which for short vectors may be far from that; with `rescale: false` it does neither. The
  random numbers are ours: from the seed, the residual's place and the tensor's name, whatever the
  order in which tensors are read. A probability is a multiple of 2^-16.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Literal, Protocol, cast, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fedgraft.errors import ResidualError
from fedgraft.provenance import derive_seed
from fedgraft.weights.arithmetic import Floats, widen
from fedgraft.weights.checkpoint import BLOCK_ELEMENTS, Array, TensorInfo
from fedgraft.weights.family import Kind, kind_of, layer_of
from fedgraft.weights.threshold import above, magnitudes, thresholds

Name = Literal["plain", "ties", "dare", "dare_ties", "breadcrumbs"]
DRAWS = 1 << 16
"""Values of a random number; a chance is one of them."""
SIGN = np.uint32(1 << 31)
"""The bits of two numbers, compared by exclusive or, are below it where the signs are the same."""


class Addend(Protocol):
    """What can be added: a residual in any form."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def blocks(self, name: str, num_elements: int = BLOCK_ELEMENTS) -> Iterator[Array]: ...


class Method(BaseModel):
    """How residuals are combined; see the head of this file.

    Raises ResidualError for a density that is not above 0 and at most 1, a gamma that is not in 0
    to 1, and the two together above 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name = "plain"
    density: float = 1.0
    """Share of each tensor's numbers that is kept."""
    gamma: float = 0.01
    """Share of each tensor's numbers, the largest, that Breadcrumbs leaves out."""
    seed: int = 0
    """Of what DARE drops."""

    def model_post_init(self, _: object) -> None:
        if not 0 < self.density <= 1:
            raise ResidualError(
                f"expected a density above 0 and at most 1, found {self.density}; it is the share "
                "of each tensor that is kept, such as 0.5"
            )
        if not 0 <= self.gamma < 1:
            raise ResidualError(
                f"expected a gamma of at least 0 and below 1, found {self.gamma}; it is the share "
                "of each tensor, the largest numbers, that is left out, such as 0.01"
            )
        if self.name == "breadcrumbs" and self.density + self.gamma > 1:
            raise ResidualError(
                f"expected density + gamma of at most 1, found {self.density} + {self.gamma}; what "
                f"is left out cannot be kept. Take a density of at most {1 - self.gamma:g}"
            )


class LayerFactor(BaseModel):
    """A factor on the tensors of the layers `first` to `last`, both included."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: Annotated[int, Field(ge=0)]
    last: Annotated[int, Field(ge=0)]
    factor: float


class Factors(BaseModel):
    """Further factors on the scale of a tensor; all that apply are multiplied.

    A factor of 0 leaves tensors as they are in the target: `{"embedding": 0, "norm": 0}`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kinds: Mapping[Kind, float] = {}
    layers: tuple[LayerFactor, ...] = ()

    @classmethod
    def parse(cls, texts: Iterable[str]) -> "Factors":
        """Read factors as people write them: `embedding=0`, `3=0.5` or `0-5=0.5` for layers.

        Raises ResidualError for another kind, a kind given twice, and what is no factor.
        """
        kinds: dict[Kind, float] = {}
        layers = []
        for text in texts:
            what, _, number = text.partition("=")
            try:
                factor = float(number)
                if not math.isfinite(factor):
                    raise ValueError
                if what in get_args(Kind):
                    if what in kinds:
                        raise ValueError
                    kinds[cast("Kind", what)] = factor
                    continue
                first, _, last = what.partition("-")
                layers.append(LayerFactor(first=int(first), last=int(last or first), factor=factor))
            except ValueError:
                raise ResidualError(
                    f"expected KIND=X, once for each of {', '.join(get_args(Kind))}, or "
                    f"FIRST-LAST=X for layers, found {text!r}; such as embedding=0 or 0-5=0.5"
                ) from None
        return cls(kinds=kinds, layers=tuple(layers))

    def check(self, names: Iterable[str]) -> None:
        """Raise ResidualError for a factor that applies to no tensor of a model."""
        kinds = {kind_of(name) for name in names}
        layers = {layer for name in names if (layer := layer_of(name)) is not None}
        for kind in self.kinds:
            if kind not in kinds:
                raise ResidualError(
                    f"expected a kind of module that the model has ({', '.join(sorted(kinds))}), "
                    f"found {kind}; an output layer that is tied is the embedding"
                )
        for span in self.layers:
            if not any(span.first <= layer <= span.last for layer in layers):
                raise ResidualError(
                    f"expected layers from 0 to {max(layers, default=0)}, found {span.first} to "
                    f"{span.last}; name the first and the last one"
                )

    def of(self, name: str) -> float:
        """The factor of a tensor."""
        factor, layer = self.kinds.get(kind_of(name), 1.0), layer_of(name)
        for span in self.layers:
            if layer is not None and span.first <= layer <= span.last:
                factor *= span.factor
        return factor


PLAIN = Method()


def combined(
    name: str, addends: Sequence[Addend], scales: Sequence[float], method: Method
) -> Iterator[Floats]:
    """Yield what is to be added to the target's tensor, flat, in blocks of BLOCK_ELEMENTS.

    A block is valid until the next one is asked for, and is the caller's to change.
    """
    kept = [
        _scaled(_kept(name, n, addend, method), addend.tensors[name].num_elements, scale)
        for n, (addend, scale) in enumerate(zip(addends, scales, strict=True))
    ]
    if method.name in ("ties", "dare_ties"):
        yield from _agreed(zip(*kept, strict=True), mean=method.name == "ties")
        return
    for first, *others in zip(*kept, strict=True):
        for other in others:
            first += other
        yield first


def _scaled(blocks: Iterable[Array], size: int, scale: float) -> Iterator[Floats]:
    buffer, factor = np.empty(min(BLOCK_ELEMENTS, size), np.float32), np.float32(scale)
    for block in blocks:
        if factor != 1:
            yield np.multiply(block, factor, out=buffer[: block.size], dtype=np.float32)
        else:
            yield block if block.dtype == np.float32 else widen(block, buffer)


def _kept(name: str, place: int, addend: Addend, method: Method) -> Iterator[Array]:
    """Yield a residual's tensor with zeros for what the method leaves out."""
    size = addend.tensors[name].num_elements
    num_kept = max(1, int(method.density * size))
    match method.name:
        case "plain":
            return addend.blocks(name)
        case "dare" | "dare_ties":
            random = np.random.SFC64(derive_seed(method.seed, "dare", place, name))
            return _dropped(addend.blocks(name), method.density, random)
        case "ties":
            return _ranked(lambda: addend.blocks(name), 0, num_kept)
        case "breadcrumbs":
            num_largest = int(method.gamma * size)
            num_kept = min(num_kept, size - num_largest)
            return _ranked(lambda: addend.blocks(name), num_largest, num_largest + num_kept)


def _ranked(blocks: Callable[[], Iterable[Array]], first: int, last: int) -> Iterator[Array]:
    """Keep the numbers that are, by magnitude from the largest, in places first to last - 1."""
    outer, inner = (above(threshold) for threshold in thresholds(blocks, (first, last)))
    for block in blocks():
        bits = magnitudes(block)
        mask = inner(bits)
        if first:
            mask ^= outer(bits)
        yield _masked(block, mask)


def _dropped(blocks: Iterable[Array], density: float, random: np.random.SFC64) -> Iterator[Floats]:
    """Keep each number with the chance `density`, and divide it by that."""
    chance = max(1, round(density * DRAWS))
    gain = np.float32(DRAWS / chance)
    for block in blocks:
        draws = random.random_raw(-(-block.size // 4)).view(np.uint16)[: block.size]
        yield np.multiply(_masked(block, draws < chance), gain, dtype=np.float32)


def _masked(block: Array, mask: NDArray[np.bool_]) -> Array:
    """Put zeros in place, without a branch for each number."""
    bits = block.view(f"u{block.itemsize}")
    np.multiply(bits, mask, out=bits)
    return block


def _agreed(rounds: Iterable[Sequence[Floats]], *, mean: bool) -> Iterator[Floats]:
    """Sum the numbers whose sign is that of the sum of all, or average them (TIES, section 3).

    Where the sum is zero, as in mergekit, the positive ones count.
    """
    buffers = np.empty((2, BLOCK_ELEMENTS), np.float32)
    for blocks in rounds:
        total, agreed = buffers[:, : blocks[0].size]
        np.copyto(total, blocks[0])
        for block in blocks[1:]:
            total += block
        agreed[:] = 0
        votes = np.zeros(total.size, np.uint8)
        for block in blocks:
            bits = block.view(np.uint32) ^ total.view(np.uint32)
            agreed += _masked(block, bits < SIGN)
            votes += block != 0
        if mean:
            agreed /= np.maximum(votes, 1, out=votes)
        yield agreed
