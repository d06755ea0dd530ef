"""The gate: may the candidate replace the model that is in use? Promote or refuse, with reasons.

A rule compares one score of the candidate with the same score of the reference. What was not
measured is no reason to promote: a missing score refuses.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from fedgraft.evaluation.scorecard import FOLLOWED, Scorecard


class Rule(BaseModel):
    """What the candidate must keep of the reference."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    score: str
    """Name of the score; `*` stands for every department, e.g. `perplexity/*/nats_per_token`."""
    reference: str
    """The arm to compare with, e.g. `instruct`."""
    bound: float
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
    references: dict[str, Scorecard],
    rules: tuple[Rule, ...] = DEFAULT_RULES,
) -> Decision:
    """Apply the rules; all must pass. A rule none of whose scores any reference has is left out."""
    reasons = []
    for rule in rules:
        reference = references.get(rule.reference)
        if reference is None:
            reasons.append(
                Reason(passed=False, text=f"{rule.words}: no scores of {rule.reference} to compare")
            )
            continue
        reasons += [_apply(rule, name, candidate, reference) for name in _names(rule, reference)]
    passed = bool(reasons) and all(reason.passed for reason in reasons)
    return Decision(
        candidate=candidate.arm,
        verdict="promote" if passed else "refuse",
        reasons=tuple(reasons),
    )


def _names(rule: Rule, reference: Scorecard) -> list[str]:
    if "*" not in rule.score:
        return [rule.score] if rule.score in reference.scores else []
    before, after = rule.score.split("*")
    return [n for n in reference.scores if n.startswith(before) and n.endswith(after)]


def _apply(rule: Rule, name: str, candidate: Scorecard, reference: Scorecard) -> Reason:
    wanted, found = reference.scores[name], candidate.scores.get(name)
    if found is None:
        return Reason(passed=False, text=f"{rule.words}: {name} was not measured")
    limit = rule.bound * wanted.value
    better_up = wanted.higher_is_better
    passed = found.value >= limit if better_up else found.value <= limit
    shown = f"{found.value:.0%}" if wanted.unit == "share" else f"{found.value:.3f} {wanted.unit}"
    bound = f"{limit:.0%}" if wanted.unit == "share" else f"{limit:.3f} {wanted.unit}"
    relation = "at least" if better_up else "at most"
    return Reason(
        passed=passed,
        text=f"{rule.words}: {name} is {shown}, {relation} {bound} was asked"
        + ("" if passed else " - not reached"),
    )
