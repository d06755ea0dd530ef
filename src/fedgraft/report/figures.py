"""Plots as inline SVG; the only home of matplotlib. Same numbers, same bytes.

Colours are Okabe and Ito's, told apart by every kind of eye; no plot relies on them alone: what is
drawn is labelled, or has its own mark. A missing number is written as `missing`, never drawn.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

INK, SOFT, GRID = "#1c2430", "#5b6675", "#e3e7ed"
GREY, BLUE, VERMILION, GREEN = "#8a94a3", "#0072b2", "#d55e00", "#009e73"
PURPLE, ORANGE, SKY = "#cc79a7", "#e69f00", "#56b4e9"
WHEEL = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY)
"""Colours of many groups, in turn: neighbours differ, and what is one is said elsewhere."""
MANY = 2000
"""Points from which a plot holds them as a picture, not as a mark each."""
MOST_TICKS = 8
"""On a logarithmic axis."""
MARKS = ("o", "s", "D", "^", "v", "P", "X")
LEVELS = ((0, (4, 3)), (0, (1, 1.6)), (0, (7, 2, 1, 2)), (0, (2, 3)), (0, (9, 3)))
"""Dashes of lines to be compared with."""
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)))
WIDTH = 5.0
"""Inches: narrow enough that the text of a plot stays readable on a phone."""

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedgraft",
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": SOFT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "xtick.color": SOFT,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "text.parse_math": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """A named row of bars, a line or a set of dots."""

    name: str
    colour: str
    x: Sequence[float | None]
    """Values; None where one is missing."""
    y: Sequence[float | None] = ()
    low: Sequence[float | None] = ()
    """The lowest of what `y` is the mean of."""
    high: Sequence[float | None] = ()


def bars(series: Sequence[Series], *, target: float | None = None, upper: float = 100) -> str:
    """A bar a row to the mean of `x`, in percent; its dots are the seeds, its whisker their range.

    `target` is a dashed line.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _plot(0.75 + 0.42 * len(series))
        for place, row in enumerate(series):
            values = [value for value in row.x if value is not None]
            if not values:
                _missing(axes, 0, place)
                continue
            mean = fmean(values)
            axes.barh(place, mean, height=0.56, color=row.colour, alpha=0.85)
            if len(values) > 1:
                axes.plot([min(values), max(values)], [place, place], color=INK, linewidth=1.3)
                axes.plot(values, [place] * len(values), "o", color=INK, markersize=3)
            axes.annotate(
                f"{mean:.1f}%",
                (max([*values, mean]), place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                weight="bold",
            )
        if target is not None:
            axes.axvline(target, color=SOFT, linestyle=(0, (4, 3)), linewidth=1.1)
        axes.set_xlim(0, upper * 1.12)
        axes.set_xticks([upper * share / 4 for share in range(5)])
        axes.xaxis.set_major_formatter("{x:g}%")
        _rows(axes, [row.name for row in series])
        return _svg(figure)


def dots(series: Sequence[Series]) -> str:
    """A row of dots each, its mean as a line with its value; the axis begins where they do."""
    with mpl.rc_context(STYLE):
        figure, axes = _plot(0.75 + 0.42 * len(series))
        for place, row in enumerate(series):
            values = [value for value in row.x if value is not None]
            if not values:
                _missing(axes, 0, place)
                continue
            mean = fmean(values)
            axes.plot(values, [place] * len(values), "o", color=row.colour, markersize=5)
            axes.plot([mean, mean], [place - 0.3, place + 0.3], color=row.colour, linewidth=2.5)
            axes.annotate(
                f"{mean:.3f}",
                (max(values), place),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                weight="bold",
            )
        axes.margins(x=0.2)
        _rows(axes, [row.name for row in series])
        return _svg(figure)


def places(
    points: NDArray[np.float32],
    groups: Sequence[int],
    chosen: Sequence[int],
    *,
    names: Sequence[str] = (),
) -> str:
    """Points of a plane, coloured by group (-1 is grey), with a ring around those chosen.

    Args:
        points: [n, 2].
        names: Of the groups, for a legend; none where empty.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _plot(3.7)
        colours = [SOFT if one < 0 else WHEEL[one % len(WHEEL)] for one in groups]
        axes.scatter(
            points[:, 0],
            points[:, 1],
            s=9 if len(points) < 3000 else 3,
            c=colours,
            alpha=0.7,
            linewidths=0,
            rasterized=len(points) > MANY,
        )
        axes.scatter(
            points[chosen, 0],
            points[chosen, 1],
            s=34,
            facecolors="none",
            edgecolors=INK,
            linewidths=1.1,
            label="chosen",
        )
        for number, name in enumerate(names):
            axes.scatter([], [], s=20, c=[WHEEL[number % len(WHEEL)]], label=name)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_aspect("equal", adjustable="datalim")
        _legend(figure, axes)
        return _svg(figure)


def changes(
    series: Sequence[Series], groups: Sequence[str], *, unit: str = "%", x_label: str = ""
) -> str:
    """Dots of several series a group, about zero; `x` of a series follows `groups`.

    Where a series has `low` and `high`, each dot has its whisker from one to the other.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _plot(1.15 + 0.36 * len(groups) + 0.2 * ((len(series) + 2) // 3))
        axes.axvline(0, color=SOFT, linewidth=1.2)
        step = 0.5 / max(len(series) - 1, 1)
        for number, row in enumerate(series):
            offset = (number - (len(series) - 1) / 2) * step
            places = [place + offset for place in range(len(groups))]
            dots = [(value, y) for value, y in zip(row.x, places, strict=True) if value is not None]
            axes.plot(
                [value for value, _ in dots],
                [y for _, y in dots],
                MARKS[number % len(MARKS)],
                color=row.colour,
                markersize=6.5,
                label=row.name,
            )
            for low, high, y in zip(row.low, row.high, places, strict=False):
                if low is not None and high is not None:
                    axes.plot([low, high], [y, y], color=row.colour, linewidth=1.6)
            for value, y in zip(row.x, places, strict=True):
                if value is None:
                    _missing(axes, 0, y, row.name)
        axes.margins(x=0.12)
        axes.xaxis.set_major_formatter(
            lambda value, _: f"{value:+g}{unit}" if value else f"0{unit}"
        )
        axes.set_xlabel(x_label)
        _rows(axes, groups)
        _legend(figure, axes)
        return _svg(figure)


def lines(
    series: Sequence[Series], *, x_label: str, y_label: str, chosen: Sequence[float] = ()
) -> str:
    """Curves of `y` over `x`; `chosen` are places on the x axis that were picked."""
    with mpl.rc_context(STYLE):
        figure, axes = _plot(2.9)
        names = list(dict.fromkeys(row.name for row in series))
        for row in series:
            points = [
                (x, y) for x, y in zip(row.x, row.y, strict=True) if x is not None and y is not None
            ]
            number = names.index(row.name)
            few = len(points) <= 20
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=row.colour,
                linewidth=1.8,
                linestyle="-" if few else DASHES[number % len(DASHES)],
                marker=MARKS[number % len(MARKS)] if few else "",
                markersize=5,
                label=row.name,
            )
        for place in chosen:
            axes.axvline(place, color=SOFT, linestyle=(0, (4, 3)), linewidth=1.1)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.tick_params(axis="y", labelcolor=SOFT)
        _legend(figure, axes)
        return _svg(figure)


def curves(
    series: Sequence[Series],
    *,
    levels: Sequence[Series],
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    logarithmic: bool = True,
    words: Callable[[float], str] | None = None,
) -> str:
    """Lines of means over an x axis, each in the band from its lowest to its highest.

    `levels` are dashed lines at their first `y`, to be compared with. `words` say what stands at a
    tick of the x axis; `25k`, `1.5M` unless told otherwise.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _plot(2.9)
        if logarithmic:
            axes.set_xscale("log")
        for number, level in enumerate(levels):
            if level.y and level.y[0] is not None:
                dash = LEVELS[number % len(LEVELS)]
                axes.axhline(level.y[0], color=level.colour, linestyle=dash, label=level.name)
        ticks = sorted({x for row in series for x in row.x if x is not None})
        for number, row in enumerate(series):
            known = _known(row)
            x, y, low, high = ([dot[part] for dot in known] for part in range(4))
            axes.fill_between(x, low, high, color=row.colour, alpha=0.18, linewidth=0)
            mark = MARKS[number % len(MARKS)]
            style: dict[str, Any] = {
                "color": row.colour,
                "linewidth": 1.8,
                "marker": mark,
                "markersize": 5,
            }
            axes.plot(x, y, clip_on=False, zorder=3, **style)
            gap = "" if len(known) == len(row.x) else ", in part missing" if known else " missing"
            axes.plot([], [], label=row.name + gap, **style)
        if ticks and logarithmic:
            axes.set_xlim(ticks[0] / 1.15, ticks[-1] * 1.15)
        axes.xaxis.set_minor_locator(NullLocator())
        ticks = _apart(ticks) if logarithmic else ticks[:: 1 + len(ticks) // 12]
        axes.set_xticks(ticks, [(words or _short)(tick) for tick in ticks])
        if y_range:
            axes.set_ylim(*y_range)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.tick_params(axis="y", labelcolor=SOFT)
        _legend(figure, axes)
        return _svg(figure)


def scatter(series: Sequence[Series], names: Sequence[str], *, x_label: str, y_label: str) -> str:
    """Dots with a whisker from their lowest to their highest; those of one x share a name."""
    with mpl.rc_context(STYLE):
        figure, axes = _plot(3.6)
        axes.axhline(0, color=SOFT, linewidth=1.2)
        known = [x for row in series for x in row.x if x is not None]
        first, last = min(known, default=0), max(known, default=1)
        margin = 0.15 * (last - first or 1)
        axes.set_xlim(first - margin, last + margin)
        drawn = set()
        for number, row in enumerate(series):
            for x, y, low, high in _known(row):
                axes.plot([x, x], [low, high], color=row.colour, linewidth=1.3, alpha=0.7)
                mark = MARKS[number % len(MARKS)]
                axes.plot([x], [y], mark, color=row.colour, markersize=7, label=row.name)
                drawn.add(x)
        places = {}
        for number, name in enumerate(names):
            place = next((row.x[number] for row in series if row.x[number] is not None), None)
            if place is not None:
                places[name if place in drawn else f"{name} missing"] = place
        _names_above(axes, places)
        axes.margins(y=0.1)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.tick_params(axis="y", labelcolor=SOFT)
        _legend(figure, axes)
        return _svg(figure)


def _names_above(axes: Axes, places: Mapping[str, float]) -> None:
    """Name places on the x axis above a plot, each as low as it stands clear of the others."""
    left, right = axes.get_xlim()
    a_character = (right - left) * 5.2 / (0.85 * 72 * WIDTH)
    ends: list[float] = []
    for name, place in sorted(places.items(), key=lambda named: named[1]):
        half = a_character * (len(name) + 2) / 2
        middle = min(max(place, left + half), right - half)
        level = next((n for n, end in enumerate(ends) if end < middle - half), len(ends))
        ends[level : level + 1] = [middle + half]
        axes.axvline(place, color=GRID, linewidth=1.0, zorder=0)
        axes.annotate(
            name,
            (middle, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 4 + 12 * level),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=SOFT,
        )


def magnitudes(series: Sequence[Series], words: Callable[[float], str]) -> str:
    """A bar a row on a logarithmic axis, for what differs by factors; `words` says its value."""
    with mpl.rc_context(STYLE):
        figure, axes = _plot(0.8 + 0.5 * len(series))
        known = [value for row in series for value in row.x if value]
        axes.set_xscale("log")
        axes.set_xlim(min(known, default=1) / 10, max(known, default=10) * 300)
        for place, row in enumerate(series):
            value = row.x[0]
            if not value:
                _missing(axes, axes.get_xlim()[0], place)
                continue
            axes.barh(place, value, height=0.56, color=row.colour, alpha=0.85)
            axes.annotate(
                words(value),
                (value, place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                weight="bold",
            )
        axes.xaxis.set_visible(False)
        _rows(axes, [row.name for row in series])
        return _svg(figure)


def shares(series: Sequence[Series], groups: Sequence[str], words: Callable[[float], str]) -> str:
    """A bar a group, made of a part of each series; `words` says what the whole is.

    A group with a part that is missing has no bar.
    """
    with mpl.rc_context(STYLE):
        rows = (len(series) + 2) // 3
        figure, axes = _plot(0.7 + 0.42 * len(groups) + 0.24 * rows)
        ends = [0.0] * len(groups)
        for row in series:
            for place, value in enumerate(row.x):
                if value is not None:
                    axes.barh(
                        place, value, left=ends[place], height=0.56, color=row.colour, alpha=0.85
                    )
                    ends[place] += value
            axes.barh(0, 0, color=row.colour, alpha=0.85, label=row.name)
        for place, end in enumerate(ends):
            if any(row.x[place] is None for row in series):
                _missing(axes, end, place)
            else:
                note = words(end)
                axes.annotate(
                    note, (end, place), xytext=(6, 0), textcoords="offset points", va="center"
                )
        axes.set_xlim(0, 1.3 * max([*ends, 1e-9]))
        axes.xaxis.set_visible(False)
        _rows(axes, groups)
        _legend(figure, axes)
        return _svg(figure)


def _known(row: Series) -> list[tuple[float, float, float, float]]:
    """x, y, low and high of the dots that are not missing."""
    return [
        (x, y, low, high)
        for x, y, low, high in zip(row.x, row.y, row.low, row.high, strict=True)
        if x is not None and y is not None and low is not None and high is not None
    ]


def _apart(ticks: Sequence[float]) -> list[float]:
    """Of rising places on a logarithmic axis those whose words do not run into one another."""
    kept = list(ticks[:1])
    nearest = (ticks[-1] / ticks[0]) ** (1 / MOST_TICKS) if kept else 1.0
    for tick in ticks[1:]:
        if tick >= kept[-1] * nearest:
            kept.append(tick)
    return kept


def _short(number: float) -> str:
    """`25k`, `1.31M`: a tick that fits, in three digits."""
    number = float(f"{number:.3g}")
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{suffix}"
    return f"{number:g}"


def _plot(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots()


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a plot, the first one on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")


def _missing(axes: Axes, x: float, y: float, name: str = "") -> None:
    axes.annotate(
        f"{name} missing".strip(),
        (x, y),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=SOFT,
        style="italic",
    )


def _legend(figure: Figure, axes: Axes) -> None:
    """Name the series above the plot, each once."""
    handles, names = axes.get_legend_handles_labels()
    named = dict(zip(names, handles, strict=True))
    if len(named) > 1:
        columns = 1 if max(map(len, named)) > 20 else 3
        figure.legend(named.values(), named.keys(), loc="outside upper left", ncols=columns)


def _svg(figure: Figure) -> str:
    """The figure as an SVG element that can stand in a page beside others.

    Ids are hashes of what they name, so equal ids in two plots mean equal things; ids that nothing
    refers to, the date and the version of matplotlib are dropped.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<g) id="[^"]*"', r"\1", text)
    return re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2).strip()
