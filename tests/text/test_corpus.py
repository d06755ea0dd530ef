"""Laws of the corpus: nothing lost, nothing twice, every fault named by its place."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.errors import CorpusError
from fedgraft.text.corpus import Corpus, Document


def corpus_of(texts: list[str]) -> Corpus:
    documents = tuple(Document(id=str(n), text=text, source="test") for n, text in enumerate(texts))
    return Corpus(documents=documents, num_duplicates=0)


def write_lines(file: Path, *rows: object) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@given(st.lists(st.text(min_size=1), unique=True, max_size=60))
def test_no_document_is_in_two_splits_and_none_is_lost(texts: list[str]) -> None:
    split = corpus_of(texts).split(validation=0.3, test=0.3)
    found = [d.text for part in (split.train, split.validation, split.test) for d in part]
    assert sorted(found) == sorted(texts)


@given(st.lists(st.text(min_size=1), unique=True, min_size=2, max_size=40), st.randoms())
def test_a_documents_split_depends_on_its_text_alone(texts: list[str], random: object) -> None:
    shuffled = list(texts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    before = {d.text for d in corpus_of(texts).split().test}
    after = {d.text for d in corpus_of(shuffled[:-1]).split().test}
    assert before - {shuffled[-1]} == after


def test_exact_duplicates_are_counted_then_dropped(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", *({"text": t} for t in ("one", "two", "one", "one")))
    corpus = Corpus.load(file)
    assert [d.text for d in corpus.documents] == ["one", "two"]
    assert corpus.num_duplicates == 2


def test_a_folder_is_read_with_all_its_kinds_of_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "page.md").write_text("# Page")
    (tmp_path / "note.txt").write_text("Note")
    (tmp_path / "ignored.csv").write_text("a,b")
    write_lines(tmp_path / "rows.jsonl", {"text": "Row", "id": "r1"})
    corpus = Corpus.load(tmp_path, department="hr")
    assert {d.text for d in corpus.documents} == {"# Page", "Note", "Row"}
    assert "r1" in {d.id for d in corpus.documents}
    assert corpus.department == "hr"


def test_a_broken_line_is_reported_by_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n{"text": broken}\n')
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 2: expected a JSON object"):
        Corpus.load(file)


def test_a_line_that_is_no_object_is_reported(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"line 1: expected a JSON object, found list"):
        Corpus.load(write_lines(tmp_path / "a.jsonl", ["text"]))


def test_a_missing_field_is_reported_with_the_fields_that_are_there(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", {"text": "fine"}, {"body": "x", "title": "y"})
    with pytest.raises(CorpusError, match=r"line 2: .*'text', found the fields 'body', 'title'"):
        Corpus.load(file)
    assert Corpus.load(write_lines(tmp_path / "b.jsonl", {"body": "x"}), field="body").documents


def test_bytes_that_are_not_utf8_are_reported_by_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CorpusError, match=r"a\.txt, byte 3: expected UTF-8 text, found .* 0xe9"):
        Corpus.load(tmp_path / "a.txt")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n')
    with pytest.raises(CorpusError, match=r"b\.jsonl, line 2, byte 10"):
        Corpus.load(tmp_path / "b.jsonl")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "Row"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfNote")
    assert [d.text for d in Corpus.load(tmp_path).documents] == ["Row", "Note"]


def test_half_a_surrogate_pair_is_reported_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine \\ud83d\\ude00"}\n{"text": "ab\\ud83d"}\n')
    with pytest.raises(CorpusError, match=r"line 2: .* lone surrogate \\ud83d at character 2"):
        Corpus.load(tmp_path / "a.jsonl")


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": "  "}\n'])
def test_an_empty_corpus_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(CorpusError, match="expected at least one document with text"):
        Corpus.load(tmp_path / "a.jsonl")


def test_a_path_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="found nothing there"):
        Corpus.load(tmp_path / "missing.jsonl")


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(CorpusError, match=r"\.jsonl, \.txt, \.md, found .*a\.pdf"):
        Corpus.load(tmp_path / "a.pdf")


def test_shares_that_leave_nothing_to_train_on_are_refused() -> None:
    with pytest.raises(CorpusError, match=r"found 0\.5 and 0\.5"):
        corpus_of(["a"]).split(validation=0.5, test=0.5)
