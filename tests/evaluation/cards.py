"""Scorecards with outcomes, made of numbers."""

from collections.abc import Sequence
from math import sqrt
from statistics import pstdev

from fedgraft.evaluation.outcomes import Outcomes
from fedgraft.evaluation.scorecard import Score, Scorecard, Unit

NAME = "score"


def card(
    values: Sequence[float],
    *,
    arm: str = "graft",
    name: str = NAME,
    sizes: Sequence[int] | None = None,
    paired: bool = True,
    unit: Unit = "share",
    first: int = 0,
) -> Scorecard:
    """A card with one score, of examples that are numbered from `first`."""
    sizes = sizes or [1] * len(values)
    numbered = [(f"{first + number:06}", value) for number, value in enumerate(values)]
    outcomes = Outcomes.of([(*one, size) for one, size in zip(numbered, sizes, strict=True)])
    stderr = pstdev(values) / sqrt(len(values))
    score = Score(value=outcomes.value, num=sum(sizes), stderr=stderr, unit=unit)
    return Scorecard(
        arm=arm,
        seed=None,
        scores={name: score},
        outcomes={name: outcomes} if paired else {},
    )
