"""Scores of several arms and seeds to means, claims and a verdict in words."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from fedgraft.evaluation.gate import Decision
from fedgraft.evaluation.scorecard import FOLLOWED, RIGHT_AND_FOLLOWED, Scorecard
from fedgraft.study.result import Claim, Summary

Summaries = Mapping[str, Mapping[str, Summary]]


def summarise(scorecards: Iterable[Scorecard]) -> dict[str, dict[str, Summary]]:
    """Arm -> score -> mean and spread over the seeds that have the score."""
    values: dict[str, dict[str, list[float]]] = {}
    units = {}
    for card in scorecards:
        for name, score in card.scores.items():
            values.setdefault(card.arm, {}).setdefault(name, []).append(score.value)
            units[name] = score.unit
    return {
        arm: {
            name: Summary(
                mean=statistics.fmean(found),
                lowest=min(found),
                highest=max(found),
                stdev=statistics.stdev(found) if len(found) > 1 else None,
                num_seeds=len(found),
                unit=units[name],
            )
            for name, found in scores.items()
        }
        for arm, scores in values.items()
    }


def check_claims(summaries: Summaries) -> tuple[Claim, ...]:
    """The claims of instruction residuals, each against its bar; only those that were measured."""

    def mean(arm: str, score: str) -> float | None:
        found = summaries.get(arm, {}).get(score)
        return found.mean if found else None

    def spread(arm: str, score: str) -> str:
        found = summaries[arm][score]
        shown = f"{found.mean:.0%}"
        if found.num_seeds > 1:
            shown += f" ({found.lowest:.0%} to {found.highest:.0%} over {found.num_seeds} seeds)"
        return shown

    claims = []
    instruct, base = mean("instruct", FOLLOWED), mean("base", FOLLOWED)
    s1, graft = mean("s1", FOLLOWED), mean("graft", FOLLOWED)
    if instruct is not None:
        claims.append(
            Claim(
                text="The instruct model follows the instructions",
                target="at least 90%",
                measured=spread("instruct", FOLLOWED),
                reached=instruct >= 0.9,
            )
        )
    if base is not None:
        claims.append(
            Claim(
                text="The base model does not",
                target="under 10%",
                measured=spread("base", FOLLOWED),
                reached=base < 0.1,
            )
        )
    if instruct is not None and s1 is not None:
        claims.append(
            Claim(
                text="Pre-training the instruct model further (S1) makes it forget them",
                target="at least 20 points lost",
                measured=f"{100 * (instruct - s1):.0f} points lost: {spread('s1', FOLLOWED)}",
                reached=instruct - s1 >= 0.2,
            )
        )
    if instruct and graft is not None:
        claims.append(
            Claim(
                text="The graft keeps what the instruct model followed",
                target="at least 90% of it",
                measured=f"{graft / instruct:.0%} of it: {spread('graft', FOLLOWED)}",
                reached=graft >= 0.9 * instruct,
            )
        )
    known = mean("graft", "knowledge/asked/new")
    if known is not None:
        claims.append(
            Claim(
                text="The graft knows the new facts",
                target="at least 50%",
                measured=spread("graft", "knowledge/asked/new"),
                reached=known >= 0.5,
            )
        )
    both_graft, both_s1 = mean("graft", RIGHT_AND_FOLLOWED), mean("s1", RIGHT_AND_FOLLOWED)
    if both_graft is not None and both_s1 is not None:
        claims.append(
            Claim(
                text="The graft beats S1 on answers that are right and as instructed",
                target="by at least 20 points",
                measured=(
                    f"by {100 * (both_graft - both_s1):.0f} points: "
                    f"{spread('graft', RIGHT_AND_FOLLOWED)} against "
                    f"{spread('s1', RIGHT_AND_FOLLOWED)}"
                ),
                reached=both_graft - both_s1 >= 0.2,
            )
        )
    return tuple(claims)


def verdict(summaries: Summaries, claims: Sequence[Claim], decisions: Sequence[Decision]) -> str:
    """A few sentences that a manager can act on."""
    sentences = []
    if "graft" in summaries and FOLLOWED in summaries["graft"]:
        graft, s1 = summaries["graft"][FOLLOWED].mean, summaries["s1"][FOLLOWED].mean
        sentences.append(
            f"After the new text, the graft follows {graft:.0%} of the instructions; the instruct "
            f"model that read the same text itself follows {s1:.0%}."
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
