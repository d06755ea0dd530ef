"""The paper's tables: every average taken again, ours beside them, and nothing missing is zero."""

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.report.example import example_forgetting, example_result

from fedgraft.errors import StudyError
from fedgraft.evaluation.benchmarks import PAPER_ROWS, Asked
from fedgraft.evaluation.scorecard import Score, Scorecard, together
from fedgraft.study.comparison import summarise
from fedgraft.study.cost import StageCost
from fedgraft.study.result import ArmResult, Lineages, Made, Result
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
    asked_of,
    beside,
    curves,
    deviations,
    in_form,
    load_asked,
    load_columns,
    marks,
    nearest,
    paper,
    table,
    with_averages,
)


def card(percent: dict[Row, float], seed: int = 1, arm: str = "graft") -> Scorecard:
    return Scorecard(
        arm=arm,
        seed=seed,
        scores={
            PAPER_ROWS[row]: Score(value=value / 100, num=100, stderr=0.01, unit="share")
            for row, value in percent.items()
        },
    )


def asked(**changes: Any) -> Asked:
    """A benchmark, asked as the paper asks it."""
    whole = Asked(
        versions=("1",),
        lm_eval="0.4",
        data="hub",
        num_rows=100,
        num_rows_held=100,
        num_shots=5,
        num_shots_wanted=5,
        answer_tokens=256,
        answer_tokens_wanted=256,
        num_cut=0,
        shots_without_reasoning=False,
        chat_template=False,
        precision="float32",
        backend="transformers",
        batch_size=1,
    )
    return whole.model_copy(update=changes)


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


def test_what_was_asked_otherwise_is_noted_and_has_no_difference_to_the_paper() -> None:
    """Nor has any average that it is part of; what was asked in full has one."""
    whole = {"gsm8k": asked(), "mmlu": asked()}
    few = card(scores()).model_copy(update={"benchmarks": whole | {"gsm8k": asked(num_shots=3)}})
    full = card(scores()).model_copy(update={"benchmarks": whole})
    ours = table({"L3b": [few, full], "L3i": [full]})
    assert ours.notes == ("gsm8k: 3 of 5 shots (L3b)",)
    made = beside(ours, paper("forgetting"))
    assert made.notes == ours.notes
    lacking = {row for row in made.rows if made.value(row, "L3b, difference") is None}
    assert lacking == {FLEXIBLE, STRICT, OF_INSTRUCTION, OF_ALL}
    assert all(made.value(row, "L3i, difference") is not None for row in made.rows)
    assert made.value(STRICT, "L3b") == 50.0


def test_seeds_that_were_asked_in_different_ways_are_both_noted() -> None:
    cards = [
        card(scores()).model_copy(update={"benchmarks": {"piqa": asked(num_rows=number)}})
        for number in (100, 40, 30)
    ]
    assert table({"a": cards, "b": cards[1:2]}).notes == (
        "piqa: 40 of 100 questions or 30 of 100 questions (a)",
        "piqa: 40 of 100 questions (b)",
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


def test_columns_that_the_paper_does_not_have_stand_alone() -> None:
    ours = table({"mine": [card(scores())]})
    assert beside(ours, paper("derived")) == ours


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (("L3b+100M", "L3i"), "forgetting"),
        (("mine", "Q2b+2.5Qr"), "portability"),
        (("DocChat",), "derived"),
        (("mine",), "forgetting"),
    ],
)
def test_the_nearest_table_has_most_of_our_columns(columns: tuple[str, ...], name: Name) -> None:
    assert nearest(columns) == name


COST = 6.0 * 1000 * 10**8
"""Of the tokens that a side of `lineage` reads."""
COSTS = {"newer": COST, "tuned": 1e9, "taught": COST / 2, "newer, again": 1e30}


def lineage(seeds: tuple[int, ...] = (1, 2)) -> Lineages:
    """A study of table 2 with scores of the paper's benchmarks: two points of a base and grafts."""
    values = {
        "L3b": 50.0,
        "newer@50000000": 52.0,
        "newer": 54.0,
        "L3i": 60.0,
        "tuned": 58.0,
        "taught": 57.0,
    }
    values |= {"L3b+50M+3Lr": 61.0, "L3b+100M+3Lr": 62.0}
    arms = tuple(
        ArmResult(
            arm=arm,
            words=arm,
            scorecards=tuple(card(scores(value + seed), seed, arm) for seed in seeds),
        )
        for arm, value in values.items()
    )
    residual = ("L3b", "L3i")
    return Lineages(
        name="table2",
        question="Which?",
        verdict="Some.",
        seeds=seeds,
        models={
            **{name: Made(made_of=(), words="as it comes") for name in residual},
            "newer": Made(made_of=("L3b",), words="reads", num_tokens=10**8, pretrained=True),
            "tuned": Made(made_of=("newer",), words="tuned on x", num_tokens=10**6),
            "taught": Made(made_of=("L3b",), words="tuned on x", num_tokens=10**6),
            "L3b+50M+3Lr": Made(made_of=("newer@50000000", *residual), words="plus"),
            "L3b+100M+3Lr": Made(made_of=("newer", *residual), words="plus"),
        },
        arms=arms,
        summary=summarise(one for arm in arms for one in arm.scorecards),
        score=PAPER_ROWS[MMLU],
        against=None,
        comparisons=(),
        axis="tokens read",
        lines={},
        forecasts=(),
        num_left_out={},
        residual={},
        losses={},
        learning_rates={},
        costs=tuple(
            StageCost(stage=f"{name}, seed {seed}", seconds=1, flops=flops * (1 + seed / 10))
            for seed in seeds
            for name, flops in COSTS.items()
        ),
        settings={},
        inputs={},
        versions={"fedgraft": "0.1.0"},
    )


def test_the_arms_of_a_study_are_called_as_in_the_paper() -> None:
    asked = asked_of(lineage())
    assert asked
    assert tuple(asked.columns) == (
        *("L3b", "L3b+50M", "L3b+100M", "L3i", "tuned", "taught"),
        *("L3b+50M+3Lr", "L3b+100M+3Lr"),
    )
    assert asked.table.value(MMLU, "L3b+100M") == pytest.approx(55.5)
    assert [curve.name for curve in curves(asked.table.columns)] == ["L3b", "L3b+3Lr"]


def test_compute_is_what_the_stages_of_a_model_and_of_what_it_is_made_of_took() -> None:
    asked = asked_of(lineage())
    assert asked
    mean = 1.15  # of the two seeds
    assert asked.flops == pytest.approx(
        {
            "L3b": 0,
            "L3i": 0,
            "L3b+50M": COST / 2 * mean,
            "L3b+100M": COST * mean,
            "L3b+50M+3Lr": COST / 2 * mean,
            "L3b+100M+3Lr": COST * mean,
            "tuned": (COST + 1e9) * mean,
            "taught": COST / 2 * mean,
        }
    )


def test_a_study_of_arms_has_its_columns_and_costs_too() -> None:
    asked = asked_of(of_arms())
    assert asked
    assert tuple(asked.columns) == (
        *("base", "base+400k", "instruct", "instruct+400k", "base+400k+residual"),
    )
    reading = 6.0 * 2_360_000 * 400_000
    assert [asked.flops[c] for c in asked.columns] == [0, reading, 0, reading, reading]


def of_arms() -> Result:
    result = example_result()
    return result.model_copy(
        update={
            "arms": tuple(
                arm.model_copy(
                    update={
                        "scorecards": tuple(together(one, card(scores())) for one in arm.scorecards)
                    }
                )
                for arm in result.arms
            )
        }
    )


def test_a_study_that_asked_no_benchmark_is_refused_with_the_remedy(tmp_path: Path) -> None:
    example_result().write(tmp_path)
    assert asked_of(example_result()) is None
    with pytest.raises(StudyError, match=r"were asked the paper's benchmarks, found none of their"):
        load_asked(tmp_path)
    example_forgetting((1,)).write(tmp_path)
    with pytest.raises(StudyError, match="give the file of a study of lineages `benchmarks:`"):
        load_asked(tmp_path)


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
