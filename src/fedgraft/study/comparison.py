"""Scores of several arms and seeds to means, differences with intervals, claims and a verdict."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from math import sqrt
from types import MappingProxyType

from fedgraft.evaluation.benchmarks import PAPER_ROWS
from fedgraft.evaluation.difference import LEVEL, difference
from fedgraft.evaluation.gate import Decision
from fedgraft.evaluation.scorecard import (
    FOLLOWED,
    RESPONSE_NATS,
    RIGHT_AND_FOLLOWED,
    ROUGE_L,
    Score,
    Scorecard,
)
from fedgraft.study.result import NEW_FACTS, OLD_FACTS, Claim, Comparison, Summary, Unit

Summaries = Mapping[str, Mapping[str, Summary]]

PAIRS = (("graft", "instruct"), ("graft", "s1"), ("s1", "instruct"))
"""What is compared with what: the method with what is in use, and with what it would replace."""
COMPARED = (
    FOLLOWED,
    RIGHT_AND_FOLLOWED,
    "instructions/in_form",
    NEW_FACTS,
    OLD_FACTS,
    "perplexity/*/nats_per_token",
    f"{RESPONSE_NATS}/*",
    ROUGE_L,
    *PAPER_ROWS.values(),
    "benchmark/gsm8k/in_form",
)
"""Scores that are, in this order; `*` stands for anything."""

FORMS = MappingProxyType(
    {
        "instructions/in_form": (RIGHT_AND_FOLLOWED, "instructions/right"),
        "benchmark/gsm8k/in_form": (PAPER_ROWS["GSM8K", "strict-EM"], PAPER_ROWS["GSM8K", "EM"]),
    },
)
"""Score -> (strict, flexible): of the answers that are right, the share in the form asked. GSM8K
in arXiv 2410.10739 falls from 75% to 47% by strict match while flexible match stays at 75%:
nothing is unlearned but the form, and an average over both hides which."""
TOLD_WORDS = MappingProxyType(
    {
        "better": "better",
        "worse": "worse",
        "the same": "the same",
        "cannot be told": "not to be told apart",
    }
)
MIN_RIGHT = 20
"""Right answers below which nothing is said of their form."""


def summarise(scorecards: Iterable[Scorecard]) -> dict[str, dict[str, Summary]]:
    """Arm -> score -> mean and spread over the seeds that have the score."""
    values: dict[str, dict[str, list[float]]] = {}
    units = {}
    for card in scorecards:
        for name, score in card.scores.items():
            values.setdefault(card.arm, {}).setdefault(name, []).append(score.value)
            units[name] = score.unit
    return {
        arm: {name: Summary.of(found, units[name]) for name, found in scores.items()}
        for arm, scores in values.items()
    }


def compare(
    cards: Mapping[str, Sequence[Scorecard]],
    pairs: Iterable[tuple[str, str]] = PAIRS,
    *,
    score: str | None = None,
) -> tuple[Comparison, ...]:
    """The differences of pairs of arms, score by score, over examples and seeds.

    Args:
        cards: Arm -> its scorecards, one a seed; or one, where seeds do not matter.
        pairs: An arm, and the one that it is compared with.
        score: Compared before those of COMPARED, whatever it is.

    Raises EvaluationError where two arms were not asked the same.
    """
    known = {arm: [with_forms(card) for card in found] for arm, found in cards.items()}
    return tuple(
        Comparison(
            arm=arm,
            against=against,
            score=name,
            unit=unit,
            difference=difference(name, known[arm], known[against])
            if all(_can_tell(name, card) for card in (*known[arm], *known[against]))
            else None,
        )
        for arm, against in pairs
        if known.get(arm) and known.get(against)
        for name, unit in _compared([*known[arm], *known[against]], score)
    )


def _can_tell(name: str, card: Scorecard) -> bool:
    """Whether the card has the score, of two examples at least: one alone has no interval."""
    found = card.outcomes.get(name)
    return name in card.scores and (found is None or found.num_examples > 1)


def _compared(cards: Sequence[Scorecard], first: str | None) -> Iterator[tuple[str, Unit]]:
    """The first, then the names of COMPARED that any card has, in that order, with their units."""
    units = {name: score.unit for card in cards for name, score in card.scores.items()}
    patterns = COMPARED if first is None else (first, *COMPARED)
    names = dict.fromkeys(
        name for pattern in patterns for name in units if fnmatchcase(name, pattern)
    )
    yield from ((name, units[name]) for name in names)


def told_of(name: str, comparisons: Iterable[Comparison]) -> str:
    """What is better, what is worse and what cannot be told, of one score, in a sentence.

    All are against the same arm; empty where none was compared by that score.
    """
    ours = [one for one in comparisons if one.score == name and one.difference]
    parts = []
    for told, words in TOLD_WORDS.items():
        arms = [one.arm for one in ours if one.told == told]
        if arms:
            parts.append(f"{', '.join(arms)} {'is' if len(arms) == 1 else 'are'} {words}")
    if not parts:
        return ""
    found = [one.difference for one in ours if one.difference]
    seeds = max(one.num_seeds for one in found)
    over = f"{max(one.num_examples for one in found):,} examples"
    over += f" and {seeds} seeds" if seeds > 1 else " of one seed"
    return (
        f"Example by example against {ours[0].against}, {'; '.join(parts)} ({LEVEL:.0%} intervals "
        f"over {over})."
    )


def with_forms(card: Scorecard) -> Scorecard:
    """The card with the scores of FORMS, where it has what they are made of."""
    scores, outcomes = dict(card.scores), dict(card.outcomes)
    for name, (strict, flexible) in FORMS.items():
        above, below = card.scores.get(strict), card.scores.get(flexible)
        if above is None or below is None or below.value * below.num < MIN_RIGHT:
            continue
        share = above.value / below.value
        scores[name] = Score(
            value=share,
            num=round(below.value * below.num),
            stderr=sqrt(above.stderr**2 + (share * below.stderr) ** 2) / below.value,
            unit="share",
        )
        if strict in outcomes and flexible in outcomes:
            outcomes[name] = outcomes[strict].among(outcomes[flexible])
    return card.model_copy(update={"scores": scores, "outcomes": outcomes})


def check_claims(summaries: Summaries) -> tuple[Claim, ...]:
    """The claims of instruction residuals, each against its bar; only those that were measured."""
    instruct, base, s1, graft = (
        summaries.get(arm, {}).get(FOLLOWED) for arm in ("instruct", "base", "s1", "graft")
    )
    both_graft, both_s1 = (
        summaries.get(arm, {}).get(RIGHT_AND_FOLLOWED) for arm in ("graft", "s1")
    )
    known = summaries.get("graft", {}).get("knowledge/asked/new")
    claims = []

    def claim(text: str, target: str, measured: str, *, reached: bool) -> None:
        claims.append(Claim(text=text, target=target, measured=measured, reached=reached))

    if instruct:
        claim(
            "The instruct model follows the instructions",
            "at least 90%",
            _shown(instruct),
            reached=_at_least(instruct.mean, 0.9),
        )
    if base:
        claim("The base model does not", "under 10%", _shown(base), reached=base.mean < 0.1)
    if instruct and s1:
        lost = instruct.mean - s1.mean
        claim(
            "Pre-training the instruct model further (S1) makes it forget them",
            "at least 20 points lost",
            f"{100 * lost:.1f} points: from {_shown(instruct)} to {_shown(s1)}",
            reached=_at_least(lost, 0.2),
        )
    if instruct and graft and instruct.mean:
        kept = graft.mean / instruct.mean
        claim(
            "The graft keeps what the instruct model followed",
            "at least 90% of it",
            f"{kept:.1%} of it: {_shown(graft)}",
            reached=_at_least(kept, 0.9),
        )
    if known:
        claim(
            "The graft knows the new facts",
            "at least 50%",
            _shown(known),
            reached=_at_least(known.mean, 0.5),
        )
    if both_graft and both_s1:
        ahead = both_graft.mean - both_s1.mean
        claim(
            "The graft beats S1 on answers that are right and as instructed",
            "by at least 20 points",
            f"by {100 * ahead:.1f} points: {_shown(both_graft)} against {_shown(both_s1)}",
            reached=_at_least(ahead, 0.2),
        )
    return tuple(claims)


def in_a_sentence(comparison: Comparison) -> str:
    """The difference in words, with their verb, and what its interval speaks of."""
    found = comparison.difference
    assert found
    verb = "" if comparison.told == "cannot be told" else "is "
    over = f"{found.num_examples:,} prompts"
    over += f" and {found.num_seeds} seeds" if found.num_seeds > 1 else " of one seed"
    return f"{verb}{in_words(comparison)}, a {LEVEL:.0%} interval over {over}"


def _shown(score: Summary) -> str:
    """The mean, and the range where there are seeds to range over."""
    shown = f"{score.mean:.1%}"
    if score.num_seeds > 1:
        shown += f" ({score.lowest:.1%} to {score.highest:.1%} over {score.num_seeds} seeds)"
    return shown


def _at_least(value: float, bar: float) -> bool:
    """Whether the bar is reached; 0.95 - 0.75 reaches 0.2 although the floats fall short of it."""
    return value >= bar - 1e-9


def in_words(comparison: Comparison) -> str:
    """`better by 31 points (25 to 37)`, `cannot be told apart (-2 to +4 points)`, `missing`."""
    found = comparison.difference
    if found is None:
        return "missing"
    factor, unit = (100, "points") if comparison.unit == "share" else (1, comparison.unit)
    digits = 1 if comparison.unit == "share" else 3
    value, low, high = (factor * one for one in (found.value, found.low, found.high))
    match comparison.told:
        case "the same":
            return "the same"
        case "better" | "worse" as told:
            near, far = sorted((abs(low), abs(high)))
            return (
                f"{told} by {abs(value):.{digits}f} {unit} ({near:.{digits}f} to {far:.{digits}f})"
            )
        case _:
            return f"cannot be told apart ({low:+.{digits}f} to {high:+.{digits}f} {unit})"


def verdict(
    summaries: Summaries,
    claims: Sequence[Claim],
    decisions: Sequence[Decision],
    comparisons: Sequence[Comparison] = (),
    *,
    ways: Sequence[Comparison] = (),
) -> str:
    """A few sentences that a manager can act on.

    Args:
        comparisons: Of the arms with each other.
        ways: Of other ways to add the residual with plain addition, the graft.
    """
    sentences = []
    if "graft" in summaries and FOLLOWED in summaries["graft"]:
        graft, s1 = summaries["graft"][FOLLOWED].mean, summaries["s1"][FOLLOWED].mean
        sentences.append(
            f"After the new text, the graft follows {graft:.0%} of the instructions; the instruct "
            f"model that read the same text itself follows {s1:.0%}."
        )
    found = {(c.arm, c.against, c.score): c for c in comparisons}
    ahead = found.get(("graft", "s1", FOLLOWED))
    if ahead and ahead.difference:
        sentences.append(f"Prompt by prompt against S1, the graft {in_a_sentence(ahead)}.")
    form = found.get(("graft", "instruct", "instructions/in_form"))
    if form and form.told == "worse":
        sentences.append(
            "The form of right answers suffers: against the instruct model, the graft "
            f"{in_a_sentence(form)}."
        )
    texts = [
        name
        for name in summaries.get("graft", {})
        if name.startswith("perplexity/") and name.endswith("/nats_per_token")
    ]
    better = [n for n in texts if summaries["graft"][n].mean < summaries["instruct"][n].mean]
    if texts:
        sentences.append(
            f"It predicts the held-out text of {len(better)} of {len(texts)} departments better "
            "than the instruct model did."
        )
    if told := told_of(FOLLOWED, ways):
        sentences.append(
            "Other ways to add the residual, by prompts followed in full: "
            f"{told[0].lower()}{told[1:]}"
        )
    if claims:
        reached = sum(claim.reached for claim in claims)
        sentences.append(f"{reached} of {len(claims)} claims were reached.")
    promoted = sum(decision.verdict == "promote" for decision in decisions)
    if decisions:
        advice = "promote the graft" if promoted == len(decisions) else "do not promote it yet"
        sentences.append(
            f"The gate passed {promoted} of {len(decisions)} seeds: {advice}."
            if len(decisions) > 1
            else f"The gate says: {advice}."
        )
    return " ".join(sentences)
