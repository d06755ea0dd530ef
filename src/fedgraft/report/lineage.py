"""A study of lineages as one HTML page: how each model was made, and what it can do.

Arms with a place on the axis are drawn as lines, the others beside them as dashed levels; a study
without lines is drawn as bars. What was not measured is shown as missing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedgraft.evaluation.scorecard import (
    FOLLOWED,
    RESPONSE_NATS,
    RIGHT_AND_FOLLOWED,
    Example,
)
from fedgraft.report import figures
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
    spaced,
    spread,
    took,
)
from fedgraft.study.comparison import in_words
from fedgraft.study.result import NEW_FACTS, OLD_FACTS, Comparison, Lineages, Summary

PALETTE = (
    figures.ORANGE,
    figures.SKY,
    figures.PURPLE,
    figures.SOFT,
    figures.INK,
    figures.VERMILION,
)
MAIN = (FOLLOWED, RIGHT_AND_FOLLOWED, NEW_FACTS, OLD_FACTS)
"""Scores that are drawn, where they were taken; and the study's own."""
LOGARITHMIC = 20
"""Ratio of the last place of a line to the first, from which its axis is logarithmic."""
AT_ONCE = 5
"""Models whose losses share a plot."""
OUTCOMES = {
    "holds": "should hold",
    "doubtful": "either way",
    "breaks": "will lose instructions",
    "open": "no forecast",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A model that was scored."""

    arm: str
    cells: tuple[Summary | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """What was forecast of a graft, and what came of it, over the seeds."""

    arm: str
    cells: tuple[str, ...]


def render(result: Lineages) -> str:
    """The page of a study of lineages."""
    main, finer = _columns(result)
    return fill(
        "lineage.html",
        *(duration, count, power, figure, score, spread, took, amount, in_words),
        result=result,
        colours=_colours(result),
        labels={},
        tiles=list(_tiles(result)),
        plots=list(_plots(result)),
        columns=[_words(name) for name in main],
        rows=list(_rows(result, main)),
        finer=[_words(name) for name in finer],
        finer_rows=list(_rows(result, finer)),
        num_seeds=max((d.num_seeds for c in result.comparisons if (d := c.difference)), default=1),
        compared_columns=[_words(name) for name in grid(result.comparisons)],
        compared=_compared(result),
        apart=_apart(result),
        promises=list(_promises(result)),
        training=list(_training(result)),
        examples=_examples(result),
        settings=list(flatten(result.settings)),
        **of_study(result),
    )


def _words(name: str) -> str:
    """A score's name in words; answers of examples by their name, benchmarks by theirs."""
    kind, _, rest = name.partition("/")
    if kind == "benchmark":
        return spaced(rest.replace("/", ", ", 1).replace("/", ": "))
    examples = name.removeprefix(f"{RESPONSE_NATS}/")
    return score_words(name) if examples == name else f"answers of {examples}, nats per token"


def _colours(result: Lineages) -> dict[str, str]:
    """Of the arms: those of a line share one, well-known arms and lines keep theirs."""
    lines = {arm: line for line, points in result.lines.items() for _, arm in points}
    others = [arm.arm for arm in result.arms if arm.arm not in lines]
    known = COLOURS | {LABELS[arm]: colour for arm, colour in COLOURS.items()}
    unknown = [group for group in (*result.lines, *others) if group not in known]
    known |= {group: PALETTE[n % len(PALETTE)] for n, group in enumerate(unknown)}
    return {arm.arm: known[lines.get(arm.arm, arm.arm)] for arm in result.arms}


def _tiles(result: Lineages) -> Iterator[Tile]:
    """The best arm, the one that others are compared with or else the ends of the other lines,
    then the first that are scored."""
    values = {
        arm: found[result.score] for arm, found in result.summary.items() if result.score in found
    }
    if not values:
        return
    unit = next(iter(values.values())).unit
    best = (max if unit == "share" else min)(values, key=lambda arm: values[arm].mean)
    lines = [[arm for _, arm in points] for points in result.lines.values()]
    ends = [line[-1] for line in lines if best not in line]
    told = [result.against] if result.against else ends
    shown = [best, *told, *(arm.arm for arm in result.arms)]
    for arm in list(dict.fromkeys(name for name in shown if name in values))[:4]:
        value = f"{values[arm].mean:.0%}" if unit == "share" else f"{values[arm].mean:.3f}"
        words = f"{_words(result.score)}: {arm}"
        yield Tile(value=value, words=words, colour=_colours(result)[arm])


def _plots(result: Lineages) -> Iterator[Plot]:
    for name in dict.fromkeys((result.score, *MAIN)):
        if any(name in scores for scores in result.summary.values()):
            title = _words(name)
            yield Plot(
                title=f"{title[0].upper()}{title[1:]}",
                svg=_curve(result, name) if result.lines else _bars(result, name),
                caption=_caption(result, name),
            )


def _caption(result: Lineages, name: str) -> str:
    better = "higher is better" if _is_share(result, name) else "lower is better"
    if result.lines:
        return (
            "A line is the mean over seeds, its band goes from the lowest to the highest; a dashed "
            f"line is a model beside it. {better.capitalize()}."
        )
    return f"A bar is the mean over seeds, a dot is one seed; {better}."


def _is_share(result: Lineages, name: str) -> bool:
    return next(s[name].unit == "share" for s in result.summary.values() if name in s)


def _bars(result: Lineages, name: str) -> str:
    share = _is_share(result, name)
    rows = []
    for arm in result.arms:
        values = [card.value(name) for card in arm.scorecards]
        known = [value if value is None or not share else 100 * value for value in values]
        rows.append(Series(name=arm.arm, colour=_colours(result)[arm.arm], x=known))
    return figures.bars(rows) if share else figures.dots(rows)


def _curve(result: Lineages, name: str) -> str:
    share = _is_share(result, name)
    scale = 100 if share else 1
    series, on_lines = [], set()
    for line, points in result.lines.items():
        found = [result.summary.get(arm, {}).get(name) for _, arm in points]
        on_lines |= {arm for _, arm in points}
        series.append(
            Series(
                name=line,
                colour=_colours(result)[points[0][1]],
                x=[at for at, _ in points],
                y=[scale * one.mean if one else None for one in found],
                low=[scale * one.lowest if one else None for one in found],
                high=[scale * one.highest if one else None for one in found],
            )
        )
    levels = [
        Series(name=arm.arm, colour=_colours(result)[arm.arm], x=(), y=(scale * known.mean,))
        for arm in result.arms
        if arm.arm not in on_lines and (known := result.summary.get(arm.arm, {}).get(name))
    ]
    places = [at for points in result.lines.values() for at, _ in points]
    wide = min(places) > 0 and max(places) >= LOGARITHMIC * min(places)
    return figures.curves(
        series,
        levels=levels,
        x_label=result.axis,
        y_label="%" if share else "nats per token",
        y_range=(0, 100) if share else None,
        logarithmic=wide,
    )


def _columns(result: Lineages) -> tuple[list[str], list[str]]:
    """Names of scores: the main ones, then those by group and in bits."""
    names = list(dict.fromkeys(name for found in result.summary.values() for name in found))
    main = [
        name
        for name in names
        if name in SCORE_WORDS
        or name.endswith("/nats_per_token")
        or name.startswith("response/")
        or (name.startswith("benchmark/") and name.count("/") == 2)
    ]
    main.sort(key=lambda name: (name != result.score, name not in MAIN))
    return main, [name for name in names if name not in main]


def _rows(result: Lineages, names: Sequence[str]) -> Iterator[Row]:
    for arm in result.arms:
        found = result.summary.get(arm.arm, {})
        yield Row(arm=arm.arm, cells=tuple(found.get(name) for name in names))


def _compared(result: Lineages) -> dict[str, list[Comparison]]:
    """Arm -> its comparison by each score, those of the grid in turn."""
    found: dict[str, list[Comparison]] = {}
    for pairs in grid(result.comparisons).values():
        for (arm, _), one in pairs.items():
            found.setdefault(arm, []).append(one)
    return found


def _apart(result: Lineages) -> Plot | None:
    """The differences by the study's score, a row a model."""
    words = f"{_words(result.score)}, against {result.against}"
    return apart_plot(
        [one for one in result.comparisons if one.score == result.score],
        {words: figures.BLUE},
        series_of=lambda _: words,
        group_of=lambda one: one.arm,
    )


def _promises(result: Lineages) -> Iterator[Promise]:
    """A row for each graft: figures of the first seed, the outcome and what was kept of all."""
    for arm in dict.fromkeys(one.arm for one in result.forecasts):
        ours = [one for one in result.forecasts if one.arm == arm]
        first = ours[0]
        kept = [f"{one.kept:.0%}" for one in ours if one.kept is not None]
        yield Promise(
            arm=arm,
            cells=(
                f"{first.residual} on {first.target}",
                f"{first.relative_norm:.1%}",
                "missing" if first.effective_rank is None else f"{first.effective_rank:.1f}",
                _percent(first.residual_strength),
                _percent(first.strength),
                ", ".join(dict.fromkeys(OUTCOMES[one.outcome] for one in ours)),
                ", ".join(kept) or "missing",
            ),
        )


def _percent(value: float | None) -> str:
    return "missing" if value is None else f"{value:.1%}"


def _training(result: Lineages) -> Iterator[Plot]:
    """Losses, a colour a model, a line a seed, some models at a time."""
    models: dict[str, list[str]] = {}
    for stage in result.losses:
        models.setdefault(stage.rpartition(", seed ")[0] or stage, []).append(stage)
    names = list(models)
    for first in range(0, len(names), AT_ONCE):
        some = names[first : first + AT_ONCE]
        series = [
            Series(
                name=name,
                colour=figures.WHEEL[number % len(figures.WHEEL)],
                x=[step for step, _ in result.losses[stage]],
                y=[loss for _, loss in result.losses[stage]],
            )
            for number, name in enumerate(some)
            for stage in models[name]
        ]
        yield Plot(
            title=f"Loss: {', '.join(some)}",
            svg=figures.lines(series, x_label="step", y_label="loss, nats per token"),
            caption="Training loss; a line a seed. Of tuning, on answers alone.",
        )


def _examples(result: Lineages) -> list[tuple[str, list[tuple[str, Example]]]]:
    """Prompts with the answer of each arm's first seed."""
    answers: dict[str, list[tuple[str, Example]]] = {}
    for arm in result.arms:
        for example in arm.scorecards[0].examples if arm.scorecards else ():
            answers.setdefault(example.prompt, []).append((arm.arm, example))
    return list(answers.items())
