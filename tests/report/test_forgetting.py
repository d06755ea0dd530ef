"""The page of a study of forgetting shows every curve, what is missing, and what follows."""

import re
from pathlib import Path

import pytest
from tests.report.example import example_forgetting
from tests.report.pages import after, only_sorts
from tests.report.test_page import text_of

from fedgraft.evaluation.scorecard import FOLLOWED
from fedgraft.report.forgetting import way_words
from fedgraft.report.page import render, write_report
from fedgraft.study.result import NEW_FACTS, Forgetting, Way


@pytest.fixture(scope="module")
def page() -> str:
    return render(example_forgetting())


def of_one_way(seeds: tuple[int, ...] = (1, 2, 3)) -> Forgetting:
    """A result of one rate and without replay, which is drawn in a quarter of the time."""
    result = example_forgetting(seeds)
    way = result.curves[0].way
    curves = tuple(point for point in result.curves if point.way == way)
    return result.model_copy(update={"curves": curves})


def without(result: Forgetting, arm: str, score: str, num_tokens: int | None = None) -> Forgetting:
    """The result as it would be, had an arm not been scored on something (at some point)."""
    curves = tuple(
        point.model_copy(update={"scores": {n: s for n, s in point.scores.items() if n != score}})
        if point.arm == arm and num_tokens in (None, point.num_tokens)
        else point
        for point in result.curves
    )
    return result.model_copy(update={"curves": curves})


def part(text: str, start: str, end: str) -> str:
    begin = text.index(start)
    return text[begin : text.index(end, begin)]


def test_the_same_result_gives_the_same_page(page: str, tmp_path: Path) -> None:
    example_forgetting().write(tmp_path)
    assert write_report(tmp_path).read_text(encoding="utf-8") == page


def test_the_page_refers_to_nothing_outside_itself(page: str) -> None:
    assert re.findall(r'(?:src|href)="(?!#)', page) == []
    assert re.findall(r"url\((?!#)", page) == []
    assert only_sorts(page)


def test_the_verdict_stands_before_any_figure(page: str) -> None:
    assert page.index(example_forgetting().verdict) < page.index("<svg")


def test_each_score_has_a_panel_for_each_rate_and_share_of_replay(page: str) -> None:
    for title in ("Instructions followed", "Old facts", "New facts", "Held-out new text"):
        for rate in (2e-4, 4e-4):
            for replay in (0.0, 0.3):
                words = way_words(Way(learning_rate=rate, replay=replay)).capitalize()
                assert f'aria-label="{title}: {words}"' in page


def test_every_mean_and_spread_of_the_curves_is_in_the_table(page: str) -> None:
    text = part(text_of(page), "Instructions followed, in figures", "Old facts")
    for point in example_forgetting().curves:
        score = point.scores[FOLLOWED]
        assert score.stdev is not None
        assert f"{score.mean:.1%} ± {100 * score.stdev:.1f}" in text
    assert "As they came 0 94.0% 0.0% 94.0%" in text


def test_a_point_that_is_missing_is_said_in_the_table_and_in_the_plot() -> None:
    text = text_of(render(without(of_one_way(), "s1", NEW_FACTS, 100_000)))
    new = part(text, "New facts", "Held-out new text")
    assert new.count("S1, in part missing") == 1
    assert "100k missing " in new
    assert "missing" not in part(text, "Instructions followed", "New facts")


def test_a_score_that_no_arm_has_gets_no_section() -> None:
    result = of_one_way()
    for arm in ("s1", "pretrained_base", "graft"):
        result = without(result, arm, NEW_FACTS)
    text = text_of(render(result))
    assert "New facts, in figures" not in text
    assert "Old facts, in figures" in text


def test_the_arms_of_each_way_are_compared_in_words(page: str) -> None:
    text = part(text_of(page), "Compared, example by example", "What a point of following costs")
    assert "After 400k tokens. Both models of a pair answered the same examples" in text
    for title in ("Learning rate 0.0002, no replay", "Learning rate 0.0004, replay 30%"):
        assert title in text
    row = text[text.index("Learning rate 0.0004, no replay prompts followed in full") :]
    assert "▲ better by 50.0 points (" in row
    assert "cannot be told apart (" in row


def test_a_click_sorts_the_rows_below_the_title_of_each_part(page: str, tmp_path: Path) -> None:
    click = "document.querySelectorAll('thead th')[1].click();"
    before, by_s1 = (table(after(page, click * n, tmp_path)) for n in (0, 2))  # S1 falls as it is
    titles = [place for place, row in enumerate(before) if "earning rate" in row]
    assert [by_s1[place] for place in titles] == [before[place] for place in titles]
    assert by_s1 != before


def table(page: str) -> list[str]:
    """The rows of the first table."""
    body = page[page.index("<tbody") : page.index("</table>")]
    return [text_of(row) for row in re.findall(r"<tr.*?</tr>", body, re.DOTALL)]


def test_domains_stand_nearest_first_with_what_they_cost(page: str) -> None:
    table = part(text_of(page), "Text tokens read", "How the runs went")
    names = ("company, year 2", "real finance", "news", "real it support")
    assert [table.index(name) for name in names] == sorted(table.index(name) for name in names)
    assert "company, year 2 100k 2.900 1.950 ± 0.071 1.950 ± 0.071 -26.7 ± 3.5 -1.7 ± 3.5" in table


def test_a_domain_whose_loss_is_missing_is_named_missing() -> None:
    result = of_one_way()
    news = result.domains[1].model_copy(update={"arms": {"s1": {}, "graft": {}}})
    domains = (result.domains[0], news, *result.domains[2:])
    text = text_of(render(result.model_copy(update={"domains": domains})))
    assert "news missing" in part(text, "Does a farther text", "Text tokens read")
    assert "news 100k 4.600 missing missing missing missing" in text


def test_a_study_without_domains_says_nothing_of_them() -> None:
    text = text_of(render(of_one_way().model_copy(update={"domains": ()})))
    assert "Does a farther text cost more?" not in text


def test_the_runs_show_their_losses_and_their_learning_rates(page: str) -> None:
    text = part(text_of(page), "How the runs went", "How it was made")
    assert "Loss: learning rate 0.0002, no replay" in text
    assert "Loss: learning rate 0.0004, replay 30%" in text
    assert "Constant after its warm-up" in text
    assert text.count("rate 0.0002") == text.count("rate 0.0004") == 3  # two losses, one rate


def test_one_seed_is_told_as_one_seed() -> None:
    text = text_of(render(of_one_way((1,))))
    assert "One seed; run more for a spread." in text
    assert "±" not in part(text, "Instructions followed, in figures", "Old facts")


def test_following_is_drawn_against_compute_too() -> None:
    text = render(example_forgetting())
    part = text[text.index("Score against compute") :]
    assert "FLOPs of continued pre-training, 6 × parameters × tokens" in part
    assert "FLOPs more, two a parameter." in part
