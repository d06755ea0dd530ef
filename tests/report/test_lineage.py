"""The page of a study of lineages says how models were made, what they do, and what is missing."""

import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from tests.report.pages import only_sorts

from fedgraft.evaluation.scorecard import FOLLOWED, RESPONSE_NATS, Example, Score, Scorecard
from fedgraft.report.page import render, write_report
from fedgraft.study.comparison import compare, summarise
from fedgraft.study.result import ArmResult, Forecast, Lineages, Made

TEXT = "perplexity/hr/nats_per_token"
LESSONS = f"{RESPONSE_NATS}/lessons"
TUNED = ("few", "many")
VALUES = {"instruct": 0.9, "graft": 0.8, "few": 0.5, "many": 0.85}


def card(arm: str, seed: int | None, followed: float | None, text: float = 2.0) -> Scorecard:
    scores = {
        TEXT: Score(value=text, num=9, stderr=0, unit="nats"),
        LESSONS: Score(value=text / 2, num=9, stderr=0, unit="nats"),
        f"{LESSONS}, tuned on": Score(value=text / 4, num=9, stderr=0, unit="nats"),
        "benchmark/mmlu/acc": Score(value=0.25, num=9, stderr=0, unit="share"),
        "benchmark/mmlu/acc/anatomy": Score(value=0.5, num=9, stderr=0, unit="share"),
        "instructions/prompt_strict/old": Score(value=0.123, num=9, stderr=0, unit="share"),
    }
    if followed is not None:
        scores[FOLLOWED] = Score(value=followed, num=9, stderr=0, unit="share")
    said = Example(prompt="Who?", answer=f"{arm} & co", right=None, as_instructed=True)
    return Scorecard(arm=arm, seed=seed, scores=scores, examples=(said,))


def result(*, lines: bool = True, without: str = "", **changes: Any) -> Lineages:
    cards = {
        arm: [
            card(arm, seed, None if arm == without else value + (seed or 0) / 100)
            for seed in ((None,) if arm == "instruct" else (1, 2, 3))
        ]
        for arm, value in VALUES.items()
    }
    whole = Lineages(
        name="tiny",
        question="Which?",
        verdict="Some <b>are</b>.",
        seeds=(1, 2, 3),
        models={
            **{name: Made(made_of=(), words="as it comes") for name in ("base", "instruct")},
            **{name: Made(made_of=("base",), words="tuned", num_tokens=9) for name in TUNED},
            "graft": Made(made_of=("base", "instruct"), words="plus 1 x (instruct - base)"),
        },
        arms=tuple(
            ArmResult(arm=arm, words=f"what {arm} is", scorecards=tuple(found))
            for arm, found in cards.items()
        ),
        summary=summarise(one for found in cards.values() for one in found),
        score=FOLLOWED,
        against="graft",
        comparisons=compare(
            cards, [(arm, "graft") for arm in VALUES if arm != "graft"], score=FOLLOWED
        ),
        axis="dialogues tuned on",
        lines={"S2": ((10.0, "few"), (1000.0, "many"))} if lines else {},
        forecasts=tuple(
            Forecast(
                arm="graft",
                seed=seed,
                residual="instruct - base",
                target="newer",
                relative_norm=0.165,
                effective_rank=None,
                residual_strength=0.15,
                strength=0.094,
                outcome="holds" if seed < 3 else "doubtful",
                kept=0.9 if seed < 3 else None,
            )
            for seed in (1, 2, 3)
        ),
        num_left_out={"lessons": 7, "others": 0},
        residual={"instruct - base, relative norm": 0.165},
        losses={"many, seed 1": ((1, 2.5), (2, 2.0)), "many, seed 2": ((1, 2.4), (2, 2.1))},
        learning_rates={},
        costs=(),
        settings={"name": "tiny"},
        inputs={"base": "blake3:1"},
        versions={"fedgraft": "0.1.0"},
    )
    return whole.model_copy(update=changes)


@pytest.fixture(scope="module")
def page() -> str:
    return render(result())


def row(page: str, name: str, place: int = 0) -> str:
    """The text of a row of a table that begins with a name."""
    rows = re.findall(r"<tr>\s*<td class=\"name\">(?:<i[^>]*></i>)?(.*?)</tr>", page, re.DOTALL)
    ours = [found for found in rows if found.startswith(f"{name}</td>")]
    return re.sub(r"\s+", " ", unescape(re.sub("<[^>]+>", " ", ours[place])))


def part(page: str, start: str, end: str) -> str:
    begin = page.index(start)
    return page[begin : page.index(end, begin)]


def test_the_same_result_gives_the_same_page(page: str, tmp_path: Path) -> None:
    result().write(tmp_path)
    assert write_report(tmp_path).read_text(encoding="utf-8") == page


def test_the_page_refers_to_nothing_outside_itself(page: str) -> None:
    assert re.findall(r'(?:src|href)="(?!#)', page) == []
    assert only_sorts(page)


def test_what_a_file_says_is_text_and_never_markup(page: str) -> None:
    assert "Some &lt;b&gt;are&lt;/b&gt;." in page
    assert "graft &amp; co" in page


def test_each_model_is_compared_with_the_one_that_the_study_names(page: str) -> None:
    told = part(page, "Compared, example by example", "Score by score")
    assert "Each model against graft. Both models of a pair answered the same examples" in told
    assert "over examples and 3 seeds" in told
    assert re.match(r"instruct ▲ better by 8.0 points \(\d", row(told, "instruct"))
    assert re.match(r"few ▼ worse by 30.0 points \(\d", row(told, "few"))
    assert row(told, "many").count("the same") == 4  # text, two kinds of answers, MMLU
    assert '<td class="name">graft' not in told


def test_the_differences_are_drawn_with_their_unit_and_what_it_means(page: str) -> None:
    drawn = part(page, "How far apart, and how sure", "Score by score")
    assert "difference, points" in drawn
    assert "Right of zero the first of the two is better." in drawn
    losses = [c for c in result().comparisons if c.score == TEXT]
    told = render(result(score=TEXT, comparisons=tuple(losses)))
    drawn = part(told, "How far apart, and how sure", "Score by score")
    assert "difference, nats" in drawn
    assert "Left of zero the first of the two is better." in drawn


def test_on_paper_where_nothing_scrolls_each_cell_says_which_score_it_is(page: str) -> None:
    tables = part(page, "Compared, example by example", "Benchmarks, in the layout")
    cells = re.findall(r"<td class=\"(?!name)[^>]*>", tables)
    assert len(cells) > 30
    assert all("data-label=" in cell for cell in cells)
    assert 'data-label="prompts followed in full"' in tables


def test_what_was_not_scored_in_one_arm_is_missing_among_the_comparisons() -> None:
    told = part(render(result(without="few")), "Compared, example by example", "Score by score")
    assert row(told, "few").startswith("few missing")
    assert "few missing" not in row(told, "many")
    drawn = told[told.index("How far apart") :]
    assert "prompts followed in full, against graft missing" in drawn


def test_lines_are_drawn_over_their_axis_beside_the_other_models(page: str) -> None:
    figure = page[page.index("<h2>The picture") : page.index("<h2>What was compared")]
    for words in ("dialogues tuned on", ">S2<", ">graft<", ">instruct<", ">10<", ">1k<"):
        assert words in figure
    assert ">few<" not in figure


def test_above_lines_that_nothing_is_compared_with_stand_the_best_and_the_other_lines_ends() -> (
    None
):
    lines = {"came": ((1.0, "instruct"), (2.0, "graft")), "S2": ((1.0, "few"), (2.0, "many"))}
    page = render(result().model_copy(update={"lines": lines, "against": None, "comparisons": ()}))
    tiles = part(page, "tiles", "The picture")
    assert re.findall(r"in full: (\w+)", tiles)[:2] == ["instruct", "many"]


def test_without_lines_each_model_has_a_bar() -> None:
    figure = render(result(lines=False, axis=""))
    figure = figure[figure.index("<h2>The picture") : figure.index("<h2>What was compared")]
    assert all(f">{arm}<" in figure for arm in VALUES)


def test_a_score_that_was_not_taken_is_missing_and_never_zero() -> None:
    shown = render(result(without="few"))
    assert "missing" in row(shown, "few", 1)
    assert "0.0%" not in row(shown, "few", 1)
    assert "S2, in part missing" in shown


def test_answers_that_were_tuned_on_are_told_apart_from_those_held_out(page: str) -> None:
    assert '<th class="number">answers of lessons, nats per token</th>' in page
    assert '<th class="number">answers of lessons, tuned on, nats per token</th>' in page


def test_benchmarks_stand_in_the_table_and_their_subjects_beside_it(page: str) -> None:
    assert '<th class="number">mmlu, acc</th>' in page[: page.index("By group")]
    assert '<th class="number">mmlu, acc: anatomy</th>' in page[page.index("By group") :]


def test_benchmarks_stand_in_the_papers_layout_with_the_next_step(page: str) -> None:
    told = part(page, "Benchmarks, in the layout of arXiv 2410.10739", "What inspection said")
    assert "<td>MMLU</td><td>acc</td>" in told
    assert "25.00" in told
    assert told.count('<span class="missing">missing</span>') == 4 * 19  # fifteen scores, 4 more
    assert "<pre>fedgraft study tables --study runs/tiny --out runs/tiny/tables</pre>" in told


def test_without_benchmarks_there_is_no_table_of_the_paper() -> None:
    arms = tuple(
        arm.model_copy(
            update={
                "scorecards": tuple(
                    one.model_copy(
                        update={"scores": {n: s for n, s in one.scores.items() if "mmlu" not in n}}
                    )
                    for one in arm.scorecards
                )
            }
        )
        for arm in result().arms
    )
    assert "arXiv 2410.10739" not in render(result(arms=arms))


def test_a_forecast_stands_beside_what_came_of_it(page: str) -> None:
    told = row(page, "graft", 2)
    for words in (
        *("instruct - base on newer", "16.5%", "missing", "15.0%", "9.4%"),
        *("should hold, either way", "90%, 90%"),
    ):
        assert words in told


def test_it_is_said_how_each_model_was_made(page: str) -> None:
    assert row(page, "graft", 3) == "graft base, instruct plus 1 x (instruct - base) "


def test_dialogues_that_were_left_out_are_counted(page: str) -> None:
    assert "7 dialogues of lessons are longer than a row" in page
    assert "dialogues of others" not in page


def test_without_a_reference_nothing_is_compared() -> None:
    shown = render(result(against=None, comparisons=()))
    assert "told apart" not in shown.lower()
    assert "example by example" not in shown.lower()
