"""Tables in every form say the same; pages sort by a click, and are whole without it."""

import csv
import io
import re
from pathlib import Path

import pytest
from tests.report.pages import after, only_sorts
from tests.study.test_tables import asked, card, lineage, scores

from fedgraft.report.tables import (
    as_csv,
    as_html,
    as_latex,
    as_markdown,
    compute_plot,
    figure_1,
    figure_2,
    render,
    write_tables,
)
from fedgraft.study.tables import MMLU, NAMES, Name, Table, asked_of, beside, paper, table


@pytest.fixture(scope="module")
def page() -> str:
    return render({name: paper(name) for name in NAMES})


@pytest.fixture
def gap() -> Table:
    """A table of two models, one of which was not asked MMLU."""
    part = {row: value for row, value in scores().items() if row != MMLU}
    return table({"L3b": [card(scores())], "L3i": [card(part)]})


@pytest.mark.parametrize("name", NAMES)
def test_csv_is_read_as_the_numbers_that_the_paper_prints(name: Name) -> None:
    header, *lines = csv.reader(io.StringIO(as_csv(paper(name))))
    assert tuple(header[2:]) == paper(name).columns
    found = {(one[0], one[1]): tuple(map(float, one[2:])) for one in lines}
    assert found == dict(paper(name).rows)


def test_the_best_is_bold_and_the_second_underlined_in_every_form() -> None:
    made = paper("derived")
    line = {
        "md": "| MMLU | acc | <ins>62.96</ins> | 62.31 | **65.35** |",
        "tex": r"MMLU & acc & \underline{62.96} & 62.31 & \textbf{65.35} \\",
        "html": "<u>62.96</u>",
    }
    assert line["md"] in as_markdown(made)
    assert line["tex"] in as_latex(made)
    assert line["html"] in as_html(made)
    assert "<b>65.35</b>" in as_html(made)


def test_what_is_missing_is_said_and_is_never_zero(gap: Table) -> None:
    assert "MMLU,acc,50.00,\n" in as_csv(gap)
    assert "| MMLU | acc | 50.00 | missing |" in as_markdown(gap)
    assert r"MMLU & acc & 50.00 & missing \\" in as_latex(gap)
    assert as_html(gap).count('<span class="missing">missing</span>') == 3
    for text in (as_csv(gap), as_markdown(gap), as_latex(gap), as_html(gap)):
        assert not re.search(r"\b0\.00\b", text)


def test_what_was_asked_otherwise_is_said_below_the_table_in_every_form() -> None:
    few = {"mmlu_pro": asked(num_rows=40)}
    made = table({"L3b": [card(scores()).model_copy(update={"benchmarks": few})]})
    told = "mmlu_pro: 40 of 100 questions (L3b)"
    assert as_markdown(made).endswith(f"difference is taken:\n\n- {told}\n")
    assert as_latex(made).endswith(
        r"\end{tabular}"
        "\n"
        r"\par\smallskip\footnotesize Asked otherwise than in the paper, so that no difference is "
        "taken:\n"
        r"\par\smallskip\footnotesize mmlu\_pro: 40 of 100 questions (L3b)"
        "\n"
    )
    assert f"<li>{told}</li>" in as_html(made)
    for form in (as_markdown, as_latex, as_html):
        assert "Asked otherwise" not in form(paper("forgetting"))


def test_the_form_of_gsm8k_has_a_line_of_its_own() -> None:
    (line,) = [line for line in as_markdown(paper("forgetting")).split("\n") if "in form" in line]
    assert line.startswith("| GSM8K | in form, of right | 99.23 |")
    assert line.endswith(" 62.72 | 74.77 | 67.67 |")


def test_differences_have_a_sign_and_are_no_rivals() -> None:
    made = as_markdown(beside(table({"L3b": [card(scores())]}), paper("forgetting")))
    assert "| MMLU | acc | 50.00 | 62.14 | −12.14 |" in made


def test_latex_escapes_what_it_would_take_for_a_sign() -> None:
    made = as_latex(paper("derived"))
    assert r"ILL\_acc" in made
    assert not re.search(r"(?<!\\)_", made)
    assert made.count(r"\midrule") == 2  # after the head, and above the average
    assert made.endswith("\\bottomrule\n\\end{tabular}\n")


def test_figure_1_has_three_panels_with_labels_and_figure_2_is_against_flops() -> None:
    panels = list(figure_1(paper("forgetting")))
    assert [plot.title.split(": ")[1] for plot in panels] == [
        "instruction following",
        "reasoning",
        "truthfulness",
    ]
    for plot in panels:
        for word in ("tokens read", "score, %", "L3b+3Lr", "L3i as it came", "100M", "1B"):
            assert word in plot.svg
    (compute,) = figure_2(paper("forgetting"))
    assert "2.4 × 10¹⁹" in compute.svg  # 6 x 8B x 100M x 5
    assert "2,048 times the first point" in compute.caption
    assert list(figure_1(paper("derived"))) == []


def test_the_page_has_every_table_every_exception_and_nothing_from_outside(page: str) -> None:
    assert page.count("<table") == 3
    assert "Q2b+2.5Qr, Sub-Average reasoning: printed 65.48" in page
    assert only_sorts(page)
    assert re.findall(r'(?:src|href)="(?!#)', page) == []


def test_every_form_is_written_and_the_same_tables_give_the_same_bytes(tmp_path: Path) -> None:
    for place in ("a", "b"):
        write_tables(tmp_path / place)
    names = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert names == sorted(
        ["tables.html", *(f"{n}.{s}" for n in NAMES for s in ("csv", "md", "tex"))]
    )
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_ours_are_written_beside_the_one_that_is_asked_for(tmp_path: Path, gap: Table) -> None:
    page = write_tables(tmp_path, gap, "portability")
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".csv", ".html", ".md", ".tex"]
    assert "Our models in the paper" in page.read_text(encoding="utf-8")


def test_ours_have_both_figures_beside_the_papers(tmp_path: Path) -> None:
    asked = asked_of(lineage())
    assert asked
    page = write_tables(tmp_path, asked.table, "forgetting", asked.flops).read_text("utf-8")
    ours, printed = page[page.index("The figures") :].split("The paper's figures")
    for part, words in (
        (ours, "FLOPs of all training that the model came of"),
        (printed, "FLOPs of continued pre-training: 6 × parameters × tokens × epochs"),
    ):
        assert part.count('aria-label="Figure 1') == 3
        assert part.count('aria-label="Figure 2') == 1
        assert words in part
    assert "L3b+100M, difference" in page.replace("<wbr>", "")


def test_figure_2_of_ours_has_a_line_of_points_a_mark_alone_and_levels() -> None:
    asked = asked_of(lineage())
    assert asked
    (plot,) = compute_plot(asked.table, asked.flops)
    for word in (
        "MMLU, %",
        ">L3b+3Lr<",
        ">tuned<",
        ">L3i, not trained<",
        ">L3b, not trained<",
        "6.9 × 10¹¹",
        "3.4 × 10¹¹",
    ):
        assert word in plot.svg, word
    assert plot.svg.count("6.9 × 10¹¹") == 1  # of what lies as close as tuned to its newer base
    assert list(compute_plot(asked.table, dict.fromkeys(asked.flops, 0.0))) == []


def test_models_that_the_paper_does_not_have_stand_above_its_table(tmp_path: Path) -> None:
    page = write_tables(tmp_path, table({"mine": [card(scores())]})).read_text("utf-8")
    assert "none is called as one of the paper&#39;s models" in page.replace("'", "&#39;")
    assert page.index("<h2>Our models</h2>") < page.index("with and without the residual, as print")
    assert page.count("<table") == 2


def column(page: str, number: int) -> list[str]:
    """What stands in a column of the first table."""
    body = page[: page.index("</table>")]
    rows = re.findall(r"<tr.*?</tr>", body[body.index("<tbody") :], re.DOTALL)
    cells = [re.findall(r"<td.*?</td>", row, re.DOTALL)[number] for row in rows]
    return [re.sub(r"<[^>]*>", "", cell).strip() for cell in cells]


CLICK = "document.querySelectorAll('thead th')[2].click();"


def test_a_click_sorts_within_the_parts_of_a_table_and_a_third_one_puts_it_back(
    page: str, tmp_path: Path
) -> None:
    before = column(page, 2)
    down, up, back = (column(after(page, CLICK * n, tmp_path), 2) for n in (1, 2, 3))
    for part in (slice(0, 9), slice(10, 17)):
        numbers = [float(value) for value in before[part]]
        assert [float(value) for value in down[part]] == sorted(numbers, reverse=True)
        assert [float(value) for value in up[part]] == sorted(numbers)
    assert [down[9], down[17]] == [before[9], before[17]]  # averages stay where they are
    assert back == before


def test_what_is_missing_comes_last_however_it_is_sorted(gap: Table, tmp_path: Path) -> None:
    page = render({"forgetting": gap}, gap)
    click = CLICK.replace("[2]", "[3]")
    for times in (1, 2):
        assert column(after(page, click * times, tmp_path), 3)[8] == "missing"
