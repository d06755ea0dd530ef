"""The arms of a study of selection against their rivals: over seeds, in differences, in words.

    scores of arm, seed ── over seeds ──> mean, spread ──────────┐
                        └─ less those of the rival, seed by seed ─┴──> verdict

Both had the same clients in a seed, so what is told apart are differences within seeds.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev

from fedgraft.evaluation.scorecard import (
    RESPONSE_NATS,
    RIGHT_AND_FOLLOWED,
    ROUGE_L,
    ROUGE_L_LEGACY,
)
from fedgraft.study.result import MIN_SEEDS, Compared, ScoredChoice, Summary, Unit

START = "start"
"""The arm that is the model before any training."""
WORDS: Mapping[str, tuple[str, Unit]] = {
    RIGHT_AND_FOLLOWED: ("right and as instructed", "share"),
    ROUGE_L: ("Rouge-L", "share"),
    ROUGE_L_LEGACY: ("Rouge-L as the paper counts it", "share"),
    RESPONSE_NATS: ("loss on the given answers, nats per token", "nats"),
}
"""The scores of a study of selection, in words."""


def leading(summary: Mapping[str, Mapping[str, Summary]], arms: Sequence[str]) -> str:
    """The best of some arms by the first score that they have."""
    for name, (_, unit) in WORDS.items():
        values = {arm: summary[arm][name].mean for arm in arms if name in summary.get(arm, {})}
        if values:
            return (min if unit == "nats" else max)(values, key=values.__getitem__)
    return arms[0]


def over_seeds(scored: Iterable[ScoredChoice]) -> dict[str, dict[str, Summary]]:
    """Arm -> score -> mean and spread."""
    found: dict[str, dict[str, list[float]]] = {}
    for one in scored:
        for name, value in one.scores.items():
            found.setdefault(one.arm, {}).setdefault(name, []).append(value)
    return {
        arm: {name: Summary.of(values, WORDS[name][1]) for name, values in scores.items()}
        for arm, scores in found.items()
    }


def against(scored: Iterable[ScoredChoice], rivals: Mapping[str, str]) -> tuple[Compared, ...]:
    """Each arm and score less those of its rival, seed by seed: both had the same clients.

    The standard error is that of the mean of the differences over seeds; None with one seed.
    """
    by_arm: dict[str, dict[int, ScoredChoice]] = {}
    for one in scored:
        by_arm.setdefault(one.arm, {})[one.seed] = one
    found = []
    for arm, seeds in by_arm.items():
        others = by_arm[rivals[arm]] if arm in rivals else {}
        for name in WORDS:
            differences = [
                one.scores[name] - others[seed].scores[name]
                for seed, one in seeds.items()
                if seed in others and name in one.scores and name in others[seed].scores
            ]
            if differences:
                error = stdev(differences) / sqrt(len(differences)) if differences[1:] else None
                found.append(
                    Compared(
                        arm=arm,
                        score=name,
                        difference=fmean(differences),
                        stderr=error,
                        num_seeds=len(differences),
                    )
                )
    return tuple(found)


def verdict(
    summary: Mapping[str, Mapping[str, Summary]],
    compared: Iterable[Compared],
    other: str,
    rivals: Mapping[str, str],
) -> str:
    """A line for each score and one of all of them, which follow from the figures by rule.

    Args:
        other: The arm that is told beside the best one.
        rivals: Arm -> the arm that it was compared with.
    """
    compared = [one for one in compared if one.arm != START]
    tells = any(one.num_seeds >= MIN_SEEDS for one in compared)
    lines = []
    for name, (words, unit) in WORDS.items():
        values = {arm: found[name].mean for arm, found in summary.items() if name in found}
        if other not in values:
            continue
        best = (min if unit == "nats" else max)(values, key=values.__getitem__)
        before = values.get(START)
        told = [f"{_shown(values[best], unit)} with {best}, the best of {len(values)} arms"]
        if best != other:
            told.append(f"{_shown(values[other], unit)} with {other}")
        if before is not None:
            told.append(f"{_shown(before, unit)} before any training")
        sentences = [f"{words[0].upper()}{words[1:]}: {'; '.join(told)}."]
        ahead: dict[str, list[str]] = {}
        for one in compared:
            if one.score == name and one.told_apart and (one.difference > 0) == (unit == "share"):
                ahead.setdefault(rivals[one.arm], []).append(one.arm)
        for rival, arms in ahead.items():
            sentences.append(
                f"Ahead of {rival} by more than two standard errors: {', '.join(arms)}."
            )
        if tells and not ahead:
            sentences.append("No arm is ahead of its rival by more than two standard errors.")
        lines.append(" ".join(sentences))
    if not lines:
        return "Nothing was scored, so that nothing can be said."
    if tells:
        num_apart, expected = sum(one.told_apart for one in compared), told_by_chance(compared)
        lines.append(
            f"Of {len(compared)} comparisons of an arm with its rival {num_apart} lie beyond two "
            f"standard errors, for better or worse; chance alone puts about {expected:.0f} there."
        )
    elif compared:
        lines.append(f"With fewer than {MIN_SEEDS} seeds no arms are told apart.")
    return "\n".join(lines)


def told_by_chance(compared: Iterable[Compared]) -> float:
    """How many of some comparisons chance alone would put beyond two standard errors.

    Differences over n seeds, of arms that do not differ, over their standard error follow Student's
    t with n - 1 degrees of freedom: 18% lie beyond two of three seeds, 12% of five, 5% of many.
    """
    from scipy.stats import t  # type: ignore[import-untyped]

    counted = [one.num_seeds for one in compared if one.num_seeds >= MIN_SEEDS]
    return float(sum(2 * t.sf(2, num_seeds - 1) for num_seeds in counted))


def _shown(value: float, unit: Unit) -> str:
    return f"{value:.1%}" if unit == "share" else f"{value:.3f} nats"
