"""The tables of arXiv 2410.10739: as printed, recomputed, and made of scores of ours.

    study/paper/table2_forgetting.csv     a model that reads 100M, 500M, 1B tokens; its residual
    study/paper/table3_portability.csv    residuals across versions of a family
    study/paper/table4_derived.csv        residuals on a model derived from the family

Rows are 16 scores of nine benchmarks in percent, and their averages. A score that is missing is
None, and so is every average that it would be part of.

A column is called after what it is, `MODEL[+TOKENS][+RESIDUAL]`: `L3b+100M+3Lr` is the base after
100M tokens plus the residual 3Lr.
"""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Literal, get_args

from pydantic import ValidationError

from fedgraft.errors import StudyError
from fedgraft.evaluation.benchmarks import PAPER_ROWS, benchmark_of
from fedgraft.evaluation.scorecard import Scorecard
from fedgraft.study.result import Found, Lineages, Result, Whichever, load_result

Row = tuple[str, str]
"""Benchmark and metric, as the paper writes them."""
Name = Literal["forgetting", "portability", "derived"]
NAMES: tuple[Name, ...] = get_args(Name)
Mark = Literal["best", "second"]

NUMBERS: Mapping[Name, int] = MappingProxyType({"forgetting": 2, "portability": 3, "derived": 4})
"""Of the table in the paper."""
SCORES: tuple[Row, ...] = tuple(PAPER_ROWS)
INSTRUCTION, REASONING = SCORES[:8], SCORES[8:15]
OF_INSTRUCTION, OF_REASONING = ("Sub-Average", "instruction"), ("Sub-Average", "reasoning")
OF_ALL = ("Average", "all")
AVERAGES: Mapping[Row, tuple[Row, ...]] = MappingProxyType(
    {OF_INSTRUCTION: INSTRUCTION, OF_REASONING: REASONING, OF_ALL: SCORES}
)
"""Each average, and what it is the mean of."""
LAYOUT = (*INSTRUCTION, OF_INSTRUCTION, *REASONING, OF_REASONING, *SCORES[15:], OF_ALL)
TRUTHFULNESS, MMLU = ("TruthfulQA", "mc2"), ("MMLU", "acc")
STRICT, FLEXIBLE = ("GSM8K", "strict-EM"), ("GSM8K", "EM")

LAST_DIGIT = 0.01
"""Of what is printed."""

DIFFERENCE = "difference"


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Scores of some models, in percent."""

    columns: tuple[str, ...]
    rows: Mapping[Row, tuple[float | None, ...]]
    """In the order of the page; a value for each column."""
    rivals: tuple[tuple[str, ...], ...]
    """Columns of which one is the best in a row: models of one size."""
    short: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Column -> benchmark -> what of it was asked otherwise than in the paper."""

    @property
    def notes(self) -> tuple[str, ...]:
        """`short` in words: `gsm8k: 3 of 5 shots (L3b, L3b+100M)`."""
        columns: dict[tuple[str, str], list[str]] = {}
        for column, short in self.short.items():
            for benchmark, words in short.items():
                columns.setdefault((benchmark, words), []).append(column)
        return tuple(
            f"{benchmark}: {words} ({', '.join(where)})"
            for (benchmark, words), where in columns.items()
        )

    def is_short(self, row: Row, column: str) -> bool:
        """Whether a number, or one that it is the mean of, was asked otherwise."""
        short = self.short.get(column, {})
        return any(benchmark_of(PAPER_ROWS[one]) in short for one in AVERAGES.get(row, (row,)))

    def value(self, row: Row, column: str) -> float | None:
        return self.rows[row][self.columns.index(column)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Deviation:
    """An average that is printed as another number than its rows give."""

    table: Name
    row: Row
    column: str
    printed: float
    computed: float

    @property
    def within_rounding(self) -> bool:
        """Whether rounding can have made it: of each row, and once more of their mean."""
        return abs(self.printed - self.computed) <= LAST_DIGIT + 1e-9

    @property
    def words(self) -> str:
        """`table 3, Q2b+2.5Qr, Sub-Average reasoning: printed 65.48, its rows give 65.439`."""
        cause = (
            "rounded rows can make that" if self.within_rounding else "rounding cannot make that"
        )
        return (
            f"table {NUMBERS[self.table]}, {self.column}, {' '.join(self.row)}: printed "
            f"{self.printed:.2f}, its rows give {self.computed:.3f}; {cause}"
        )


def paper(name: Name) -> Table:
    """A table as the paper prints it."""
    file = resources.files("fedgraft.study") / "paper" / f"table{NUMBERS[name]}_{name}.csv"
    header, *lines = csv.reader(file.read_text(encoding="utf-8").splitlines())
    columns = tuple(header[2:])
    sizes = dict.fromkeys(column[0] for column in columns)  # L: 8B, Q: 1.5B, D: derived, 8B
    return Table(
        columns=columns,
        rows={(line[0], line[1]): tuple(map(float, line[2:])) for line in lines},
        rivals=tuple(tuple(c for c in columns if c.startswith(size)) for size in sizes),
    )


def table(columns: Mapping[str, Sequence[Scorecard]]) -> Table:
    """The table of some models: for each column the scorecards of its seeds, of which the mean.

    A score that one of a column's cards lacks is missing, and so are its averages.

    Raises StudyError where there is no column, or one without a card.
    """
    if not columns or not all(columns.values()):
        empty = [name for name, cards in columns.items() if not cards]
        raise StudyError(
            f"expected a scorecard for each column of a table, found none for {empty or 'any'}; "
            "score the models with `fedgraft evaluate MODEL --suite paper --out FILE`"
        )
    scores = {
        row: tuple(_percent([card.value(name) for card in cards]) for cards in columns.values())
        for row, name in PAPER_ROWS.items()
    }
    short = {column: _short_of(cards) for column, cards in columns.items()}
    return replace(
        with_averages(tuple(columns), scores),
        short={column: found for column, found in short.items() if found},
    )


def _short_of(cards: Sequence[Scorecard]) -> dict[str, str]:
    """Benchmark -> its shortcomings, of all seeds."""
    found: dict[str, list[str]] = {}
    for card in cards:
        for benchmark, asked in card.benchmarks.items():
            if asked.shortcomings:
                found.setdefault(benchmark, []).append(asked.shortcomings)
    return {benchmark: " or ".join(dict.fromkeys(words)) for benchmark, words in found.items()}


def load_columns(told: Sequence[str]) -> dict[str, list[Scorecard]]:
    """`NAME=FILE` for each scorecard; a name that comes again is another seed of the same model.

    Raises StudyError for an entry of another form, and a file that is missing or no scorecard.
    """
    columns: dict[str, list[Scorecard]] = {}
    for entry in told:
        name, named, file = entry.rpartition("=")
        if not (named and name and file):
            raise StudyError(f"expected NAME=SCORECARD, found {entry!r}; e.g. L3b=runs/base.json")
        try:
            card = Scorecard.model_validate_json(Path(file).read_bytes())
        except (OSError, ValidationError) as error:
            why = error.strerror if isinstance(error, OSError) else f"{error.error_count()} faults"
            raise StudyError(
                f"{file}: expected a scorecard, found {why}; make it with "
                "`fedgraft evaluate MODEL --suite paper --out FILE`"
            ) from error
        columns.setdefault(name, []).append(card)
    return columns


def _percent(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return 100 * fmean(known) if len(known) == len(values) else None


def with_averages(
    columns: tuple[str, ...], scores: Mapping[Row, tuple[float | None, ...]]
) -> Table:
    """The table of these scores, in the layout of the paper's tables 2 and 3."""
    rows = {
        row: averages(scores, AVERAGES[row]) if row in AVERAGES else scores[row] for row in LAYOUT
    }
    return Table(columns=columns, rows=rows, rivals=(columns,))


def averages(
    scores: Mapping[Row, tuple[float | None, ...]], of: Sequence[Row]
) -> tuple[float | None, ...]:
    """The mean of some rows, column by column; missing where one of them is."""
    columns = zip(*(scores[row] for row in of), strict=True)
    return tuple(
        None
        if any(value is None for value in column)
        else fmean(v for v in column if v is not None)
        for column in columns
    )


def deviations(name: Name) -> tuple[Deviation, ...]:
    """Every average of a printed table that is not the mean of its printed rows, rounded.

    Half of the last digit is what rounding the mean explains. The rows themselves are rounded, so
    up to a whole digit may be nobody's mistake (`within_rounding`).
    """
    printed = paper(name)
    return tuple(
        Deviation(table=name, row=row, column=column, printed=told, computed=found)
        for row, of in AVERAGES.items()
        if row in printed.rows
        for column, told, found in zip(
            printed.columns, printed.rows[row], averages(printed.rows, of), strict=True
        )
        if told is not None and found is not None and abs(told - found) > LAST_DIGIT / 2 + 1e-9
    )


def marks(table: Table) -> dict[tuple[Row, str], Mark]:
    """The best and the second best of rivals in each row, by the two digits that are shown.

    Equals share a mark; where there is one number only there is nothing to be better than.
    """
    found: dict[tuple[Row, str], Mark] = {}
    for row in table.rows:
        for rivals in table.rivals:
            known = {
                column: round(value, 2)
                for column in rivals
                if (value := table.value(row, column)) is not None
            }
            ranks: tuple[Mark, Mark] = ("best", "second")
            distinct = sorted(set(known.values()), reverse=True)
            if len(distinct) > 1:
                for mark, best in zip(ranks, distinct, strict=False):
                    found |= {(row, c): mark for c, value in known.items() if value == best}
    return found


def shared_columns(columns: Sequence[str], printed: Table) -> list[str]:
    """Those that are called as a column of the paper's."""
    return [column for column in columns if column in printed.columns]


def nearest(columns: Sequence[str]) -> Name:
    """The paper's table that has most of the columns; table 2 where none has any."""
    return max(NAMES, key=lambda name: len(shared_columns(columns, paper(name))))


def beside(ours: Table, printed: Table) -> Table:
    """Our columns, each that the paper has too followed by the paper's and by the difference.

    There is none where a benchmark was asked otherwise (fewer questions or shots, cut text).
    """
    shared = shared_columns(ours.columns, printed)
    names: list[str] = []
    for column in ours.columns:
        names.append(column)
        names += [f"{column}, paper", f"{column}, {DIFFERENCE}"] if column in shared else []

    def values(row: Row) -> tuple[float | None, ...]:
        found: list[float | None] = []
        for column in ours.columns:
            value = ours.value(row, column)
            found.append(value)
            if column in shared:
                told = printed.value(row, column) if row in printed.rows else None
                if value is None or told is None or ours.is_short(row, column):
                    found += [told, None]
                else:
                    found += [told, value - told]
        return tuple(found)

    return Table(
        columns=tuple(names),
        rows={row: values(row) for row in ours.rows},
        rivals=(ours.columns,),
        short=ours.short,
    )


def in_form(table: Table) -> tuple[float | None, ...]:
    """Of the answers to GSM8K that are right, those in the form that its shots show, in percent.

    Strict match over flexible match. Where it falls while flexible match holds, a model has
    unlearned the form and not the sums. A last number may be missed by flexible match where strict
    match finds it, so that it can pass 100.
    """
    pairs = zip(table.rows[STRICT], table.rows[FLEXIBLE], strict=True)
    return tuple(
        None if strict is None or not flexible else 100 * strict / flexible
        for strict, flexible in pairs
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The arms of a study that were asked benchmarks, as columns of a table."""

    columns: Mapping[str, Sequence[Scorecard]]
    """As the paper would call them -> a card a seed."""
    flops: Mapping[str, float]
    """Column -> operations of all training that the model came of, the mean over seeds; 0 where
    nothing was trained."""

    @property
    def table(self) -> Table:
        return table(self.columns)


def asked_of(result: Whichever) -> Asked | None:
    """The columns of a study; None where no arm was asked a benchmark of the paper."""
    match result:
        case Result():
            found = _asked_of_arms(result)
        case Lineages():
            found = _asked_of_lineages(result)
        case _:
            return None
    known = {
        column: cards
        for column, cards in found.columns.items()
        if any(name in card.scores for card in cards for name in PAPER_ROWS.values())
    }
    flops = {column: found.flops[column] for column in known}
    return Asked(columns=known, flops=flops) if known else None


def load_asked(directory: Path) -> Asked:
    """The columns of the study that wrote into a directory.

    Raises ReportError where there is no result, StudyError where no arm was asked a benchmark.
    """
    if asked := asked_of(load_result(directory)):
        return asked
    raise StudyError(
        f"{directory}: expected a study whose arms were asked the paper's benchmarks, found none "
        "of their scores; give the file of a study of lineages `benchmarks:` and run it again"
    )


def _asked_of_arms(result: Result) -> Asked:
    read = f"+{_short(result.tokens)}"
    names = {
        "base": "base",
        "pretrained_base": f"base{read}",
        "instruct": "instruct",
        "s1": f"instruct{read}",
        "graft": f"base{read}+residual",
    }
    stages = {"graft": ("pretrained_base", "graft")}
    cards = {arm.arm: arm.scorecards for arm in result.arms}
    return Asked(
        columns={column: cards[arm] for arm, column in names.items()},
        flops={
            column: sum(_flops(result, stage) for stage in stages.get(arm, (arm,)))
            for arm, column in names.items()
        },
    )


def _asked_of_lineages(result: Lineages) -> Asked:
    """Arms by their names; what read on from a model as it comes is called `MODEL+TOKENS`."""
    columns, flops = {}, {}
    for arm in result.arms:
        model, _, budget = arm.arm.partition("@")
        made = result.models[model]
        of_came = made.pretrained and not result.models[made.made_of[0].partition("@")[0]].made_of
        tokens = int(budget) if budget else made.num_tokens
        column = f"{made.made_of[0]}+{_short(tokens)}" if of_came else arm.arm
        column = arm.arm if column in columns else column
        columns[column] = arm.scorecards
        trained = dict(_trained(result, arm.arm))
        flops[column] = sum(share * _flops(result, name) for name, share in trained.items())
    return Asked(columns=columns, flops=flops)


def _trained(result: Lineages, ref: str) -> Iterator[tuple[str, float]]:
    """Each model that a model is made of, itself too, and how far along it was taken, rising."""
    shares: dict[str, float] = {}
    waiting = [ref]
    while waiting:
        name, _, budget = waiting.pop().partition("@")
        made = result.models[name]
        share = int(budget) / made.num_tokens if budget else 1.0
        shares[name] = max(share, shares.get(name, 0.0))
        waiting += made.made_of
    yield from shares.items()


def _flops(result: Found, name: str) -> float:
    """What a stage took, the mean over its seeds."""
    found = [
        c.flops for c in result.costs if c.stage == name or c.stage.startswith(f"{name}, seed ")
    ]
    return fmean(found) if found else 0.0


def _short(tokens: int) -> str:
    """`100M`, as the paper writes it; to the last token where no unit fits."""
    unit, size = next(((u, s) for u, s in reversed(tuple(UNITS.items())) if tokens >= s), ("", 1))
    return f"{tokens / size:.15g}{unit}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One model against the tokens that it has read; figure 1 of the paper is of three."""

    name: str
    columns: tuple[tuple[int, str], ...]
    """Tokens read, fewest first, and the column."""


UNITS = MappingProxyType({"k": 10**3, "M": 10**6, "B": 10**9})


def curves(columns: Sequence[str]) -> tuple[Curve, ...]:
    """The columns of a table that differ in tokens alone, as curves, of two points at least."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    for column in columns:
        model, tokens, residual = _parts(column)
        found.setdefault((model, residual), {})[tokens] = column
    return tuple(
        Curve(name=f"{model}{residual}", columns=tuple(sorted(points.items())))
        for (model, residual), points in found.items()
        if any(one != other for one, other in pairwise(points))
    )


def _parts(column: str) -> tuple[str, int, str]:
    """`L3b+100M+3Lr` -> L3b, 100 million, +3Lr."""
    found = re.fullmatch(r"([^+]+)(?:\+(\d+(?:\.\d+)?)([kMB]))?(\+.+)?", column)
    if not found:
        return column, 0, ""
    model, number, unit, residual = found.groups()
    return model, round(float(number) * UNITS[unit]) if number else 0, residual or ""
