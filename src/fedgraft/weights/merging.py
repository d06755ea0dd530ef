"""How residuals are combined before they are added: a method, and a factor for each tensor."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from fedgraft.weights.arithmetic import Floats
from fedgraft.weights.checkpoint import BLOCK_ELEMENTS, Array, TensorInfo


class Addend(Protocol):
    """What can be added: a residual in any form."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def blocks(self, name: str, num_elements: int = BLOCK_ELEMENTS) -> Iterator[Array]: ...


class Method(BaseModel):
    """How residuals are combined."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["plain"] = "plain"


class Factors(BaseModel):
    """Factors on the scale, by tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def of(self, name: str) -> float:
        """The factor of a tensor."""
        return 1.0


PLAIN = Method()


def combined(
    name: str, addends: Sequence[Addend], scales: Sequence[float], method: Method
) -> Iterator[Floats]:
    """Yield what is to be added to the target's tensor, flat, in blocks of BLOCK_ELEMENTS.

    A block is valid until the next one is asked for.
    """
    first, *others = (addend.blocks(name) for addend in addends)
    factor, *factors = (np.float32(scale) for scale in scales)
    total = np.empty(min(BLOCK_ELEMENTS, addends[0].tensors[name].num_elements), np.float32)
    product = np.empty_like(total) if others else total
    for block in first:
        summed = np.multiply(block, factor, out=total[: block.size], dtype=np.float32)
        for scale, other in zip(factors, others, strict=True):
            summed += np.multiply(next(other), scale, out=product[: block.size], dtype=np.float32)
        yield summed
