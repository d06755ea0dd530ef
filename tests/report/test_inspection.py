"""The page of an inspection shows every figure as a number, and says first what to expect."""

import html
import re
from pathlib import Path

import pytest
from tests.report.pages import only_sorts
from tests.weights.checkpoints import nudged, random_tensors, save

from fedgraft.errors import ArtefactError
from fedgraft.provenance import Record
from fedgraft.report.inspection import TITLES, rank, render, share, signed, write_inspection
from fedgraft.weights.family import Family
from fedgraft.weights.inspection import Inspection, inspect
from fedgraft.weights.residual import extract


def text_of(page: str) -> str:
    """What a reader sees of a page, spaces joined."""
    shown = re.sub(r"<(style|title)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", shown)).split())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Inspection]:
    """A residual with and without a newer base."""
    folder = tmp_path_factory.mktemp("family")
    base = random_tensors()
    family = Family.open(save(folder / "base", base), save(folder / "instruct", nudged(base)))
    newer = save(folder / "newer", nudged(base, seed=2))
    residual = extract(family, folder / "residual")
    return {
        "beside": inspect(residual, family.base, newer_base=newer),
        "alone": inspect(residual, family.base),
    }


def test_the_same_inspection_gives_the_same_page(
    found: dict[str, Inspection], tmp_path: Path
) -> None:
    page = write_inspection(found["beside"], tmp_path / "out")
    assert page.read_text(encoding="utf-8") == render(found["beside"])
    names = {file.name for file in page.parent.iterdir()}
    assert names == {"inspection.html", "inspection.json", "fedgraft.json"}
    record = Record.read(page.parent)
    assert record
    assert (record.kind, record.inputs) == ("inspection", found["beside"].inputs)


@pytest.mark.parametrize("which", ["beside", "alone"])
def test_the_figures_on_disk_are_the_figures(
    found: dict[str, Inspection], which: str, tmp_path: Path
) -> None:
    page = write_inspection(found[which], tmp_path / "out")
    text = page.with_name("inspection.json").read_bytes()
    assert Inspection.model_validate_json(text) == found[which]


def test_what_is_there_is_not_written_over(found: dict[str, Inspection], tmp_path: Path) -> None:
    write_inspection(found["alone"], tmp_path / "out")
    with pytest.raises(ArtefactError, match="exists already"):
        write_inspection(found["alone"], tmp_path / "out")
    write_inspection(found["beside"], tmp_path / "out", overwrite=True)


def test_the_page_refers_to_nothing_outside_itself(found: dict[str, Inspection]) -> None:
    page = render(found["beside"])
    assert re.findall(r'(?:src|href)="(?!#)', page) == []
    assert re.findall(r"url\((?!#)", page) == []
    assert only_sorts(page)
    assert "<link" not in page


@pytest.mark.parametrize("which", ["beside", "alone"])
def test_the_forecast_is_read_first(found: dict[str, Inspection], which: str) -> None:
    forecast = found[which].forecast
    words = text_of(render(found[which])).partition("Layer by layer")[0]
    assert TITLES[forecast.outcome] in words
    assert forecast.words in words


def test_every_cell_of_a_heat_map_can_be_read_as_a_number(found: dict[str, Inspection]) -> None:
    page = render(found["beside"])
    maps = page.split('aria-label="')[1:]
    assert [title.partition('"')[0] for title in maps] == [
        "What instruction tuning changed",
        "What continued pre-training changed",
        "How strong is the strongest direction of that change?",
        "Do the two point the same way?",
        "Do their signs conflict?",
        "How many directions the residual has",
    ]
    cells = found["beside"].cells
    assert set(cells) == {"mlp.up_proj", "norm"}
    for layer in (0, 1):
        for text, module in zip(maps[:1] * 2, ("mlp.up_proj", "norm"), strict=True):
            assert f">{share(cells[module][layer].relative_norm)}</td>" in text
        change = cells["norm"][layer].change
        assert change
        assert f">{signed(change.cosine)}</td>" in maps[3]
    assert "norm" not in re.findall(r"<th>(\w+)</th>", maps[5]), "a vector has no directions"


def test_without_a_newer_base_no_change_is_shown(found: dict[str, Inspection]) -> None:
    page = render(found["alone"])
    assert page.count('aria-label="') == 2
    assert "cosine</th>" not in page


def test_a_layer_without_a_module_has_an_empty_cell(found: dict[str, Inspection]) -> None:
    cells = {**found["alone"].cells, "norm": {1: found["alone"].cells["norm"][1]}}
    page = render(found["alone"].model_copy(update={"cells": cells}))
    assert re.search(r"<tr><th>0</th><td style=[^>]*>[^<]+</td><td></td></tr>", page)


def test_what_has_no_meaning_is_none_never_zero() -> None:
    assert {words(None) for words in (share, signed, rank)} == {"none"}


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (share(0.1651), "16.5%"),
        (share(0.00123), "0.12%"),
        (share(0.0), "0.0%"),
        (signed(-0.213), "-0.21"),
        (signed(-0.001), "+0.00"),
        (rank(2.86), "2.9"),
        (rank(61.4), "61"),
    ],
)
def test_numbers_are_short_and_keep_what_matters(shown: str, words: str) -> None:
    assert shown == words
