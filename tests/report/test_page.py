"""The report says what came out, needs nothing else, and never turns missing into zero."""

import html
import re
from pathlib import Path
from typing import get_args

import pytest
from tests.report.example import example_result
from tests.report.pages import only_sorts
from tests.study.test_tables import card, scores

from fedgraft.errors import ReportError
from fedgraft.evaluation.gate import Decision, Finding, Reason
from fedgraft.report import figures
from fedgraft.report.page import render, write_report
from fedgraft.report.words import count, duration, power, score_words
from fedgraft.study.comparison import summarise
from fedgraft.study.result import Result


def text_of(page: str) -> str:
    """What a reader sees of a page, spaces joined."""
    shown = re.sub(r"<(style|title|script)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", shown)).split())


def without(result: Result, arm: str, score: str) -> Result:
    """The result as it would be, had one arm not been scored on something."""
    arms = tuple(
        one.model_copy(
            update={
                "scorecards": tuple(
                    card.model_copy(
                        update={"scores": {n: s for n, s in card.scores.items() if n != score}}
                    )
                    for card in one.scorecards
                )
            }
        )
        if one.arm == arm
        else one
        for one in result.arms
    )
    summary = {
        name: {n: s for n, s in scores.items() if (name, n) != (arm, score)}
        for name, scores in result.summary.items()
    }
    return result.model_copy(update={"arms": arms, "summary": summary})


@pytest.fixture(scope="module")
def page() -> str:
    return render(example_result())


def test_the_same_result_gives_the_same_page(page: str, tmp_path: Path) -> None:
    example_result().write(tmp_path)
    assert write_report(tmp_path).read_text(encoding="utf-8") == page
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "result.json"]


def test_the_page_refers_to_nothing_outside_itself(page: str) -> None:
    assert re.findall(r'(?:src|href)="(?!#)', page) == []
    assert re.findall(r"url\((?!#)", page) == []
    assert only_sorts(page)
    assert "<link" not in page


def test_the_verdict_stands_before_any_figure(page: str) -> None:
    verdict = example_result().verdict
    assert page.index(verdict) < page.index("<svg")


def test_every_claim_shows_its_bar_what_was_measured_and_whether_it_held(page: str) -> None:
    text = text_of(page)
    for claim in example_result().claims:
        reached = "✓ reached" if claim.reached else "✗ not reached"
        assert f"{claim.text} {claim.target} {claim.measured} {reached}" in text


def test_a_claim_that_failed_is_shown_as_failed() -> None:
    result = example_result()
    failed = result.claims[0].model_copy(update={"reached": False})
    text = text_of(render(result.model_copy(update={"claims": (failed,)})))
    assert "✗ not reached" in text
    assert "✓ reached" not in text


def test_a_missing_score_is_shown_as_missing_never_as_zero() -> None:
    score = "knowledge/asked/new"
    text = text_of(render(without(example_result(), "s1", score)))
    row = text[text.index("new facts known, asked in chat 2.0%") :]
    assert row.startswith("new facts known, asked in chat 2.0% 5.0% missing 8.0%")
    plot = text[text.index("New knowledge") : text.index("Share of plain questions")]
    assert "missing" in plot
    assert "0.0%" not in plot


def test_a_department_without_perplexity_of_an_arm_is_named_missing() -> None:
    result = without(example_result(), "graft", "perplexity/hr/nats_per_token")
    assert "graft missing" in text_of(render(result))


def test_real_departments_without_dialogues_have_a_page_too() -> None:
    text = text_of(render(example_result((1,), with_dialogues=False)))
    assert "How well each department's text is predicted" in text
    assert "Forgetting, and the graft" not in text
    assert "missing" in text  # what the adapters' dialogues would have said
    assert "One seed; run more for a spread." in text


def test_a_study_that_never_tuned_says_the_cost_of_tuning_is_missing() -> None:
    costs = {"pretraining_flops": 6e12, "graft_flops": 4e6}
    text = text_of(render(example_result().model_copy(update={"tuning": costs})))
    plot = text[text.index("What it costs, in operations") :]
    assert "missing" in plot[: plot.index("Floating-point")]


def test_text_of_a_model_cannot_become_markup(page: str) -> None:
    assert "The the office of &lt;b&gt;the&lt;/b&gt; office" in page


def test_the_reasons_of_the_gate_hashes_and_settings_are_on_the_page(page: str) -> None:
    text = text_of(page)
    for decision in example_result().decisions:
        for reason in decision.reasons:
            assert reason.text in text
    assert "sha256:" + "1a" * 32 in text
    assert "pretrain.learning_rate 0.0005" in text


def test_no_path_of_this_machine_is_on_the_page(page: str) -> None:
    assert "/a/place" not in page
    assert "…/weights/base" in page


def test_a_folder_without_a_result_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"result\.json, found nothing.*fedgraft study run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "result.json").mkdir()
    with pytest.raises(ReportError, match=r"result\.json: expected the result .* Is a directory"):
        write_report(tmp_path)


def test_places_on_an_axis_are_told_in_three_digits() -> None:
    at, y = (401_152.0, 999_999.0, 25_000.0), (1.0, 2.0, 3.0)
    series = figures.Series(name="S2", colour=figures.BLUE, x=at, y=y, low=y, high=y)
    plot = figures.curves([series], levels=[], x_label="parameters", y_label="%")
    assert {"401k", "1M", "25k"} <= set(re.findall(r"<text[^>]*>([^<]*)<", plot))


def test_a_sign_of_money_in_a_name_is_no_mathematics() -> None:
    """Between two of them stands mathematics to matplotlib, and some of it is refused."""
    names = (r"up to $5 or \fine$", "free")
    series = [
        figures.Series(name=name, colour=figures.BLUE, x=(1, 2), y=(1, 2), low=(1, 2), high=(1, 2))
        for name in names
    ]
    plot = figures.curves(series, levels=[], x_label="tokens", y_label="cost, $")
    assert {*names, "cost, $"} <= set(re.findall(r"<text[^>]*>([^<]*)<", plot))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.312, "0.31 s"),
        (44.5, "44 s"),
        (125.0, "2 min 05 s"),
        (12_000.0, "3 h 20 min"),
        (1_036_800.0, "12 days"),
    ],
)
def test_time_is_told_as_people_tell_it(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_numbers_are_told_as_people_tell_them() -> None:
    assert [count(n) for n in (17, 400_000, 2.36e6, 204.8e9)] == ["17", "400k", "2.36M", "205B"]
    assert power(5.7e12) == "5.7 × 10¹²"


def test_scores_are_named_in_words() -> None:
    assert score_words("instructions/prompt_strict") == "prompts followed in full"
    assert score_words("instructions/prompt_strict/unseen_pairs") == (
        "prompts followed in full: unseen pairs"
    )
    assert score_words("perplexity/it_support/nats_per_token") == (
        "it support text, nats per token"
    )


def test_arms_are_compared_in_words_that_say_what_cannot_be_told(page: str) -> None:
    text = text_of(page)
    part = text[text.index("Compared, example by example") : text.index("The arms, score by score")]
    assert "Score graft against instruct graft against S1 S1 against instruct" in part
    row = part[part.index("prompts followed in full") :]
    assert row.startswith("prompts followed in full ▼ worse by 7.0 points (0.8 to 13.3) ▲ better")
    assert "old facts known, asked in chat cannot be told apart (-" in row


def test_what_was_not_scored_in_one_arm_cannot_be_compared() -> None:
    result = example_result()
    gone = [
        one.model_copy(update={"difference": None}) if one.against == "s1" else one
        for one in result.comparisons
    ]
    text = text_of(render(result.model_copy(update={"comparisons": tuple(gone)})))
    part = text[text.index("Compared, example by example") :]
    row = part[part.index("prompts followed in full") :]
    assert re.match(r"prompts followed in full ▼ worse by 7.0 points \([^)]*\) missing ▼", row)
    assert "graft against S1 missing" in part  # in the plot


def test_each_finding_of_the_gate_has_its_own_sign() -> None:
    findings: tuple[Finding, ...] = get_args(Finding)
    reasons = tuple(Reason(finding=one, text=f"it is {one}") for one in findings)
    decision = Decision(candidate="graft", verdict="refuse", reasons=reasons)
    shown = render(example_result().model_copy(update={"decisions": (decision,)}))
    for finding, sign in zip(findings, ("good", "bad", "open", "bad"), strict=True):
        assert f'<li class="{sign}">it is {finding}</li>' in shown


def test_what_it_took_is_told_beside_what_was_expected(page: str) -> None:
    text = text_of(page)
    part = text[text.index("What it took") : text.index("The residual num parameters")]
    # six runs of 115.3 s; 271.8 s measured; 3.1e13 operations at 1e11 a second
    assert "training 6 3.4 × 10¹³ 3.1 × 10¹³ 11 min 32 s 4 min 32 s 115%" in part
    assert "0.012 0.0045 0.0035 0.0014" in part
    assert "everything, scoring too" in part
    assert "it was not metered" in part


def test_an_estimate_that_was_not_made_is_missing_and_without_prices_there_is_no_money() -> None:
    bare = example_result().model_copy(update={"estimates": (), "prices": None})
    text = text_of(render(bare))
    part = text[text.index("What it took") : text.index("The residual num parameters")]
    assert "training missing 4 min 32 s missing" in part
    assert "EUR" not in part
    assert "kWh" not in part


def test_benchmarks_stand_in_the_papers_layout() -> None:
    result = example_result()
    arms = tuple(
        arm.model_copy(
            update={
                "scorecards": tuple(
                    one.model_copy(update={"scores": {**one.scores, **card(scores()).scores}})
                    for one in arm.scorecards
                )
            }
        )
        for arm in result.arms
    )
    summary = {
        arm.arm: result.summary[arm.arm] | summarise(arm.scorecards)[arm.arm] for arm in arms
    }
    text = text_of(render(result.model_copy(update={"arms": arms, "summary": summary})))
    head = "Benchmark Metric base base +400k instruct instruct +400k base +400k +residual"
    assert head in text
    assert "MMLU acc 50.00 50.00 50.00 50.00 50.00" in text
    assert "Benchmark Metric" not in text_of(render(result))
