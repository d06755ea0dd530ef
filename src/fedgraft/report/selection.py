"""A study of selection as one HTML page: what was chosen, what it gave, and what it cost."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from fedgraft.noise import Spent
from fedgraft.report import figures
from fedgraft.report.coreset import by_client, by_cluster
from fedgraft.report.departments import heat
from fedgraft.report.figures import Series
from fedgraft.report.template import fill
from fedgraft.report.words import (
    Plot,
    Tile,
    amount,
    count,
    duration,
    figure,
    flatten,
    power,
    score,
    size,
    spread,
    took,
)
from fedgraft.study.result import Compared, ScoredChoice, Selections, Summary
from fedgraft.study.rivals import START, WORDS

PALETTE = (
    *(figures.BLUE, figures.VERMILION, figures.ORANGE, figures.PURPLE, figures.SKY, figures.INK),
    figures.SOFT,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One arm by one score."""

    arm: str
    summary: Summary
    rival: str = ""
    difference: str = ""
    stderr: str = ""
    apart: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """All arms by one score."""

    title: str
    rows: tuple[Row, ...]


def render(result: Selections) -> str:
    """The page of a study of selection."""
    return fill(
        "selection.html",
        *(duration, count, power, figure, score, spread, size, took, amount),
        result=result,
        colours=_colours(result),
        tiles=list(_tiles(result)),
        plots=list(_plots(result)),
        maps=list(_maps(result)),
        tables=list(_tables(result)),
        costs=list(_costs(result)),
        privacy=list(_privacy(result)),
        partition=result.partition,
        heat=heat(result.partition),
        held_in_words="Dialogues of each client.",
        settings=list(flatten(result.settings)),
    )


def _colours(result: Selections) -> dict[str, str]:
    others = [arm for arm in result.words if arm != result.against]
    found = {arm: PALETTE[place % len(PALETTE)] for place, arm in enumerate(others)}
    return {START: figures.GREEN, result.against: figures.GREY, **found}


def _main_score(result: Selections) -> str | None:
    """The first of the known scores that the arms have."""
    scores = result.summary.get(result.against, {})
    return next((name for name in WORDS if name in scores), None)


def _compared(result: Selections, arm: str, name: str) -> Compared | None:
    return next((c for c in result.compared if (c.arm, c.score) == (arm, name)), None)


def _tiles(result: Selections) -> Iterator[Tile]:
    name = _main_score(result)
    if name is None:
        return
    words, unit = WORDS[name]
    values = {arm: found[name].mean for arm, found in result.summary.items() if name in found}
    trained = [arm for arm in values if arm not in (START, result.against)]
    if trained:
        best = (max if unit == "share" else min)(trained, key=values.__getitem__)
        yield Tile(
            value=_difference(values[best] - values[result.against], unit),
            words=f"{words}: {best} against {result.against}",
            colour=_colours(result)[best],
        )
        share = _mean(result, best, "num_examples") / result.num_examples
        yield Tile(
            value=f"{share:.1%}",
            words=f"of the examples are trained on in a round by {best}",
            colour=_colours(result)[best],
        )


def _mean(result: Selections, arm: str, name: str) -> float:
    found: list[ScoredChoice] = [one for one in result.scored if one.arm == arm]
    return fmean(getattr(one, name) for one in found)


def _plots(result: Selections) -> Iterator[Plot]:
    colours = _colours(result)
    for name, (words, unit) in WORDS.items():
        rows = []
        for arm in (START, *result.words):
            found = [
                one.scores[name] for one in result.scored if one.arm == arm and name in one.scores
            ]
            if found:
                factor = 100 if unit == "share" else 1
                values = [factor * value for value in found]
                rows.append(Series(name=arm, colour=colours[arm], x=values))
        if not rows:
            continue
        title = f"{words[0].upper()}{words[1:]}"
        if unit == "share":
            upper = max(value or 0 for row in rows for value in row.x)
            svg = figures.bars(rows, upper=min(100, 10 * (int(upper) // 10 + 1)))
            better = "higher"
        else:
            svg = figures.dots(rows)
            better = "lower"
        yield Plot(title=title, svg=svg, caption=f"A dot is a seed; {better} is better.")


def _maps(result: Selections) -> Iterator[Plot]:
    """What two arms made of the same examples, by cluster where it has some, and by client."""
    if result.mapped is None:
        return
    mapped, plane = result.mapped, np.array(result.mapped.plane, np.float32)
    for arm, marked in mapped.arms.items():
        caption = f"{arm}, seed {result.seeds[0]}: a ring is trained on in some round."
        if marked.clusters:
            plot = by_cluster(
                plane, mapped.clients, marked.clusters, marked.chosen, caption=caption
            )
            yield replace(plot, title=f"{arm}, by cluster")
        plot = by_client(plane, mapped.clients, marked.chosen, caption=caption)
        yield replace(plot, title=f"{arm}, by client")


def _tables(result: Selections) -> Iterator[Table]:
    for name, (words, unit) in WORDS.items():
        rows = []
        for arm, found in result.summary.items():
            if name not in found:
                continue
            compared = _compared(result, arm, name)
            if compared is None:
                rows.append(Row(arm=arm, summary=found[name]))
                continue
            error = compared.stderr
            rows.append(
                Row(
                    arm=arm,
                    summary=found[name],
                    rival=result.rivals[arm],
                    difference=_difference(compared.difference, unit),
                    stderr="" if error is None else _difference(error, unit).lstrip("+"),
                    apart="yes" if compared.told_apart else "" if error is None else "no",
                )
            )
        if rows:
            yield Table(title=f"{words[0].upper()}{words[1:]}", rows=tuple(rows))


def _difference(value: float, unit: str) -> str:
    return f"{100 * value:+.1f} points" if unit == "share" else f"{value:+.4f}"


def _costs(result: Selections) -> Iterator[list[str]]:
    """A row an arm; see the head of its table."""
    settings = result.settings["arms"]
    everything = [
        arm
        for arm in result.words
        if settings[arm]["method"] == "all" and not settings[arm].get("pooled")
    ][:1]
    whole = [
        _mean(result, a, "seconds_choosing") + _mean(result, a, "seconds_training")
        for a in everything
    ]
    for arm in result.words:
        choosing = _mean(result, arm, "seconds_choosing")
        training = _mean(result, arm, "seconds_training")
        chosen = _mean(result, arm, "num_examples")
        faster = f"{whole[0] / (choosing + training):.1f}x" if whole and choosing + training else ""
        yield [
            arm,
            f"{chosen:,.1f}",
            f"{chosen / result.num_examples:.1%}",
            f"{_mean(result, arm, 'num_distinct'):,.0f}",
            f"{_mean(result, arm, 'coverage'):.0%}",
            duration(choosing),
            duration(training),
            faster,
            size(_mean(result, arm, "bytes_up")),
            f"{_mean(result, arm, 'num_kept'):.1f}",
        ]


def _privacy(result: Selections) -> Iterator[tuple[str, Spent]]:
    """What each arm that noised its centroids spent, once."""
    for arm in result.words:
        spent = next((one.spent for one in result.scored if one.arm == arm and one.spent), None)
        if spent:
            yield arm, spent
