"""A study's result as one HTML page: no outside links, nothing to install, same result, same bytes.

The page says first what came out, then by how much, then how it was made. What was not measured is
shown as missing.
"""

from collections.abc import Iterator
from math import expm1
from pathlib import Path
from statistics import fmean

from fedgraft.evaluation.scorecard import FOLLOWED, RIGHT_AND_FOLLOWED, Example
from fedgraft.report import departments, figures, forgetting, lineage, selection
from fedgraft.report.compared import apart_plot, grid
from fedgraft.report.figures import Series
from fedgraft.report.tables import of_study
from fedgraft.report.template import fill
from fedgraft.report.words import (
    COLOURS,
    LABELS,
    SCORE_WORDS,
    Plot,
    Tile,
    amount,
    count,
    duration,
    figure,
    flatten,
    power,
    score,
    score_words,
    size,
    spaced,
    spread,
    took,
)
from fedgraft.study.comparison import in_words
from fedgraft.study.result import (
    NEW_FACTS,
    Comparison,
    Departments,
    Federation,
    Forgetting,
    Lineages,
    Result,
    Selections,
    Summary,
    Whichever,
    load_result,
)

PAGE = "report.html"

ScoreRows = list[tuple[str, list[Summary | None]]]


def write_report(directory: Path) -> Path:
    """Draw the `result.json` of a study as `report.html` beside it.

    Raises ReportError where the result is missing or of another version.
    """
    page = directory / PAGE
    partial = page.with_suffix(".partial")
    partial.write_text(render(load_result(directory)), encoding="utf-8")
    return partial.rename(page)


def render(result: Whichever) -> str:
    """The page of a result of any kind."""
    match result:
        case Forgetting():
            return forgetting.render(result)
        case Departments():
            return departments.render(result)
        case Federation():
            return departments.render_federation(result)
        case Selections():
            return selection.render(result)
        case Lineages():
            return lineage.render(result)
        case Result():
            return _of_arms(result)


def _of_arms(result: Result) -> str:
    return fill(
        "template.html",
        *(duration, count, power, score, spread, figure, size, in_words, took, amount),
        result=result,
        labels=LABELS,
        colours=COLOURS,
        tiles=list(_tiles(result)),
        plots=list(_plots(result)),
        pairs=_pairs(result),
        compared=_compared(result),
        apart=_apart_plot(result),
        tables=_score_tables(result),
        adapters=_adapter_rows(result),
        merging=_merging_rows(result),
        merging_plot=_merging_plot(result),
        examples=_examples(result),
        settings=list(flatten(result.settings)),
        num_seeds=len(result.scales),
        **of_study(result),
        **departments.sections(result.federations, None),
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
        svg=figures.changes(series, [spaced(name) for name in _departments(result)]),
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


def _pairs(result: Result) -> list[tuple[str, str]]:
    """The arms that are compared, in words."""
    pairs = dict.fromkeys((one.arm, one.against) for one in result.comparisons)
    return [(LABELS[arm], LABELS[against]) for arm, against in pairs]


def _compared(result: Result) -> list[tuple[str, list[Comparison]]]:
    """Each score in words, with its comparison for each of the pairs."""
    rows = grid(result.comparisons).items()
    return [(score_words(name), list(row.values())) for name, row in rows]


def _apart_plot(result: Result) -> Plot | None:
    """The differences of shares, a colour a pair; None where nothing was asked."""
    asked = [one for one in result.comparisons if one.unit == "share"]
    wheel = (figures.GREEN, figures.BLUE, figures.VERMILION)

    def pair(one: Comparison) -> str:
        return f"{LABELS[one.arm]} against {LABELS[one.against]}"

    return apart_plot(
        asked,
        dict(zip(dict.fromkeys(map(pair, asked)), wheel, strict=False)),
        series_of=pair,
        group_of=lambda one: score_words(one.score),
    )


MERGING_SCORES = (FOLLOWED, RIGHT_AND_FOLLOWED, NEW_FACTS)
MergingRow = tuple[str, str, str, list[Summary | None], Comparison | None]


def _merging_rows(result: Result) -> list[MergingRow]:
    """(name, words, scales chosen, test scores, prompts followed against plain addition) for each
    way to add the residual; plain first, which is compared with nothing."""
    if not result.merging:
        return []
    ways = {
        "graft": ("plain addition", result.scales, result.summary["graft"], ()),
        **{
            way: (found.words, found.scales, found.summary, found.comparisons)
            for way, found in result.merging.items()
        },
    }
    return [
        (
            way,
            words,
            ", ".join(f"{curve.chosen:g}" for curve in scales),
            [summary.get(name) for name in MERGING_SCORES],
            next((one for one in comparisons if one.score == FOLLOWED), None),
        )
        for way, (words, scales, summary, comparisons) in ways.items()
    ]


def _merging_plot(result: Result) -> Plot | None:
    """Each way against plain addition, a colour a score."""
    colours = (figures.BLUE, figures.GREEN, figures.ORANGE)
    return apart_plot(
        [
            one
            for found in result.merging.values()
            for name in MERGING_SCORES
            for one in found.comparisons
            if one.score == name
        ],
        {SCORE_WORDS[name]: c for name, c in zip(MERGING_SCORES, colours, strict=True)},
        series_of=lambda one: SCORE_WORDS[one.score],
        group_of=lambda one: one.arm,
    )


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
        rows.append((spaced(department), [*cells, change, *followed]))
    return rows


def _examples(result: Result) -> list[tuple[str, list[tuple[str, Example]]]]:
    """Prompts with the answer of each arm's first seed."""
    answers: dict[str, list[tuple[str, Example]]] = {}
    for arm in result.arms:
        for example in arm.scorecards[0].examples if arm.scorecards else ():
            answers.setdefault(example.prompt, []).append((arm.arm, example))
    return list(answers.items())
