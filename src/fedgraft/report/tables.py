"""Tables in the paper's layout as CSV, Markdown, LaTeX and HTML, and figures 1 and 2.

The best of a row is bold, the second underlined. A score that is missing is an empty field in CSV
and the word elsewhere, never zero.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedgraft.provenance import check_directory, told_if_unwritable
from fedgraft.report import figures
from fedgraft.report.figures import Series
from fedgraft.report.template import fill
from fedgraft.report.words import Plot, power
from fedgraft.study.cost import PAPER_EPOCHS, PAPER_PARAMETERS, Tuning, training_flops, tuning_ratio
from fedgraft.study.result import Whichever
from fedgraft.study.tables import (
    AVERAGES,
    DIFFERENCE,
    FLEXIBLE,
    MMLU,
    NAMES,
    OF_INSTRUCTION,
    OF_REASONING,
    TRUTHFULNESS,
    Curve,
    Name,
    Row,
    Table,
    asked_of,
    beside,
    curves,
    deviations,
    in_form,
    marks,
    paper,
    shared_columns,
)

MISSING = "missing"
ASKED_OTHERWISE = "Asked otherwise than in the paper, so that no difference is taken:"
TITLES: Mapping[Name, str] = {
    "forgetting": "Table 2: reading on, with and without the residual",
    "portability": "Table 3: residuals across versions of a family",
    "derived": "Table 4: residuals on a derived model",
}
PANELS: tuple[tuple[Row, str], ...] = (
    (OF_INSTRUCTION, "instruction following"),
    (OF_REASONING, "reasoning"),
    (TRUTHFULNESS, "truthfulness"),
)
"""Of figure 1."""
WHEEL = (figures.GREY, figures.VERMILION, figures.GREEN, figures.BLUE, figures.PURPLE)
IN_FORM = ("GSM8K", "in form, of right")
PAPER_TUNING = Tuning(num_tokens=25_000_000 * 8_192, epochs=PAPER_EPOCHS)


def write_tables(
    out: Path,
    ours: Table | None = None,
    name: Name = "forgetting",
    flops: Mapping[str, float] = MappingProxyType({}),
) -> Path:
    """Write the paper's three tables, or ours beside one of them, in every form; and a page.

    Args:
        flops: Of our columns, where it is known; for figure 2.

    Raises ArtefactError where `out` is a file, or cannot be written.
    """
    check_directory(out)
    with told_if_unwritable(out):
        out.mkdir(parents=True, exist_ok=True)
    tables = (
        {one: paper(one) for one in NAMES} if ours is None else {name: beside(ours, paper(name))}
    )
    for one, table in tables.items():
        for suffix, text in (
            ("csv", as_csv(table)),
            ("md", as_markdown(table)),
            ("tex", as_latex(table)),
        ):
            (out / f"{one}.{suffix}").write_text(text, encoding="utf-8")
    page = out / "tables.html"
    page.write_text(render(tables, ours, flops), encoding="utf-8")
    return page


def render(
    tables: Mapping[Name, Table],
    ours: Table | None = None,
    flops: Mapping[str, float] = MappingProxyType({}),
) -> str:
    """The page of some tables; figures are of ours where there are any, then the paper's."""
    printed = paper("forgetting")
    shown = [(TITLES[name], as_html(table)) for name, table in tables.items()]
    shared = not ours or any(shared_columns(ours.columns, paper(name)) for name in tables)
    if not shared:
        shown = [("Our models", shown[0][1])]
        shown += [(f"{TITLES[name]}, as printed", as_html(paper(name))) for name in tables]
    return fill(
        "tables.html",
        tables=shown,
        ours=ours is not None,
        shared=shared,
        plots=[*figure_1(ours), *compute_plot(ours, flops)] if ours else [],
        printed=[*figure_1(printed), *figure_2(printed)],
        deviations=[one.words for name in NAMES for one in deviations(name)],
    )


def of_study(result: Whichever) -> dict[str, Any]:
    """What `benchmarks.html` needs; no table where no arm was asked a benchmark."""
    asked = asked_of(result)
    if asked is None:
        return {"paper_table": None, "paper_plots": []}
    plots = [*figure_1(asked.table), *compute_plot(asked.table, asked.flops)]
    return {"paper_table": as_html(asked.table), "paper_plots": plots}


def as_csv(table: Table) -> str:
    """Benchmark, metric, then a field a column: two decimals, empty where missing."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("benchmark", "metric", *table.columns))
    for row, values in table.rows.items():
        writer.writerow((*row, *("" if value is None else f"{value:.2f}" for value in values)))
    return buffer.getvalue()


def as_markdown(table: Table) -> str:
    """A pipe table; Markdown has no underline, so the second best is in <ins>."""
    forms = {"best": "**{}**", "second": "<ins>{}</ins>", None: "{}"}
    found = marks(table)
    lines = [
        "| " + " | ".join(("benchmark", "metric", *table.columns)) + " |",
        "|---|---|" + "---:|" * len(table.columns),
    ]
    for row, values in _with_form(table):
        cells = [
            forms[found.get((row, column))].format(_shown(column, value))
            for column, value in zip(table.columns, values, strict=True)
        ]
        lines.append("| " + " | ".join((*row, *cells)) + " |")
    if table.short:
        lines += ["", ASKED_OTHERWISE, "", *(f"- {note}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def as_latex(table: Table) -> str:
    """A tabular of the booktabs package."""
    forms = {"best": r"\textbf{{{}}}", "second": r"\underline{{{}}}", None: "{}"}
    found = marks(table)
    lines = [
        r"\begin{tabular}{ll" + "r" * len(table.columns) + "}",
        r"\toprule",
        " & ".join(map(_escaped, ("Benchmark", "Metric", *table.columns))) + r" \\",
        r"\midrule",
    ]
    for row, values in _with_form(table):
        cells = [
            forms[found.get((row, column))].format(_shown(column, value).replace("−", "$-$"))
            for column, value in zip(table.columns, values, strict=True)
        ]
        average = row in AVERAGES
        rules = [r"\midrule"] * (average and lines[-1] != r"\midrule")
        lines += [*rules, " & ".join((*map(_escaped, row), *cells)) + r" \\"]
        lines += [r"\midrule"] * average
    lines[-1] = r"\bottomrule"
    told = [ASKED_OTHERWISE, *table.notes] if table.short else []
    notes = [r"\par\smallskip\footnotesize " + _escaped(note) for note in told]
    return "\n".join([*lines, r"\end{tabular}", *notes]) + "\n"


def as_html(table: Table) -> str:
    """A table element; a click sorts the rows between two averages (see head.html)."""
    found = marks(table)
    bodies: list[list[tuple[Row, list[tuple[str, float | None, str]]]]] = [[]]
    for row, values in _with_form(table):
        cells = [
            (
                found.get((row, column), DIFFERENCE if column.endswith(DIFFERENCE) else ""),
                value,
                _shown(column, value),
            )
            for column, value in zip(table.columns, values, strict=True)
        ]
        bodies[-1].append((row, cells))
        if row in AVERAGES:
            bodies[-1:] = [bodies[-1][:-1], bodies[-1][-1:], []]
    return fill(
        "paper_table.html",
        columns=table.columns,
        bodies=[body for body in bodies if body],
        averages=AVERAGES,
        form=IN_FORM,
        notes=table.notes,
        asked_otherwise=ASKED_OTHERWISE,
    )


def _with_form(table: Table) -> Iterator[tuple[Row, Sequence[float | None]]]:
    """The rows, and a line of its own for the form of GSM8K's answers, after its other two."""
    for row, values in table.rows.items():
        yield row, values
        if row[0] == "GSM8K" and row != FLEXIBLE:
            told = [None if c.endswith(DIFFERENCE) else v for c, v in _form(table)]
            yield IN_FORM, told


def _form(table: Table) -> Iterator[tuple[str, float | None]]:
    return zip(table.columns, in_form(table), strict=True)


def _shown(column: str, value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:+.2f}".replace("-", "−") if column.endswith(DIFFERENCE) else f"{value:.2f}"


def _escaped(text: str) -> str:
    for sign in "_%&#":
        text = text.replace(sign, "\\" + sign)
    return text


def figure_1(table: Table) -> Iterator[Plot]:
    """Instruction following, reasoning and truthfulness against tokens read; a line a model."""
    lines = curves(table.columns)
    for row, title in PANELS if lines else ():
        read, as_they_came = [], []
        for curve, colour in zip(lines, cycle(WHEEL), strict=False):
            points: dict[float, float | None] = {
                tokens: table.value(row, column) for tokens, column in curve.columns
            }
            if 0 in points:
                level = points.pop(0)
                as_they_came.append(
                    Series(name=f"{curve.name} as it came", colour=colour, x=(), y=(level,))
                )
            read.append(_line(curve.name, colour, points))
        yield Plot(
            title=f"Figure 1: {title}",
            svg=figures.curves(
                read, levels=as_they_came, x_label="tokens read", y_label="score, %"
            ),
            caption=f"{' '.join(row)}. Dashed: as it came; there, base plus residual is the "
            "instruct model itself. The axis does not begin at zero.",
        )


def compute_plot(table: Table, flops: Mapping[str, float]) -> Iterator[Plot]:
    """Figure 2 of ours: MMLU against the operations of all training that a model came of.

    Models that differ in tokens alone are a line, others a mark each; what was not trained is a
    dashed line. None where no MMLU was taken of a trained model.
    """
    trained = {c: n for c, n in flops.items() if n and table.value(MMLU, c) is not None}
    if not trained:
        return
    lines = {
        curve.name: [column for _, column in curve.columns if flops.get(column)]
        for curve in curves(table.columns)
    }
    drawn = {column for columns in lines.values() for column in columns}
    lines |= {
        column: [column] for column in table.columns if flops.get(column) and column not in drawn
    }
    colours = dict(zip((name for name, ours in lines.items() if ours), cycle(WHEEL), strict=False))
    came = [column for column in table.columns if flops.get(column) == 0]
    others = cycle(WHEEL[len(colours) % len(WHEEL) :] + WHEEL)
    levels = [
        Series(
            name=f"{column}, not trained",
            colour=colours.get(column) or next(others),
            x=(),
            y=(table.value(MMLU, column),),
        )
        for column in came
    ]
    yield Plot(
        title="Figure 2: score against compute",
        svg=figures.curves(
            [
                _line(name, colour, {flops[c]: table.value(MMLU, c) for c in lines[name]})
                for name, colour in colours.items()
            ],
            levels=levels,
            x_label="FLOPs of all training that the model came of",
            y_label="MMLU, %",
            words=power,
        ),
        caption="As the stages of the study recorded it: 6 × parameters × tokens of training, 2 × "
        "parameters of a graft; the mean over seeds. Dashed: nothing was trained. The axis does "
        "not begin at zero.",
    )


def figure_2(
    table: Table,
    num_parameters: int = PAPER_PARAMETERS,
    epochs: int = PAPER_EPOCHS,
    tuning: Tuning = PAPER_TUNING,
) -> Iterator[Plot]:
    """MMLU against the operations of continued pre-training; a line a model."""
    lines = curves(table.columns)
    if not lines:
        return
    first = min(tokens for curve in lines for tokens, _ in curve.columns if tokens)
    ratio = tuning_ratio(tuning, first, epochs)
    again = training_flops(num_parameters, tuning.num_tokens, tuning.epochs)
    yield Plot(
        title="Figure 2: score against compute",
        svg=figures.curves(
            [
                _line(curve.name, colour, _by_compute(table, curve, num_parameters, epochs))
                for curve, colour in zip(lines, cycle(WHEEL), strict=False)
            ],
            levels=(),
            x_label="FLOPs of continued pre-training: 6 × parameters × tokens × epochs",
            y_label="MMLU, %",
            words=power,
        ),
        caption=f"For {num_parameters / 1e9:g}B parameters and {epochs} epochs. Instruction tuning "
        f"again would cost {power(again)} FLOPs, {ratio:,.0f} times the first point, and lies far "
        "beyond the right edge; adding a residual costs two operations a parameter.",
    )


def _by_compute(
    table: Table, curve: Curve, num_parameters: int, epochs: int
) -> dict[float, float | None]:
    return {
        training_flops(num_parameters, tokens, epochs): table.value(MMLU, column)
        for tokens, column in curve.columns
        if tokens
    }


def _line(name: str, colour: str, points: Mapping[float, float | None]) -> Series:
    values = list(points.values())
    return Series(name=name, colour=colour, x=list(points), y=values, low=values, high=values)
