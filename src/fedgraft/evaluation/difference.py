"""How far two models are apart on the same examples, and how sure that is.

The interval is a paired bootstrap (Efron 1979): examples are drawn again with replacement, the same
for both models and for all seeds, and the difference is taken anew; the middle 95% of 4,000 such
differences are the interval. A score is a ratio of sums, so a drawn example brings its whole size.

Few examples are drawn too close together: each distance from the difference is stretched by
sqrt(n / chi2(n - 1)), which turns the normal distribution that n examples promise into the t of
Student that they can keep (what Hesterberg 2015, arXiv 1411.5279, does to an interval's ends); but
none goes further than a draw went, so that no share leaves what the examples allow.

Seeds are another matter. There are three of them as a rule, and the range of three numbers holds
the truth 3 times in 4 at best (in 1 of 4 all lie on one side of it), whatever is drawn from them
again. So what seeds add is Student's t outright: the standard error of the mean over seeds times t
with one degree of freedom less than there are seeds, added to each of the 4,000. Of the variance
between seeds that part is taken off that the examples alone would make, since the draws hold it
already. With one seed nothing is added, and the interval speaks of these two checkpoints alone.

Notes
-----
Examples are drawn once for all seeds, not anew inside each: every seed is asked the same, so that
what is peculiar to a question does not average out over seeds (Owen 2007, arXiv 0712.1111). Where
each outcome is the same for both models the interval is zero wide, also where there are three
examples; `num_examples` stands beside it.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from fedgraft.errors import EvaluationError
from fedgraft.evaluation.outcomes import Outcomes
from fedgraft.evaluation.scorecard import Scorecard
from fedgraft.provenance import derive_seed

LEVEL = 0.95
DRAWS = 4000
MANY = 1000
"""Examples above which not each is drawn but how many of each kind of outcomes: the distribution is
the same, and of thousands of questions answered right or wrong there are few kinds."""
DRAWN_AT_ONCE = 4_000_000
"""Counts in memory."""
DECIMALS = 9
"""Kept of a difference: what the order of a sum could change is below."""

Finding = Literal["more", "less", "the same", "cannot be told"]


class Difference(BaseModel):
    """Candidate less reference (or less a multiple of it), with its interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    low: float
    high: float
    num_examples: int
    num_seeds: int
    """1: the interval speaks of these checkpoints; more: of other seeds as well."""
    paired: bool
    """Whether example by example; else from standard errors, which is wider."""

    @property
    def finding(self) -> Finding:
        if self.low == self.high == 0:
            return "the same"
        if self.low > 0:
            return "more"
        return "less" if self.high < 0 else "cannot be told"

    @property
    def num_needed(self) -> int | None:
        """Examples, about, with which an interval about this value would leave zero out.

        None where more seeds are needed, or the value is so small that nobody would ask as many.
        """
        width = max(self.value - self.low, self.high - self.value)
        if self.num_seeds > 1 or width > 10 * abs(self.value) or not width:
            return None
        return int(np.ceil(self.num_examples * (width / self.value) ** 2))


def difference(
    name: str,
    candidates: Sequence[Scorecard],
    references: Sequence[Scorecard],
    *,
    times: float = 1.0,
) -> Difference:
    """A score of the candidate less `times` that of the reference, the mean over seeds.

    Where scorecards hold the outcomes of single examples these are paired; else the interval is
    made of the standard errors, as if both had been asked different examples.

    Args:
        candidates: A card a seed, or one for all seeds; all have the score.
        references: The same seeds in the same order, or one card for all.

    Raises EvaluationError where the two were not asked the same examples, or seeds do not pair.
    """
    num_seeds = max(len(candidates), len(references))
    if not (num_seeds and all(len(side) in (1, num_seeds) for side in (candidates, references))):
        raise EvaluationError(
            f"{name}: expected a card for each of the same seeds of both, or one for all of them, "
            f"found {len(candidates)} and {len(references)}; score the same seeds of both"
        )
    both = [*candidates, *references]
    found = np.array([card.scores[name].value for card in candidates])
    wanted = np.array([card.scores[name].value for card in references])
    by_seed = found - times * wanted
    kept = [card.outcomes[name] for card in both if name in card.outcomes]
    paired = len(kept) == len(both)
    if paired and len({one.examples for one in kept}) > 1:
        raise EvaluationError(
            f"{name}: expected both models to be asked the same examples, found others for "
            f"{candidates[0].arm} than for {references[0].arm}; score both on one file"
        )
    num_examples = kept[0].num_examples if paired else min(c.scores[name].num for c in both)
    rng = np.random.default_rng(derive_seed(0, kept[0].examples if paired else name))
    if paired:
        if num_examples < 2:
            raise EvaluationError(
                f"{name}: expected at least 2 examples to draw from, found {num_examples}; ask more"
            )
        drawn = _drawn(kept[: len(candidates)], kept[len(candidates) :], times, rng)
        plain = (drawn - by_seed).mean(1)
        stretched = plain * np.sqrt(num_examples / rng.chisquare(num_examples - 1, DRAWS))
        spread = stretched.clip(plain.min(), plain.max())
    else:
        errors = [
            np.mean([card.scores[name].stderr ** 2 for card in side])
            for side in (candidates, references)
        ]
        stderr = float(np.sqrt(errors[0] + times**2 * errors[1]))
        spread = stderr * rng.standard_normal(DRAWS)
    if num_seeds > 1:
        variance = by_seed.var(ddof=1) - (_apart_by_examples(drawn) if paired else 0.0)
        stderr = np.sqrt(max(0.0, variance) / num_seeds)
        spread += stderr * rng.standard_t(num_seeds - 1, DRAWS)
    tail, value = (1 - LEVEL) / 2, float(by_seed.mean())
    low, high = np.quantile(value + spread, (tail, 1 - tail))
    if candidates[0].scores[name].unit == "share":  # t of two seeds goes beyond what shares allow
        low, high = max(low, min(value, -times)), min(high, max(value, 1.0))
    return Difference(
        value=value,
        low=_rounded(low, value),
        high=_rounded(high, value),
        num_examples=num_examples,
        num_seeds=num_seeds,
        paired=paired,
    )


def _rounded(end: float, value: float) -> float:
    """An end of the interval; that of an interval without width is the value itself."""
    return value if abs(end - value) < 10**-DECIMALS else round(float(end), DECIMALS)


def _drawn(
    candidates: Sequence[Outcomes],
    references: Sequence[Outcomes],
    times: float,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """The difference of s seeds for each draw of the examples, [DRAWS, s]."""
    amounts, sizes = _matrices([*candidates, *references])
    n = amounts.shape[1]
    num_alike: NDArray[np.integer[Any]] = np.ones(n, np.int64)
    if n > MANY:
        both = np.vstack([amounts, sizes])
        kinds, num_alike = np.unique(both, axis=1, return_counts=True)
        amounts, sizes = np.split(kinds, 2)
    drawn = []
    step = max(1, DRAWN_AT_ONCE // len(num_alike))
    for start in range(0, DRAWS, step):
        counts = rng.multinomial(n, num_alike / n, size=min(step, DRAWS - start))
        values = (counts @ amounts.T) / (counts @ sizes.T)
        found, wanted = values[:, : len(candidates)], values[:, len(candidates) :]
        drawn.append(found - times * wanted)
    return np.concatenate(drawn)


def _apart_by_examples(drawn: NDArray[np.float64]) -> float:
    """The variance between seeds that is there because examples are few, of draws [DRAWS, s].

    It is what draws of one seed vary by, less what they have in common with those of another.
    """
    together = np.cov(drawn.T)
    num_seeds = len(together)
    common = (together.sum() - together.trace()) / (num_seeds * (num_seeds - 1))
    return float(together.trace() / num_seeds - common)


def _matrices(outcomes: Sequence[Outcomes]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Amounts and sizes of c cards and n examples, [c, n]."""
    amounts = np.array([one.amounts for one in outcomes])
    sizes = np.array([one.sizes or (1.0,) * one.num_examples for one in outcomes])
    return amounts, sizes
