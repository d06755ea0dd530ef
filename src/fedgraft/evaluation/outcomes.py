"""What each example gave to a score, in few bytes, so that models can be compared pair by pair.

    value of a score = sum of amounts / sum of sizes

An example is known by the hash of what was asked, and stands in the order of those hashes: two
models were asked the same exactly where `examples` is the same, whatever the order was.
"""

from collections.abc import Sequence
from math import fsum
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, FiniteFloat, PlainSerializer

from fedgraft.provenance import hash_json

DIGITS = 6
"""Of an amount that are kept: a loss to a millionth of itself."""


def _as_text(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def _from_text(numbers: object) -> object:
    return [float(number) for number in numbers.split()] if isinstance(numbers, str) else numbers


Numbers = Annotated[
    tuple[FiniteFloat, ...],
    BeforeValidator(_from_text),
    PlainSerializer(_as_text, return_type=str, when_used="json"),
]
"""One line of JSON, `"1 0 0.5"`, where a list would take a line for each."""


class Outcomes(BaseModel):
    """The outcomes of one score, example by example."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    examples: str
    """Hash of the examples, in order."""
    amounts: Numbers
    sizes: Numbers | None = None
    """What each counts for: tokens, bytes, constraints; None where each counts once."""

    @classmethod
    def of(cls, items: Sequence[tuple[str, float, int]]) -> Self:
        """From (example, amount, size) in any order; what has no size says nothing, and goes."""
        kept = sorted(item for item in items if item[2])
        sizes = [size for _, _, size in kept]
        return cls(
            examples=hash_json([example for example, _, _ in kept]),
            amounts=tuple(float(f"{amount:.{DIGITS}g}") for _, amount, _ in kept),
            sizes=None if all(size == 1 for size in sizes) else tuple(map(_number, sizes)),
        )

    def among(self, others: "Outcomes") -> "Outcomes":
        """As a share of what others gave: of the answers that are right, those in form.

        The caller has seen to it that the examples are the same.
        """
        return Outcomes(examples=self.examples, amounts=self.amounts, sizes=others.amounts)

    @property
    def num_examples(self) -> int:
        return len(self.amounts)

    @property
    def value(self) -> float:
        return fsum(self.amounts) / (fsum(self.sizes) if self.sizes else self.num_examples)


def _number(size: int) -> float:
    return float(f"{size:.{DIGITS}g}")
