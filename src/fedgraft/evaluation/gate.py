"""The gate: may the candidate replace the model that is in use? Promote or refuse, with reasons.

A rule compares one score of the candidate with the same score of the reference, example by example
where scorecards hold outcomes (`evaluation.difference`), and finds one of four things:

    kept              the whole 95% interval keeps the bound
    lost              the whole interval misses it
    cannot be told    the interval has the bound inside: too few examples, or too close
    missing           the score was not measured

The candidate is promoted where every rule is kept. What was not measured is no reason to promote,
and neither is what these examples cannot tell: with every rule at the bound exactly, a gate that
went by the figures alone would promote one candidate in two. Since all rules must hold, a
candidate that misses one of them passes at most once in 40, however many rules there are (an
intersection-union test: Berger 1982).
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fedgraft.errors import EvaluationError
from fedgraft.evaluation.difference import LEVEL, Difference, difference
from fedgraft.evaluation.scorecard import FOLLOWED, Score, Scorecard

Finding = Literal["kept", "lost", "cannot be told", "missing"]
MIN_EXAMPLES = 20
"""Below, outcomes that are all alike tell nothing: of 20, one in seven could still differ (the rule
of three)."""


class Rule(BaseModel):
    """What the candidate must keep of the reference."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    score: str
    """Name of the score; `*` stands for every department, e.g. `perplexity/*/nats_per_token`."""
    reference: str
    """The arm to compare with, e.g. `instruct`."""
    bound: float = Field(gt=0, allow_inf_nan=False)
    """The candidate's value must be at least (shares) or at most (nats, bits) this many times the
    reference's."""
    words: str
    """What the rule protects, in words for the report."""


DEFAULT_RULES = (
    Rule(
        score=FOLLOWED,
        reference="instruct",
        bound=0.9,
        words="follows instructions as the instruct model did",
    ),
    Rule(
        score="knowledge/asked/new",
        reference="instruct",
        bound=1.0,
        words="knows at least as many new facts as the instruct model",
    ),
    Rule(
        score="perplexity/*/nats_per_token",
        reference="instruct",
        bound=1.0,
        words="predicts the departments' text no worse than the instruct model",
    ),
)


class Reason(BaseModel):
    """One rule applied to one score."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    finding: Finding
    text: str

    @property
    def passed(self) -> bool:
        return self.finding == "kept"


class Decision(BaseModel):
    """Promote or refuse, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidate: str
    verdict: Literal["promote", "refuse"]
    reasons: tuple[Reason, ...]


def decide(
    candidate: Scorecard,
    references: Mapping[str, Scorecard],
    rules: Sequence[Rule] = DEFAULT_RULES,
) -> Decision:
    """Apply each rule to each score that it names; all must pass, and there must be one."""
    reasons = [reason for rule in rules for reason in _apply(rule, candidate, references)]
    if not reasons:
        reasons = [Reason(finding="missing", text="no rule was given, so nothing was checked")]
    passed = all(reason.passed for reason in reasons)
    return Decision(
        candidate=candidate.arm,
        verdict="promote" if passed else "refuse",
        reasons=tuple(reasons),
    )


def _apply(rule: Rule, candidate: Scorecard, references: Mapping[str, Scorecard]) -> list[Reason]:
    reference = references.get(rule.reference)
    if reference is None:
        text = f"{rule.words}: there are no scores of {rule.reference} to compare with"
        return [Reason(finding="missing", text=text)]
    known = dict.fromkeys((*reference.scores, *candidate.scores))
    names = [name for name in known if fnmatchcase(name, rule.score)] or [rule.score]
    return [_compare(rule, name, candidate, reference) for name in names]


def _compare(rule: Rule, name: str, candidate: Scorecard, reference: Scorecard) -> Reason:
    for card in (candidate, reference):
        if name not in card.scores:
            text = f"{rule.words}: {name} was not measured for {card.arm}"
            return Reason(finding="missing", text=text)
    found, wanted = candidate.scores[name], reference.scores[name]
    up = wanted.higher_is_better
    asked = (
        f"{rule.words}: {name} is {_shown(found.value, found)}, {'at least' if up else 'at most'} "
        f"{_shown(rule.bound * wanted.value, wanted)} was asked"
    )
    try:
        apart = difference(name, [candidate], [reference], times=rule.bound)
    except EvaluationError as error:
        return Reason(finding="missing", text=f"{asked}: {error}")
    finding = _finding(apart, up=up)
    return Reason(finding=finding, text=f"{asked}: {_in_words(finding, apart, found)}")


def _finding(apart: Difference, *, up: bool) -> Finding:
    """Against the bound, at which the difference is zero; to stand on it is to keep it."""
    if apart.low == apart.high and apart.paired and apart.num_examples < MIN_EXAMPLES:
        return "cannot be told"
    worst, best = (apart.low, apart.high) if up else (-apart.high, -apart.low)
    if worst >= 0:
        return "kept"
    return "lost" if best < 0 else "cannot be told"


def _in_words(finding: Finding, apart: Difference, score: Score) -> str:
    factor, unit = (100, "points") if score.unit == "share" else (1, score.unit)
    value, low, high = (f"{factor * one:+.3g}" for one in (apart.value, apart.low, apart.high))
    margin = f"{value} {unit}, {LEVEL:.0%} interval {low} to {high}"
    if not apart.paired:
        margin += ", not paired"
    if finding != "cannot be told":
        return f"{finding} ({margin})"
    more = f"; about {apart.num_needed:,} would tell" if apart.num_needed else ""
    if apart.low == apart.high:
        more = f"; ask {MIN_EXAMPLES} at least"
    return f"{finding} from {apart.num_examples:,} examples ({margin}){more}"


def _shown(value: float, score: Score) -> str:
    return f"{value:.1%}" if score.unit == "share" else f"{value:.3f} {score.unit}"
