"""The verbs that make text ready: a table of every document, errors that say what to do."""

import json
import re
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedgraft.cli.main import app
from fedgraft.errors import CorpusError
from fedgraft.testing import save_tiny
from fedgraft.text.corpus import Corpus

STORY = "The {thing} of the town was opened again this week, and nobody expected it so early."
THINGS = ("harbour", "bridge", "market", "library", "tower", "garden", "station", "theatre")


def fedgraft(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result) -> str:
    """The message of a command that ended with a known error, and with nothing but it."""
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture
def news(tmp_path: Path) -> Path:
    """Eight stories, one of them twice, one too short, one in German."""
    file = tmp_path / "news.jsonl"
    texts = [
        *(STORY.format(thing=f"{thing} {' '.join([thing] * 9)}") for thing in THINGS),
        STORY.format(thing=f"{THINGS[0]} {' '.join([THINGS[0]] * 9)}"),
        "The council met.",
        "Der Rat der Stadt hat beschlossen, den alten Hafen im nächsten Monat zu öffnen.",
    ]
    rows = (
        {"id": f"n{n}", "title": f"Story {n}", "url": f"http://a/{n}", "text": t, "views": 3}
        for n, t in enumerate(texts)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def table(result: Result) -> dict[str, int]:
    """The rows of the table: name -> documents."""
    found = re.findall(r"^ +(\S[a-z ]*?) {2,}([\d,]+) *$", result.stdout, re.MULTILINE)
    return {name: int(number) for name, number in found}


def test_every_document_is_in_the_table_and_every_kept_one_in_one_file(
    news: Path, tmp_path: Path
) -> None:
    out = tmp_path / "text"
    done = fedgraft("corpus", news, "--out", out, "--model", "pocket:base", "--min-tokens", 12)
    assert done.exit_code == 0, done.output
    shown = table(done)
    assert shown["read"] == 11
    assert shown["exact duplicate"] == shown["other language"] == shown["too short"] == 1
    assert shown["read"] == shown["dropped"] + shown["kept"]
    assert shown["kept"] == shown["train"] + shown["validation"] + shown["test"] == 8
    assert f"corpus      {out}" in done.stdout
    assert re.search(r"tokens: train [\d,]+, validation [\d,]+, test [\d,]+", done.stdout)
    assert f"--data {out / 'train.jsonl'}" in done.stdout

    rows = [
        json.loads(line)
        for part in ("train", "validation", "test")
        for line in (out / f"{part}.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 8
    assert all(set(row) == {"id", "title", "url", "text"} for row in rows)


def test_the_splits_on_disk_are_the_splits_in_memory(news: Path, tmp_path: Path) -> None:
    out = tmp_path / "text"
    fedgraft("corpus", news, "--out", out, "--near-duplicates", 0, "--language", "all")
    splits = Corpus.load(news).split()
    for part in ("train", "validation", "test"):
        on_disk = [json.loads(line) for line in (out / f"{part}.jsonl").read_text().splitlines()]
        assert [row["text"] for row in on_disk] == [d.text for d in getattr(splits, part)]


def test_same_text_and_settings_same_bytes(news: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("a", "b")]
    for out in outs:
        fedgraft("corpus", news, "--out", out)
    for file in outs[0].iterdir():
        assert file.read_bytes() == (outs[1] / file.name).read_bytes()
    record = json.loads((outs[0] / "fedgraft.json").read_text())
    assert record["kind"] == "corpus"
    assert record["figures"]["num_dropped"]["exact duplicate"] == 1


def test_broken_lines_are_shown_with_their_places_and_written_down(
    news: Path, tmp_path: Path
) -> None:
    news.write_text(news.read_text() + "{broken\n")
    out = tmp_path / "text"
    assert "line 12: expected a JSON object" in refused(fedgraft("corpus", news, "--out", out))
    assert not out.exists()
    done = fedgraft("corpus", news, "--out", out, "--max-broken", 3)
    assert "broken      1 lines or files passed over" in done.stdout
    assert "line 12: expected a JSON object" in done.stdout
    assert "line 12: expected a JSON object" in (out / "broken.log").read_text()


@pytest.fixture
def text(news: Path, tmp_path: Path) -> Path:
    """A corpus with text in each of its parts, and with lines that were passed over."""
    news.write_text(news.read_text() + "{broken\n")
    out = tmp_path / "runs" / "text"
    fedgraft("corpus", news, "--out", out, "--max-broken", 1, "--validation", 0.3, "--test", 0.3)
    assert all((out / f"{part}.jsonl").read_text() for part in ("train", "validation", "test"))
    return out


def test_the_parts_of_a_corpus_are_not_read_together(text: Path, tmp_path: Path) -> None:
    files = ", ".join(str(text / f"{part}.jsonl") for part in ("train", "validation", "test"))
    for folder in (text, text.parent):
        with pytest.raises(CorpusError, match=re.escape(f"name what you mean of {files}")):
            Corpus.load(folder)
    message = refused(fedgraft("corpus", text, "--out", tmp_path / "again"))
    assert f"{text}: expected text for one purpose" in message
    assert Corpus.load(text / "test.jsonl").documents


def test_what_was_passed_over_is_no_text(text: Path) -> None:
    (text / "fedgraft.json").unlink()
    assert {document.source for document in Corpus.load(text).documents} == {
        *("train.jsonl", "validation.jsonl", "test.jsonl")
    }


def test_a_corpus_is_learnt_from_where_it_is_for_training(text: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    num_lines = len((text / "train.jsonl").read_text().splitlines())
    for verb, more in (("adapt", ("--department", "hr")), ("pretrain", ())):
        to = ("--tokens", 300, "--out", tmp_path / verb)
        done = fedgraft(verb, model, "--data", text, *to, *more)
        assert done.exit_code == 0, done.output
        assert f"{num_lines} documents" in done.stdout


def test_text_of_which_nothing_is_left_is_refused_with_the_reasons(
    news: Path, tmp_path: Path
) -> None:
    message = refused(fedgraft("corpus", news, "--out", tmp_path / "a", "--language", "fr"))
    assert "found 11 and dropped all" in message
    assert "10 other language" in message
    assert not (tmp_path / "a").exists()


def test_settings_that_cannot_be_are_refused(news: Path, tmp_path: Path) -> None:
    to = ("--out", tmp_path / "a")
    assert "expected a tokenizer" in refused(fedgraft("corpus", news, *to, "--min-tokens", 5))
    assert "sum below 1" in refused(fedgraft("corpus", news, *to, "--test", 0.95))
    assert "found nan and 0.1" in refused(fedgraft("corpus", news, *to, "--validation", "nan"))
    swapped = ("--min-tokens", 9, "--max-tokens", 5, "--model", "pocket:base")
    assert "swap them" in refused(fedgraft("corpus", news, *to, *swapped))
    assert "found nothing there" in refused(fedgraft("corpus", tmp_path / "missing", *to))


def test_an_output_that_exists_is_kept_unless_asked(news: Path, tmp_path: Path) -> None:
    out = tmp_path / "text"
    fedgraft("corpus", news, "--out", out)
    assert "exists already" in refused(fedgraft("corpus", news, "--out", out))
    assert fedgraft("corpus", news, "--out", out, "--overwrite").exit_code == 0


def test_without_fundus_the_crawl_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fundus", None)
    days = ("--from", "2026-01-01", "--to", "2026-01-31", "--out", tmp_path / "a.jsonl")
    message = refused(fedgraft("crawl", "TheNewYorker", *days))
    assert "pip install 'fedgraft[news]'" in message
