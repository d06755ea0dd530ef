"""Tables in the paper's layout as CSV, Markdown, LaTeX and HTML, and figures 1 and 2.

The best of a row is bold, the second underlined. A score that is missing is an empty field in CSV
and the word elsewhere, never zero.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fedgraft.report import figures
from fedgraft.report.figures import Series
from fedgraft.report.template import fill
from fedgraft.report.words import Plot, power
from fedgraft.study.cost import PAPER_EPOCHS, PAPER_PARAMETERS, Tuning, training_flops, tuning_ratio
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
    beside,
    curves,
    deviations,
    in_form,
    marks,
    paper,
)

MISSING = "missing"
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
COLOURS = (figures.GREY, figures.VERMILION, figures.GREEN, figures.BLUE, figures.PURPLE)
IN_FORM = ("GSM8K", "in form, of right")
PAPER_TUNING = Tuning(num_tokens=25_000_000 * 8_192, epochs=PAPER_EPOCHS)


def write_tables(out: Path, ours: Table | None = None, name: Name = "forgetting") -> Path:
    """Write the paper's three tables, or ours beside one of them, in every form; and a page.

    Raises StudyError where none of our columns is called as one of the paper's.
    """
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
    page.write_text(render(tables, ours), encoding="utf-8")
    return page


def render(tables: Mapping[Name, Table], ours: Table | None = None) -> str:
    """The page of some tables; figures are of ours where there are any, else of the paper's.

    Of ours there is no figure 2, since a scorecard does not say how large its model is.
    """
    printed = paper("forgetting")
    return fill(
        "tables.html",
        tables=[(TITLES[name], as_html(table)) for name, table in tables.items()],
        ours=ours is not None,
        plots=[*figure_1(ours)] if ours else [*figure_1(printed), *figure_2(printed)],
        deviations=[one.words for name in NAMES for one in deviations(name)],
    )


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
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


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
        for curve, colour in zip(lines, COLOURS, strict=False):
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
                for curve, colour in zip(lines, COLOURS, strict=False)
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
