"""Laws of a file's coreset: whole lines, each with its reason, and what was left out is told."""

import gzip
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from tests.report.pages import only_sorts

from fedgraft.errors import ArtefactError, SelectionError
from fedgraft.provenance import Record
from fedgraft.report.coreset import CORESET, REASONS, render, write_coreset
from fedgraft.selection.clusters import Clustering
from fedgraft.selection.coreset import Selection, coreset
from fedgraft.selection.projection import Projection, project, shared_map
from fedgraft.selection.reader import Reader
from fedgraft.selection.select import EVERYBODY, select
from fedgraft.testing import save_tiny
from fedgraft.text.tasks import load_examples

PLACES = ("river", "mill", "bakery")
ALIGNED = Selection(
    method="federated",
    budget=0.25,
    projection=Projection(name="random", num_dimensions=4),
    clustering=Clustering(min_cluster_size=2, noise="singletons"),
    server_clustering=Clustering(min_cluster_size=2, noise="singletons"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", num_layers=1)


def row(number: int, *, words: int = 3) -> dict[str, Any]:
    place = PLACES[number % 3]
    return {
        "instruction": f"What is at the {place}? " + "Say it. " * words,
        "response": f"Number {number}.",
        "category": place,
        "owner": f"client {number % 2}",
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    lines = [json.dumps(row(number), indent=None) for number in range(24)]
    lines.insert(5, "")  # a blank line counts
    lines.append(json.dumps(row(24, words=90)))
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_chosen_lines_stand_as_in_the_file_each_with_its_reason(file: Path, model: Path) -> None:
    found = select(file, model, ALIGNED, client_field="owner", window=128)
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(found.lines) == len(found.reasons) == round(0.25 * 24)
    for line, reason in zip(found.lines, found.reasons, strict=True):
        assert lines[reason.line - 1] == line
        assert reason.client == json.loads(line)["owner"]
        assert reason.text.startswith(json.loads(line)["instruction"].strip()[:20])
        assert reason.cluster_size >= 1
    assert [reason.line for reason in found.reasons] == sorted(r.line for r in found.reasons)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_line_ends_at_a_line_feed_and_the_file_may_be_compressed(
    suffix: str, model: Path, tmp_path: Path
) -> None:
    """Other separators of Unicode may stand in JSON as they are."""
    rows = [row(n) | {"response": f"First.\u2028Number {n}.\x85"} for n in range(24)]
    written = "".join(json.dumps(one, ensure_ascii=False) + "\r\n" for one in rows).encode()
    path = tmp_path / f"examples{suffix}"
    path.write_bytes(gzip.compress(written) if suffix.endswith("gz") else written)
    found = select(path, model, ALIGNED, window=128)
    assert [json.loads(line) for line in found.lines] == [rows[r.line - 1] for r in found.reasons]


def test_a_line_longer_than_the_window_is_left_out_and_told(file: Path, model: Path) -> None:
    found = select(file, model, ALIGNED, window=128)
    assert found.too_long == (26,)
    assert len(found.clients) == len(found.clusters) == len(found.plane) == 24
    with pytest.raises(SelectionError, match="expected dialogues of at most 16 tokens, found none"):
        select(file, model, ALIGNED, window=16)


def test_it_is_the_choice_of_a_federation_at_one_place(file: Path, model: Path) -> None:
    found = select(file, model, ALIGNED, window=128, seed=3)
    examples = load_examples(file)[:24]
    features = Reader(model).features(examples, ALIGNED.encoding, window=128)
    _, num_layers, hidden = features.shape
    shared = shared_map(ALIGNED.projection, num_layers=num_layers, hidden=hidden, seed=3)
    points = project(features, ALIGNED.projection, shared=shared)
    chosen = coreset({EVERYBODY: points}, ALIGNED, seed=3)
    assert [one.index for one in chosen] == list(found.chosen)


def test_the_model_may_be_named_as_on_the_hub(
    file: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(model))
    named, plain = (select(file, one, ALIGNED, window=128) for one in ("acme/tiny", model))
    assert named.lines == plain.lines


def test_the_same_call_chooses_the_same(file: Path, model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "features"
    first, second = (
        select(file, model, ALIGNED, client_field="owner", window=128, features=place)
        for place in (None, kept)
    )
    third = select(file, model, ALIGNED, client_field="owner", window=128, features=kept)
    assert first.lines == second.lines == third.lines
    assert np.array_equal(first.plane, third.plane)


def test_a_line_without_its_client_is_told(file: Path, model: Path) -> None:
    with pytest.raises(SelectionError, match=r"line 1: expected its client in the field 'boss'"):
        select(file, model, ALIGNED, client_field="boss", window=128)


def test_answers_that_gain_least_are_passed_over(file: Path, model: Path) -> None:
    picky = ALIGNED.model_copy(update={"quality": 0.5, "budget": 0.5})
    found = select(file, model, picky, window=128)
    assert 0 < len(found.lines) <= 12


def test_nothing_to_choose_from_is_told(file: Path, model: Path) -> None:
    sparse = ALIGNED.model_copy(update={"clustering": Clustering(min_cluster_size=25)})
    with pytest.raises(SelectionError, match="found none among 24 examples of 1 clients; make min"):
        select(file, model, sparse, window=128)


def test_cells_with_noise_are_chosen_from_too(file: Path, model: Path) -> None:
    private = Selection.model_validate(
        {
            "budget": 0.25,
            "projection": {"name": "anchors", "num_dimensions": 4},
            "server_clustering": {"min_cluster_size": 2, "noise": "singletons"},
            "privacy": {
                **{"noise_multiplier": 0.1, "delta": 1e-5, "max_norm": 1.0, "num_cells": 6},
                **{"min_count": 1, "repeatable": True},
            },
        }
    )
    assert select(file, model, private, window=128).lines


def test_documents_are_compared_by_their_beginnings(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "text.jsonl"
    rows = [{"text": f"The {PLACES[n % 3]} has {n} doors. " * 40} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = select(path, model, ALIGNED, window=32)
    assert found.too_long == ()
    assert len(found.lines) == 3


def test_what_is_written_is_whole_and_is_not_overwritten(
    file: Path, model: Path, tmp_path: Path
) -> None:
    found = select(file, model, ALIGNED, client_field="owner", window=128)
    out = tmp_path / "out"
    page = write_coreset(found, out)
    assert (out / CORESET).read_text(encoding="utf-8").splitlines() == list(found.lines)
    reasons = [json.loads(line) for line in (out / REASONS).read_text("utf-8").splitlines()]
    assert [one["line"] for one in reasons] == [one.line for one in found.reasons]
    record = Record.read(out)
    assert record is not None
    assert (record.kind, record.figures["num_chosen"]) == ("coreset", len(found.lines))
    assert page.read_text("utf-8") == render(found)
    assert "1 lines are longer than the window" in render(found)
    with pytest.raises(ArtefactError, match="exists already"):
        write_coreset(found, out)


def test_a_page_shows_text_as_text(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "examples.jsonl"
    rows = [row(n) | {"instruction": f"<script>alert({n})</script>"} for n in range(12)]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    page = render(select(path, model, ALIGNED, window=128))
    assert only_sorts(page)
    assert "&lt;script&gt;" in page
