"""The paper's tables: every average taken again, ours beside them, and nothing missing is zero."""

from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.errors import StudyError
from fedgraft.evaluation.benchmarks import PAPER_ROWS
from fedgraft.evaluation.scorecard import Score, Scorecard
from fedgraft.study.tables import (
    AVERAGES,
    FLEXIBLE,
    INSTRUCTION,
    LAYOUT,
    MMLU,
    NAMES,
    OF_ALL,
    OF_INSTRUCTION,
    OF_REASONING,
    REASONING,
    SCORES,
    STRICT,
    TRUTHFULNESS,
    Curve,
    Name,
    Row,
    Table,
    beside,
    curves,
    deviations,
    in_form,
    load_columns,
    marks,
    paper,
    table,
    with_averages,
)


def card(percent: dict[Row, float], seed: int = 1) -> Scorecard:
    return Scorecard(
        arm="graft",
        seed=seed,
        scores={
            PAPER_ROWS[row]: Score(value=value / 100, num=100, stderr=0.01, unit="share")
            for row, value in percent.items()
        },
    )


def scores(value: float = 50.0) -> dict[Row, float]:
    return dict.fromkeys(SCORES, value)


def test_every_average_of_the_paper_is_within_rounding_with_these_exceptions() -> None:
    found = {(d.table, d.column, d.row): d for name in NAMES for d in deviations(name)}
    assert found.keys() == {
        ("forgetting", "L3i+100M", OF_ALL),
        ("portability", "Q2b+2.5Qr", OF_REASONING),
    }
    by_rows_own_rounding, by_nothing = found.values()
    assert by_rows_own_rounding.within_rounding
    assert not by_nothing.within_rounding
    assert by_nothing.words == (
        "table 3, Q2b+2.5Qr, Sub-Average reasoning: printed 65.48, its rows give 65.439; rounding "
        "cannot make that"
    )


def test_a_digit_that_was_copied_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = paper("derived")
    rows = dict(printed.rows)
    rows[MMLU] = (rows[MMLU][0], 63.31, rows[MMLU][2])  # 62.31 is printed
    wrong = Table(columns=printed.columns, rows=rows, rivals=printed.rivals)
    monkeypatch.setattr("fedgraft.study.tables.paper", lambda _: wrong)
    (found,) = deviations("derived")
    assert (found.column, found.row) == ("DocChat+3Lr", OF_ALL)
    assert not found.within_rounding


@pytest.mark.parametrize("name", NAMES)
def test_the_papers_tables_have_all_rows_and_no_gap(name: Name) -> None:
    printed = paper(name)
    assert [row for row in printed.rows if row not in AVERAGES] == list(SCORES)
    assert all(value is not None for values in printed.rows.values() for value in values)
    if name != "derived":  # which has no sub-averages
        assert tuple(printed.rows) == LAYOUT


def test_averages_are_of_eight_of_seven_and_of_all_sixteen_rows() -> None:
    assert (len(INSTRUCTION), len(REASONING), len(SCORES)) == (8, 7, 16)
    assert INSTRUCTION[-1] == STRICT
    assert SCORES[15] == TRUTHFULNESS
    assert not {TRUTHFULNESS} & {*INSTRUCTION, *REASONING}


@given(st.lists(st.floats(0, 100), min_size=16, max_size=16))
def test_an_average_is_the_mean_of_its_rows(values: list[float]) -> None:
    made = with_averages(("a",), {row: (v,) for row, v in zip(SCORES, values, strict=True)})
    assert made.value(OF_ALL, "a") == pytest.approx(fmean(values))
    assert made.value(OF_INSTRUCTION, "a") == pytest.approx(fmean(values[:8]))
    assert made.value(OF_REASONING, "a") == pytest.approx(fmean(values[8:15]))


def test_a_missing_score_is_missing_and_so_are_the_averages_over_it_and_no_others() -> None:
    part = {row: value for row, value in scores().items() if row != MMLU}
    made = table({"L3b": [card(scores())], "L3i": [card(part)]})
    gone = [row for row in made.rows if made.value(row, "L3i") is None]
    assert gone == [MMLU, OF_INSTRUCTION, OF_ALL]
    assert made.value(OF_REASONING, "L3i") == pytest.approx(50)
    assert None not in [made.value(row, "L3b") for row in made.rows]


def test_a_score_that_one_seed_lacks_is_missing() -> None:
    part = {row: value for row, value in scores().items() if row != MMLU}
    made = table(
        {"L3b": [card(scores(40.0)), card(scores(60.0), 2)], "L3i": [card(scores()), card(part, 2)]}
    )
    assert made.value(MMLU, "L3b") == pytest.approx(50)
    assert made.value(MMLU, "L3i") is None


def test_a_column_without_a_scorecard_is_refused() -> None:
    with pytest.raises(StudyError, match=r"none for \['L3i'\]; score the models"):
        table({"L3b": [card(scores())], "L3i": []})
    with pytest.raises(StudyError, match="none for any"):
        table({})


def test_the_best_and_the_second_are_marked_among_models_of_one_size() -> None:
    found = marks(paper("portability"))
    row = ("Piqa", "acc")
    assert {c: m for (r, c), m in found.items() if r == row} == {
        "L3.1b": "best",
        "L3.1i": "second",
        "Q2.5i": "best",
        "Q2i": "second",
    }


def test_equals_share_their_mark_and_what_is_missing_has_none() -> None:
    made = Table(
        columns=("a", "b", "c", "d"),
        rows={MMLU: (1.0, 3.001, 2.999, None)},
        rivals=(("a", "b", "c", "d"),),
    )
    assert marks(made) == {(MMLU, "a"): "second", (MMLU, "b"): "best", (MMLU, "c"): "best"}


def test_a_number_alone_is_not_the_best_of_anything() -> None:
    assert marks(Table(columns=("a", "b"), rows={MMLU: (1.0, None)}, rivals=(("a", "b"),))) == {}


def test_ours_stands_beside_the_papers_with_the_difference() -> None:
    made = beside(
        table({"L3b": [card(scores())], "other": [card(scores(1.0))]}), paper("forgetting")
    )
    assert made.columns == ("L3b", "L3b, paper", "L3b, difference", "other")
    assert made.rows[MMLU] == pytest.approx((50.0, 62.14, -12.14, 1.0))
    assert made.rivals == (("L3b", "other"),)


def test_the_paper_beside_itself_differs_nowhere() -> None:
    for name in NAMES:
        made = beside(paper(name), paper(name))
        differences = [c for c in made.columns if c.endswith("difference")]
        assert all(made.value(row, c) == 0 for row in made.rows for c in differences)


def test_of_a_missing_score_the_difference_is_missing_and_the_papers_number_stands() -> None:
    part = {row: value for row, value in scores().items() if row != MMLU}
    made = beside(table({"L3b": [card(part)]}), paper("forgetting"))
    assert made.rows[MMLU] == (None, 62.14, None)


def test_columns_that_the_paper_does_not_have_are_refused_with_its_names() -> None:
    with pytest.raises(StudyError, match=r"\(DocChat, DocChat\+3Lr, DocChat\+3.1Lr\), found mine"):
        beside(table({"mine": [card(scores())]}), paper("derived"))


def test_the_form_of_gsm8k_falls_where_strict_match_does_and_flexible_match_holds() -> None:
    printed = paper("forgetting")
    told = dict(zip(printed.columns, in_form(printed), strict=True))
    assert told["L3i"] == pytest.approx(99.9, abs=0.1)
    assert told["L3b+100M+3Lr"] == pytest.approx(62.7, abs=0.1)
    nothing = Table(columns=("a",), rows={STRICT: (1.0,), FLEXIBLE: (0.0,)}, rivals=())
    assert in_form(nothing) == (None,)


def test_columns_that_differ_in_tokens_alone_are_curves() -> None:
    assert curves(paper("forgetting").columns)[2] == Curve(
        name="L3b+3Lr",
        columns=(
            (100_000_000, "L3b+100M+3Lr"),
            (500_000_000, "L3b+500M+3Lr"),
            (1_000_000_000, "L3b+1B+3Lr"),
        ),
    )
    assert [one.name for one in curves(paper("forgetting").columns)] == ["L3b", "L3i", "L3b+3Lr"]
    assert curves(paper("portability").columns) == ()
    assert curves(paper("derived").columns) == ()


def test_scorecards_are_named_on_the_command_line_once_a_seed(tmp_path: Path) -> None:
    for seed in (1, 2):
        file = tmp_path / f"{seed}.json"
        file.write_text(card(scores(), seed).model_dump_json(), encoding="utf-8")
    found = load_columns([f"L3b={tmp_path}/1.json", f"L3b={tmp_path}/2.json"])
    assert [one.seed for one in found["L3b"]] == [1, 2]


@pytest.mark.parametrize("entry", ["L3b", "=a.json", "L3b="])
def test_a_column_without_a_name_or_a_file_is_refused(entry: str) -> None:
    with pytest.raises(StudyError, match="expected NAME=SCORECARD, found"):
        load_columns([entry])


def test_a_file_that_is_no_scorecard_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"gone.json: expected a scorecard, found No such file"):
        load_columns([f"L3b={tmp_path}/gone.json"])
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    with pytest.raises(StudyError, match=r"other.json: expected a scorecard, found 3 faults"):
        load_columns([f"L3b={tmp_path}/other.json"])
