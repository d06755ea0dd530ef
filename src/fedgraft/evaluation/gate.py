"""The gate: may the candidate replace the model that is in use? Promote or refuse, with reasons.

A rule compares one score of the candidate with the same score of the reference. What was not
measured is no reason to promote: a missing score refuses.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fedgraft.evaluation.scorecard import FOLLOWED, Score, Scorecard


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

    passed: bool
    text: str


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
        reasons = [Reason(passed=False, text="no rule was given, so nothing was checked")]
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
        return [Reason(passed=False, text=text)]
    known = dict.fromkeys((*reference.scores, *candidate.scores))
    names = [name for name in known if fnmatchcase(name, rule.score)] or [rule.score]
    return [_compare(rule, name, candidate, reference) for name in names]


def _compare(rule: Rule, name: str, candidate: Scorecard, reference: Scorecard) -> Reason:
    for card in (candidate, reference):
        if name not in card.scores:
            text = f"{rule.words}: {name} was not measured for {card.arm}"
            return Reason(passed=False, text=text)
    found, wanted = candidate.scores[name], reference.scores[name]
    limit = rule.bound * wanted.value
    up = wanted.higher_is_better
    passed = found.value >= limit if up else found.value <= limit
    return Reason(
        passed=passed,
        text=f"{rule.words}: {name} is {_shown(found.value, found)}, "
        f"{'at least' if up else 'at most'} {_shown(limit, wanted)} was asked"
        + ("" if passed else " - not reached"),
    )


def _shown(value: float, score: Score) -> str:
    return f"{value:.1%}" if score.unit == "share" else f"{value:.3f} {score.unit}"
