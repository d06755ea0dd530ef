"""A study's result as one HTML page: no outside links, nothing to install, same result, same bytes.

The page says first what came out, then by how much, then how it was made. What was not measured is
shown as missing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import expm1
from pathlib import Path
from statistics import fmean
from typing import Any

from fedgraft.evaluation.scorecard import FOLLOWED, RIGHT_AND_FOLLOWED, Example
from fedgraft.report import figures
from fedgraft.report.figures import Series
from fedgraft.report.template import fill
from fedgraft.study.result import Result, Summary

PAGE = "report.html"
NEW_FACTS = "knowledge/asked/new"
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
    "knowledge/asked": "facts known, asked in chat",
    NEW_FACTS: "new facts known, asked in chat",
    "knowledge/asked/old": "old facts known, asked in chat",
    "knowledge/recall": "facts known, as text to complete",
    "knowledge/recall/new": "new facts known, as text to complete",
    "knowledge/recall/old": "old facts known, as text to complete",
}

ScoreRows = list[tuple[str, list[Summary | None]]]


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


def write_report(directory: Path) -> Path:
    """Draw the `result.json` of a study as `report.html` beside it.

    Raises ReportError where the result is missing or of another version.
    """
    page = directory / PAGE
    partial = page.with_suffix(".partial")
    partial.write_text(render(Result.load(directory)), encoding="utf-8")
    return partial.rename(page)


def render(result: Result) -> str:
    """The page of a result."""
    return fill(
        "template.html",
        *(duration, count, power, score, spread, figure),
        result=result,
        labels=LABELS,
        colours=COLOURS,
        tiles=list(_tiles(result)),
        plots=list(_plots(result)),
        tables=_score_tables(result),
        adapters=_adapter_rows(result),
        merging=_merging_rows(result),
        examples=_examples(result),
        settings=list(_flatten(result.settings)),
        num_seeds=len(result.scales),
    )


def _tiles(result: Result) -> Iterator[Tile]:
    """How well each arm follows and knows; where that was not asked, the change in perplexity."""
    asked = [
        ("instruct", FOLLOWED, "of the prompts are followed in full by the instruct model"),
        ("s1", FOLLOWED, "by the same model once it has read the new text itself (S1)"),
        ("graft", FOLLOWED, "by the graft: the newer base plus the residual"),
        ("graft", NEW_FACTS, "of the new facts are known to the graft, asked in chat"),
    ]
    for arm, name, words in asked:
        if summary := result.summary.get(arm, {}).get(name):
            yield Tile(value=f"{summary.mean:.0%}", words=words, colour=COLOURS[arm])
    if FOLLOWED not in result.summary["graft"]:
        for arm in ("instruct", "s1", "graft"):
            known = [value for value in _changes(result, arm) if value is not None]
            if known:
                words = f"{LABELS[arm]}: perplexity on the departments' text, against the base"
                yield Tile(value=f"{fmean(known):+.1f}%", words=words, colour=COLOURS[arm])


def _plots(result: Result) -> Iterator[Plot]:
    yield from _arm_plots(result)
    if _departments(result):
        yield _perplexity_plot(result)
    if any(len(curve.points) > 1 for curve in result.scales):
        yield _scale_plot(result)
    if result.losses:
        yield _loss_plot(result)
    yield from _cost_plots(result)


def _arm_plots(result: Result) -> Iterator[Plot]:
    """A plot for each of the main questions that was asked of any arm."""
    instruct = result.summary.get("instruct", {}).get(FOLLOWED)
    kept = 90 * instruct.mean if instruct else None
    questions = [
        (
            FOLLOWED,
            "Forgetting, and the graft",
            "Share of held-out prompts whose every instruction is met, checked by program. "
            "The dashed line is 90% of what the instruct model follows.",
            kept,
        ),
        (
            NEW_FACTS,
            "New knowledge",
            "Share of plain questions about new facts that are answered right, asked in chat. "
            "Base models are not made for chat.",
            None,
        ),
        (
            RIGHT_AND_FOLLOWED,
            "Right, and as instructed",
            "Share of held-out prompts with the right fact in the form that was asked for.",
            None,
        ),
    ]
    for name, title, caption, target in questions:
        if any(name in scores for scores in result.summary.values()):
            series = [
                Series(
                    name=LABELS[arm.arm],
                    colour=COLOURS[arm.arm],
                    x=[
                        100 * value if (value := card.value(name)) is not None else None
                        for card in arm.scorecards
                    ],
                )
                for arm in result.arms
            ]
            yield Plot(title=title, svg=figures.bars(series, target=target), caption=caption)


def _departments(result: Result) -> list[str]:
    names = result.summary.get("base", {})
    return [name.split("/")[1] for name in names if name.endswith("/nats_per_token")]


def _changes(result: Result, arm: str) -> list[float | None]:
    """Perplexity of an arm against the base as it came, in percent, department by department."""
    changes: list[float | None] = []
    for department in _departments(result):
        name = f"perplexity/{department}/nats_per_token"
        before, after = (result.summary.get(one, {}).get(name) for one in ("base", arm))
        changes.append(100 * expm1(after.mean - before.mean) if before and after else None)
    return changes


def _adapter_changes(result: Result) -> list[float | None]:
    """The same for each department's own adapter over the graft."""
    changes: list[float | None] = []
    for department in _departments(result):
        nats = [a.nats_per_token_after for a in result.adapters if a.department == department]
        before = result.summary["base"].get(f"perplexity/{department}/nats_per_token")
        changes.append(100 * expm1(fmean(nats) - before.mean) if before and nats else None)
    return changes


def _perplexity_plot(result: Result) -> Plot:
    series = [
        Series(name=LABELS[arm.arm], colour=COLOURS[arm.arm], x=_changes(result, arm.arm))
        for arm in result.arms
        if arm.arm != "base"
    ]
    if result.adapters:
        colour, changes = figures.ORANGE, _adapter_changes(result)
        series.append(Series(name="graft + adapter", colour=colour, x=changes))
    return Plot(
        title="How well each department's text is predicted",
        svg=figures.changes(series, [_spaced(name) for name in _departments(result)]),
        caption="Change in perplexity on held-out documents against the base as it came; further "
        "left is better.",
    )


def _scale_plot(result: Result) -> Plot:
    metrics = dict.fromkeys((FOLLOWED, NEW_FACTS, result.scales[0].metric))
    colours = (figures.BLUE, figures.ORANGE, figures.GREEN)
    series = []
    for name, colour in zip(metrics, colours, strict=False):
        points: dict[float, list[float]] = {}
        for curve in result.scales:
            for point in curve.points:
                if name in point.scores:
                    points.setdefault(point.scale, []).append(100 * point.scores[name])
        series.append(
            Series(
                name=SCORE_WORDS.get(name, name),
                colour=colour,
                x=list(points),
                y=[fmean(found) for found in points.values()],
            )
        )
    chosen = ", ".join(f"{scale:g}" for scale in sorted({c.chosen for c in result.scales}))
    return Plot(
        title="How much of the residual to add",
        svg=figures.lines(
            series,
            x_label="scale on the residual",
            y_label="%",
            chosen=sorted({curve.chosen for curve in result.scales}),
        ),
        caption=f"Scores on the validation split by scale, mean over seeds. Chosen: {chosen}, the "
        f"best by “{SCORE_WORDS.get(result.scales[0].metric, result.scales[0].metric)}”. Test "
        "material took no part in it.",
    )


MERGING_SCORES = (FOLLOWED, RIGHT_AND_FOLLOWED, NEW_FACTS)


def _merging_rows(result: Result) -> list[tuple[str, str, str, list[Summary | None]]]:
    """(name, words, scales chosen, test scores) for each way to add the residual, plain first."""
    if not result.merging:
        return []
    ways = {
        "graft": ("plain addition", result.scales, result.summary["graft"]),
        **{
            way: (found.words, found.scales, found.summary) for way, found in result.merging.items()
        },
    }
    return [
        (
            way,
            words,
            ", ".join(f"{curve.chosen:g}" for curve in scales),
            [summary.get(name) for name in MERGING_SCORES],
        )
        for way, (words, scales, summary) in ways.items()
    ]


def _loss_plot(result: Result) -> Plot:
    """Continued pre-training of both sides; a colour an arm, a line a seed."""
    series = []
    for stage, points in result.losses.items():
        arm = stage.partition(",")[0]
        if arm in LABELS:
            series.append(
                Series(
                    name=LABELS[arm],
                    colour=COLOURS[arm],
                    x=[step for step, _ in points],
                    y=[loss for _, loss in points],
                )
            )
    return Plot(
        title="Reading the new text",
        svg=figures.lines(series, x_label="step", y_label="loss, nats per token"),
        caption="Training loss of both sides on the same rows in the same order; a line a seed.",
    )


def _cost_plots(result: Result) -> Iterator[Plot]:
    """Instruction tuning again, continued pre-training, a graft: operations, then time."""
    tuning, costs = "instruction tuning again", result.tuning
    names = {
        "tuning_flops": (tuning, figures.VERMILION),
        "pretraining_flops": ("continued pre-training", figures.PURPLE),
        "graft_flops": ("graft", figures.GREEN),
    }
    bars = [
        Series(name=words, colour=colour, x=[costs.get(key)])
        for key, (words, colour) in names.items()
    ]
    ratio = f" Tuning costs {costs['ratio']:,.4g} times the reading." if "ratio" in costs else ""
    yield Plot(
        title="What it costs, in operations",
        svg=figures.magnitudes(bars, power),
        caption="Floating-point operations: 6 x parameters x tokens x epochs for training (arXiv "
        f"2410.10739), 2 x parameters for a graft. Logarithmic.{ratio}",
    )
    reading = [c.seconds for c in result.costs if c.stage.startswith("pretrained_base")]
    grafting = [c.seconds for c in result.costs if c.stage.startswith("graft")]
    seconds = [
        fmean(reading) * costs["ratio"] if "ratio" in costs and reading else None,
        fmean(reading) if reading else None,
        fmean(grafting) if grafting else None,
    ]
    words = [f"{tuning} (estimate)", "continued pre-training", "graft"]
    yield Plot(
        title="What it costs, in time",
        svg=figures.magnitudes(
            [
                Series(name=name, colour=bar.colour, x=[value])
                for name, bar, value in zip(words, bars, seconds, strict=True)
            ],
            duration,
        ),
        caption="Measured on the machine that ran the study, mean over seeds; tuning is estimated "
        "from the measured speed and the formula. Logarithmic.",
    )


def _score_tables(result: Result) -> dict[str, ScoreRows]:
    """Every score in words, with each arm's summary: the main ones, then the finer ones."""
    tables: dict[str, ScoreRows] = {"main": [], "finer": []}
    for name in dict.fromkeys(name for scores in result.summary.values() for name in scores):
        is_main = name in SCORE_WORDS or name.endswith("/nats_per_token")
        summaries = [result.summary.get(arm.arm, {}).get(name) for arm in result.arms]
        tables["main" if is_main else "finer"].append((score_words(name), summaries))
    return tables


def _adapter_rows(result: Result) -> list[tuple[str, list[str | None]]]:
    """Each department's figures before and after its adapter, mean over seeds."""
    rows: list[tuple[str, list[str | None]]] = []
    for department in dict.fromkeys(adapter.department for adapter in result.adapters):
        ours = [adapter for adapter in result.adapters if adapter.department == department]
        nats = [
            fmean(adapter.nats_per_token_before for adapter in ours),
            fmean(adapter.nats_per_token_after for adapter in ours),
        ]
        shares = [
            [share for adapter in ours if (share := adapter.followed_before) is not None],
            [share for adapter in ours if (share := adapter.followed_after) is not None],
        ]
        cells = [f"{value:.3f}" for value in nats]
        followed = [f"{fmean(known):.1%}" if known else None for known in shares]
        change = f"{100 * expm1(nats[1] - nats[0]):+.1f}%"
        rows.append((_spaced(department), [*cells, change, *followed]))
    return rows


def _examples(result: Result) -> list[tuple[str, list[tuple[str, Example]]]]:
    """Prompts with the answer of each arm's first seed."""
    answers: dict[str, list[tuple[str, Example]]] = {}
    for arm in result.arms:
        for example in arm.scorecards[0].examples if arm.scorecards else ():
            answers.setdefault(example.prompt, []).append((arm.arm, example))
    return list(answers.items())


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as `a.b` and value; of a path only its end is shown."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}.")
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


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def score_words(name: str) -> str:
    """A score's name in words: a known one, a known one of a group, or a department's text."""
    if name in SCORE_WORDS:
        return SCORE_WORDS[name]
    kind, _, rest = name.partition("/")
    known, _, group = name.rpartition("/")
    match kind:
        case "perplexity":
            department, _, unit = rest.partition("/")
            return f"{_spaced(department)} text, {_spaced(unit)}"
        case "response":
            return f"answers of held-out dialogues, {_spaced(rest)}"
    return f"{SCORE_WORDS.get(known, _spaced(known))}: {_spaced(group)}"


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


def count(number: float) -> str:
    """`2.4M`, `400k`, `17`."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:g}"


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
