"""Paired comparisons as every page shows them: a table, and a plot of differences.

The words of a cell and of the method stand in `compared.html`.
"""

from collections.abc import Callable, Mapping, Sequence

from fedgraft.report import figures
from fedgraft.report.figures import Series
from fedgraft.report.words import Plot
from fedgraft.study.result import Comparison

Pair = tuple[str, str]


def grid(comparisons: Sequence[Comparison]) -> dict[str, dict[Pair, Comparison]]:
    """Score -> pair of arms -> their comparison; missing where neither was scored on it."""
    pairs = dict.fromkeys((one.arm, one.against) for one in comparisons)
    found = {(one.score, one.arm, one.against): one for one in comparisons}
    units = {one.score: one.unit for one in comparisons}
    return {
        name: {
            (arm, against): found.get((name, arm, against))
            or Comparison(arm=arm, against=against, score=name, unit=unit, difference=None)
            for arm, against in pairs
        }
        for name, unit in units.items()
    }


def apart_plot(
    comparisons: Sequence[Comparison],
    colours: Mapping[str, str],
    *,
    series_of: Callable[[Comparison], str],
    group_of: Callable[[Comparison], str],
) -> Plot | None:
    """Differences about zero, of one unit, each with its interval; None where there are none.

    Args:
        comparisons: All shares, or none; what is missing is named.
        colours: Of the series, by name.
        series_of: The name of the series that a comparison belongs to.
        group_of: The name of its row.
    """
    if not comparisons:
        return None
    groups = list(dict.fromkeys(map(group_of, comparisons)))
    share = comparisons[0].unit == "share"
    factor = 100 if share else 1
    series = []
    for name in dict.fromkeys(map(series_of, comparisons)):
        ours = {group_of(one): one.difference for one in comparisons if series_of(one) == name}
        found = [ours.get(group) for group in groups]
        series.append(
            Series(
                name=name,
                colour=colours[name],
                x=[factor * one.value if one else None for one in found],
                low=[factor * one.low if one else None for one in found],
                high=[factor * one.high if one else None for one in found],
            )
        )
    unit, side = ("points", "right") if share else (comparisons[0].unit, "left")
    return Plot(
        title="How far apart, and how sure",
        svg=figures.changes(series, groups, unit="", x_label=f"difference, {unit}"),
        caption=f"{side.capitalize()} of zero the first of the two is better. A line is the 95% "
        "interval; where it crosses zero the two cannot be told apart.",
    )
