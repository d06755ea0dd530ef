"""A study of forgetting as one HTML page: what is followed and known, against tokens read.

A panel for each learning rate and share of replay; a line is the mean over seeds, its band goes
from the lowest to the highest. What was not measured is shown as missing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedgraft.evaluation.scorecard import FOLLOWED, RIGHT_AND_FOLLOWED
from fedgraft.report import figures
from fedgraft.report.compared import grid
from fedgraft.report.figures import Series
from fedgraft.report.template import fill
from fedgraft.report.words import (
    COLOURS,
    LABELS,
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
    spread,
    took,
)
from fedgraft.study.comparison import PAIRS, in_words
from fedgraft.study.cost import graft_flops, training_flops
from fedgraft.study.result import (
    CURVE_ARMS,
    FORGOTTEN,
    NEW_FACTS,
    OLD_FACTS,
    TEXT,
    Comparison,
    CurvePoint,
    Forgetting,
    Summary,
    Way,
)

TITLES = {
    FOLLOWED: (
        "Instructions followed",
        "Share of held-out prompts whose every instruction is met, checked by program.",
    ),
    OLD_FACTS: (
        "Old facts",
        "Share of plain questions about what the family knew before that are answered right in "
        "chat. The newer base was never made for chat.",
    ),
    NEW_FACTS: (
        "New facts",
        "Share of plain questions about the new text that are answered right in chat.",
    ),
    RIGHT_AND_FOLLOWED: (
        "Right, and as instructed",
        "Share of held-out prompts with the right fact in the form that was asked for.",
    ),
    TEXT: (
        "Held-out new text",
        "Loss on held-out documents of the new text, in nats per token; lower is better.",
    ),
}
BEFORE = {"s1": "instruct", "pretrained_base": "base", "graft": "instruct"}
"""What an arm is before it has read anything."""


Row = tuple[str, tuple[Summary | float | None, ...]]
"""Tokens, and the score of each arm; a plain number where nothing was read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One score: its panels, and its figures."""

    name: str
    title: str
    caption: str
    panels: tuple[Plot, ...]
    groups: tuple[tuple[str, tuple[Row, ...]], ...]
    """The rows of each way, those where nothing was read first."""


def render(result: Forgetting) -> str:
    """The page of a study of forgetting."""
    return fill(
        "forgetting.html",
        *(duration, count, power, figure, shown, took, amount, in_words),
        result=result,
        labels=LABELS,
        colours=COLOURS,
        arms=CURVE_ARMS,
        tiles=list(_tiles(result)),
        sections=list(_sections(result)),
        shift=_shift_plot(result) if result.domains else None,
        domains=_domain_rows(result),
        compute=_compute_plot(result),
        pairs=[(LABELS[arm], LABELS[against]) for arm, against in PAIRS],
        compared=list(_compared(result)),
        most=max(_budgets(result), default=0),
        training=list(_training_plots(result)),
        settings=list(flatten(result.settings)),
    )


def shown(value: Summary | float | None, name: str = FOLLOWED) -> str:
    """`93.1% ± 0.4`; a plain number has no spread, and what is missing says so."""
    if value is None:
        return "missing"
    if isinstance(value, Summary):
        return score(value) + (f" ± {spread(value)}" if value.stdev is not None else "")
    return f"{value:.3f}" if name == TEXT else f"{value:.1%}"


def way_words(way: Way) -> str:
    """`learning rate 0.0004, no replay`."""
    return f"learning {way.words}"


def _ways(result: Forgetting) -> list[Way]:
    return list(dict.fromkeys(point.way for point in result.curves))


def _budgets(result: Forgetting) -> list[int]:
    return sorted({point.num_tokens for point in result.curves})


def _points(result: Forgetting, way: Way, arm: str) -> dict[int, CurvePoint]:
    return {
        point.num_tokens: point for point in result.curves if (point.way, point.arm) == (way, arm)
    }


def _tiles(result: Forgetting) -> Iterator[Tile]:
    """Following before, and after the most tokens, as the verdict tells it."""
    before = result.references.get("instruct", {}).get(FOLLOWED)
    if before is not None:
        words = "of the prompts are followed in full by the instruct model as it came"
        yield Tile(value=f"{before:.0%}", words=words, colour=COLOURS["instruct"])
    way, most = _main_way(result), max(_budgets(result), default=0)
    told = f"after {count(most)} tokens"
    for arm, name, words in (
        ("s1", FOLLOWED, f"still followed by S1, the same model, {told}"),
        ("graft", FOLLOWED, f"followed by the graft {told}"),
        ("graft", NEW_FACTS, f"of the new facts known to the graft {told}"),
    ):
        point = _points(result, way, arm).get(most)
        if point and name in point.scores:
            value = f"{point.scores[name].mean:.0%}"
            yield Tile(value=value, words=words, colour=COLOURS[arm])


def _main_way(result: Forgetting) -> Way:
    """The rate of the study's `pretrain`, without replay: the one that the verdict speaks of."""
    pretrain = result.settings.get("pretrain", {})
    ways = _ways(result)
    rate = pretrain.get("learning_rate")
    return next((way for way in ways if way == Way(learning_rate=rate, replay=0.0)), ways[0])


def _sections(result: Forgetting) -> Iterator[Section]:
    """One for each score that any point has."""
    for name, (title, caption) in TITLES.items():
        if any(name in point.scores for point in result.curves):
            yield Section(
                name=name,
                title=title,
                caption=caption,
                panels=tuple(_panel(result, name, way) for way in _ways(result)),
                groups=tuple(_groups(result, name)),
            )


def _panel(result: Forgetting, name: str, way: Way) -> Plot:
    scale = 1 if name == TEXT else 100
    budgets = _budgets(result)
    series = []
    for arm in CURVE_ARMS:
        points = _points(result, way, arm)
        found = [points[b].scores.get(name) if b in points else None for b in budgets]
        series.append(
            Series(
                name=LABELS[arm],
                colour=COLOURS[arm],
                x=budgets,
                y=[scale * one.mean if one else None for one in found],
                low=[scale * one.lowest if one else None for one in found],
                high=[scale * one.highest if one else None for one in found],
            )
        )
    levels = [
        Series(name=f"{LABELS[arm]} as it came", colour=COLOURS[arm], x=(), y=(scale * value,))
        for arm in ("instruct", "base")
        if (value := result.references.get(arm, {}).get(name)) is not None
    ]
    return Plot(
        title=way_words(way).capitalize(),
        svg=figures.curves(
            series,
            levels=levels,
            x_label="tokens read",
            y_label="nats per token" if name == TEXT else "%",
            y_range=_text_range(result) if name == TEXT else (0, 100),
        ),
        caption="",
    )


def _text_range(result: Forgetting) -> tuple[float, float]:
    """One range for all panels, so that they can be compared."""
    known = [p.scores[TEXT] for p in result.curves if TEXT in p.scores]
    before = [scores[TEXT] for scores in result.references.values() if TEXT in scores]
    low = min([one.lowest for one in known] + before)
    high = max([one.highest for one in known] + before)
    return max(0.0, low - 0.08 * (high - low)), high + 0.08 * (high - low)


def _groups(result: Forgetting, name: str) -> Iterator[tuple[str, tuple[Row, ...]]]:
    before = tuple(result.references.get(BEFORE[arm], {}).get(name) for arm in CURVE_ARMS)
    yield "as they came", (("0", before),)
    for way in _ways(result):
        found = [_points(result, way, arm) for arm in CURVE_ARMS]
        rows = []
        for budget in _budgets(result):
            points = [one.get(budget) for one in found]
            cells = tuple(point.scores.get(name) if point else None for point in points)
            rows.append((count(budget), cells))
        yield way_words(way), tuple(rows)


def _compared(result: Forgetting) -> Iterator[tuple[str, list[tuple[str, list[Comparison]]]]]:
    """Each way, with each score's comparison for each of the pairs."""
    for found in result.comparisons:
        rows = grid(found.comparisons).items()
        yield way_words(found.way), [(score_words(name), list(row.values())) for name, row in rows]


def _shift_plot(result: Forgetting) -> Plot:
    series = []
    for arm in ("s1", "graft"):
        lost = [domain.arms.get(arm, {}).get(FORGOTTEN) for domain in result.domains]
        series.append(
            Series(
                name=LABELS[arm],
                colour=COLOURS[arm],
                x=[domain.nats_per_token for domain in result.domains],
                y=[100 * one.mean if one else None for one in lost],
                low=[100 * one.lowest if one else None for one in lost],
                high=[100 * one.highest if one else None for one in lost],
            )
        )
    return Plot(
        title="Does a farther text cost more?",
        svg=figures.scatter(
            series,
            [domain.domain for domain in result.domains],
            x_label="nats per token of the base before reading: farther to the right",
            y_label="points of following lost",
        ),
        caption="Each text was read alone, without replay. A dot is the mean over seeds, its "
        "whisker goes from the lowest to the highest.",
    )


def _domain_rows(result: Forgetting) -> list[tuple[str, list[str]]]:
    """Nearest first: the shift, the loss on the text after reading it, and what was forgotten."""
    rows = []
    for domain in sorted(result.domains, key=lambda domain: domain.nats_per_token):
        arms = [domain.arms.get(arm, {}) for arm in ("s1", "graft")]
        cells = [count(domain.num_tokens), f"{domain.nats_per_token:.3f}"]
        cells += [shown(scores.get(TEXT)) for scores in arms]
        cells += [_lost(scores.get(FORGOTTEN)) for scores in arms]
        rows.append((domain.domain, cells))
    return rows


def _lost(lost: Summary | None) -> str:
    """Points of following, `-3.2 ± 1.1`; what was gained has a plus."""
    if lost is None:
        return "missing"
    told = f"{-100 * lost.mean:+.1f}"
    return told + (f" ± {spread(lost)}" if lost.stdev is not None else "")


def _compute_plot(result: Forgetting) -> Plot | None:
    """Following against the operations that reading took, as figure 2 of arXiv 2410.10739 is."""
    way, budgets = _main_way(result), _budgets(result)
    if not any(FOLLOWED in point.scores for point in result.curves):
        return None
    num_parameters = result.residual["num_parameters"]
    series = []
    for arm in CURVE_ARMS:
        points = _points(result, way, arm)
        found = [points[b].scores.get(FOLLOWED) if b in points else None for b in budgets]
        series.append(
            Series(
                name=LABELS[arm],
                colour=COLOURS[arm],
                x=[training_flops(num_parameters, budget) for budget in budgets],
                y=[100 * one.mean if one else None for one in found],
                low=[100 * one.lowest if one else None for one in found],
                high=[100 * one.highest if one else None for one in found],
            )
        )
    levels = [
        Series(name=f"{LABELS[arm]} as it came", colour=COLOURS[arm], x=(), y=(100 * value,))
        for arm in ("instruct", "base")
        if (value := result.references.get(arm, {}).get(FOLLOWED)) is not None
    ]
    return Plot(
        title="Score against compute",
        svg=figures.curves(
            series,
            levels=levels,
            x_label="FLOPs of continued pre-training, 6 × parameters × tokens",
            y_label="prompts followed, %",
            y_range=(0, 100),
            words=power,
        ),
        caption=f"{way_words(way).capitalize()}. Adding the residual takes "
        f"{power(graft_flops(num_parameters))} FLOPs more, two a parameter.",
    )


def _training_plots(result: Forgetting) -> Iterator[Plot]:
    """Loss by way, a line a seed; then the learning rates, where they were written down."""
    for way in _ways(result):
        series = []
        for stage, points in result.losses.items():
            arm, _, rest = stage.partition(", ")
            if rest.rpartition(", seed ")[0] == way.words:
                series.append(_steps(LABELS[arm], COLOURS[arm], points))
        if series:
            yield Plot(
                title=f"Loss: {way_words(way)}",
                svg=figures.lines(series, x_label="step", y_label="loss, nats per token"),
                caption="Of both sides on the same rows in the same order; a line a seed. With "
                "replay, old text is in it.",
            )
    rates: dict[str, Sequence[tuple[int, float]]] = {}
    for stage, points in result.learning_rates.items():
        arm, _, rest = stage.partition(", ")
        if points and arm == "s1" and rest.startswith("rate "):
            rates.setdefault(rest.split(", ")[0], points)
    colours = (figures.BLUE, figures.ORANGE, figures.GREEN, figures.PURPLE)
    if rates:
        drawn: Sequence[Series] = [
            _steps(name, colours[number % len(colours)], points)
            for number, (name, points) in enumerate(rates.items())
        ]
        yield Plot(
            title="Learning rate",
            svg=figures.lines(drawn, x_label="step", y_label="learning rate"),
            caption="Constant after its warm-up, so that a point does not depend on how far its "
            "run went on.",
        )


def _steps(name: str, colour: str, points: Sequence[tuple[int, float]]) -> Series:
    x, y = [step for step, _ in points], [value for _, value in points]
    return Series(name=name, colour=colour, x=x, y=y)
