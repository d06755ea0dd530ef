"""What the pages of results share: names and colours of arms, scores in words, figures as told."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgraft.evaluation.benchmarks import PAPER_ROWS
from fedgraft.evaluation.scorecard import (
    FOLLOWED,
    RESPONSE_NATS,
    RIGHT_AND_FOLLOWED,
    ROUGE_L,
    ROUGE_L_LEGACY,
)
from fedgraft.report import figures
from fedgraft.study.cost import Estimate
from fedgraft.study.result import NEW_FACTS, OLD_FACTS, Found, Summary

BENCHMARKS = {name: " ".join(row) for row, name in PAPER_ROWS.items()}
"""Scores of benchmarks in the paper's words."""
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

LABELS = {
    "base": "base",
    "instruct": "instruct",
    "s1": "S1",
    "pretrained_base": "newer base",
    "graft": "graft",
}
COLOURS = {
    "base": figures.GREY,
    "instruct": figures.BLUE,
    "s1": figures.VERMILION,
    "pretrained_base": figures.PURPLE,
    "graft": figures.GREEN,
}
SCORE_WORDS = {
    FOLLOWED: "prompts followed in full",
    "instructions/prompt_loose": "prompts followed, loosely read",
    "instructions/instruction_strict": "single instructions followed",
    "instructions/instruction_loose": "single instructions, loosely read",
    "instructions/right": "right, whatever the form",
    RIGHT_AND_FOLLOWED: "right and as instructed",
    "instructions/in_form": "in the form asked for, of right answers",
    "knowledge/asked": "facts known, asked in chat",
    NEW_FACTS: "new facts known, asked in chat",
    OLD_FACTS: "old facts known, asked in chat",
    "knowledge/recall": "facts known, as text to complete",
    "knowledge/recall/new": "new facts known, as text to complete",
    "knowledge/recall/old": "old facts known, as text to complete",
    RESPONSE_NATS: "answers of held-out dialogues, nats per token",
    ROUGE_L: "Rouge-L of answers",
    ROUGE_L_LEGACY: "Rouge-L of answers, legacy definition",
    **BENCHMARKS,
    "benchmark/gsm8k/in_form": "GSM8K in the form asked for, of right answers",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """A drawing, and what it shows in words."""

    title: str
    svg: str
    caption: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """A number that the eye meets first."""

    value: str
    words: str
    colour: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Took:
    """What work of one kind was thought to take, and took; None is missing."""

    work: str
    estimate: Estimate | None
    estimated: float | None
    """Seconds."""
    measured: float | None
    share: float | None
    """Of the machine's rate that was reached."""


EVERYTHING = "everything, scoring too"


def took(result: Found) -> list[Took]:
    """Each kind of training: estimated before the run, measured after it; then all stages."""
    estimates = {one.work: one for one in result.estimates}
    seconds: dict[str, float] = {}
    for cost in result.costs:
        if cost.work:
            seconds[cost.work] = seconds.get(cost.work, 0.0) + cost.seconds
    rows = []
    for work in dict.fromkeys((*estimates, *seconds)):
        estimate, measured = estimates.get(work), seconds.get(work)
        rows.append(
            Took(
                work=work,
                estimate=estimate,
                estimated=estimate.seconds if estimate else None,
                measured=measured,
                share=estimate.share_reached(measured) if estimate and measured else None,
            )
        )
    total = sum(cost.seconds for cost in result.costs)
    return [*rows, Took(work=EVERYTHING, estimate=None, estimated=None, measured=total, share=None)]


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as `a.b` and value; of a path only its end is shown."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield name, ", ".join(_shown(one) for one in value)
        else:
            yield name, _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, str) and Path(value).is_absolute():
        return "…/" + "/".join(Path(value).parts[-2:])
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {_shown(one)}" for key, one in value.items())
    return "none" if value is None else str(value)


def spaced(name: str) -> str:
    return name.replace("_", " ")


def score_words(name: str) -> str:
    """A score's name in words: a known one, a known one of a group, or a department's text."""
    if name in SCORE_WORDS:
        return SCORE_WORDS[name]
    kind, _, rest = name.partition("/")
    known, _, group = name.rpartition("/")
    if kind == "perplexity":
        department, _, unit = rest.partition("/")
        return f"{spaced(department)} text, {spaced(unit)}"
    return f"{SCORE_WORDS.get(known, spaced(known))}: {spaced(group)}"


def score(summary: Summary) -> str:
    """`93.1 %` or `2.310`."""
    return f"{summary.mean:.1%}" if summary.unit == "share" else f"{summary.mean:.3f}"


def spread(summary: Summary) -> str:
    """The standard deviation over seeds, in points or in the score's unit."""
    sd = summary.stdev or 0.0
    return f"{100 * sd:.1f}" if summary.unit == "share" else f"{sd:.3f}"


def figure(value: Any) -> str:
    """`2,360,000`, `0.173`."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def amount(value: float) -> str:
    """`1,234.50`, `0.0037`: of money or energy, whatever is small told to two digits."""
    return f"{value:,.2f}" if value >= 1 else f"{value:.2g}"


def count(number: float) -> str:
    """`2.4M`, `400k`, `17`."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:g}"


def size(num_bytes: float) -> str:
    """`1.2 MB`."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def power(number: float) -> str:
    """`2.3 × 10¹³`."""
    mantissa, _, exponent = f"{number:.1e}".partition("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(SUPERSCRIPT)}"


def duration(seconds: float) -> str:
    """`0.4 s`, `2 min 05 s`, `3 h 20 min`, `12 days`."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours / 24:,.0f} days"
