"""Laws of the sources: the same text whatever it is packed in, every fault named by its place."""

import bz2
import errno
import gzip
import json
import lzma
import math
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from fedgraft.errors import CorpusError
from fedgraft.text.sources import Document, check_shares, documents, num_bytes, split_of

TEXTS = ["The harbour is open.", "Zweiter Text: Grüße.", "third\nline"]
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}
PAGE = """<!doctype html><html><head><title>How we &amp; you  travel</title>
<style>p { color: red }</style><script>var tracked = true;</script></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/jobs">Jobs</a></li></ul></nav>
<article><h1>How we travel</h1>
<p>Trips are booked by the office of each department, two weeks before they start or earlier.</p>
<p>Whoever pays for a ticket with his own money hands the receipt in within thirty days of it.</p>
</article><footer>Cookie settings, imprint and so on</footer></body></html>"""


def rows(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def texts_of(*paths: str | Path, **settings: object) -> list[str]:
    return [document.text for document in documents(*paths, **settings)]  # type: ignore[arg-type]


def write(file: Path, data: bytes) -> Path:
    file.write_bytes(data)
    return file


def saved(folder: Path, split: str | None = None) -> Path:
    data = Dataset.from_dict({"text": TEXTS, "id": ["a", "b", "c"]})
    (DatasetDict({split: data}) if split else data).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_compressed_file_holds_the_same_documents(tmp_path: Path, suffix: str) -> None:
    packed = write(tmp_path / f"a.jsonl{suffix}", PACKERS[suffix](rows(TEXTS)))
    assert texts_of(packed) == TEXTS
    assert texts_of(write(tmp_path / f"b.md{suffix}", PACKERS[suffix](b"# Page"))) == ["# Page"]


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_compressed_file_in_several_parts_is_read_to_its_end(tmp_path: Path, suffix: str) -> None:
    parts = b"".join(PACKERS[suffix](rows([text])) for text in TEXTS)
    assert texts_of(write(tmp_path / f"a.jsonl{suffix}", parts)) == TEXTS


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("damage", ["cut", "not compressed at all"])
def test_a_damaged_compressed_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    packed = PACKERS[suffix](rows([os.urandom(2000).hex() for _ in range(50)]))
    data = packed[: len(packed) // 2] if damage == "cut" else rows(TEXTS)
    file = write(tmp_path / f"a.jsonl{suffix}", data)
    with pytest.raises(CorpusError, match=rf"a\.jsonl{suffix}: expected a file that is whole"):
        texts_of(file)


def test_parquet_rows_are_documents_with_what_is_known_of_them(tmp_path: Path) -> None:
    facts = {"title": ["A", None, "C"], "date": ["2026-01-01"] * 3, "views": [1, 2, 3]}
    parquet.write_table(pyarrow.table({"text": TEXTS, **facts}), tmp_path / "a.parquet")
    found = list(documents(tmp_path / "a.parquet"))
    assert [d.text for d in found] == TEXTS
    assert [dict(d.facts) for d in found[:2]] == [
        {"title": "A", "date": "2026-01-01"},
        {"date": "2026-01-01"},
    ]
    assert found[2].id == "a.parquet:3"


def test_parquet_without_the_column_is_refused_with_those_it_has(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"body": TEXTS}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"column 'text', found the columns 'body'; .* --field"):
        texts_of(tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet", field="body") == TEXTS


def test_a_row_of_parquet_without_text_is_named(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.parquet, row 2: expected text in the field 'text'"):
        texts_of(tmp_path / "a.parquet")


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"a\.parquet: expected a Parquet file"):
        texts_of(write(tmp_path / "a.parquet", b"PAR1 and nothing more"))


def test_a_page_is_its_main_text_without_menu_script_and_style(tmp_path: Path) -> None:
    (found,) = documents(write(tmp_path / "a.html", PAGE.encode()))
    assert "Trips are booked by the office" in found.text
    assert "within thirty days" in found.text
    for boilerplate in ("Jobs", "tracked", "color", "Cookie"):
        assert boilerplate not in found.text
    assert found.facts["title"] == "How we & you travel"


def test_a_page_without_main_text_is_an_empty_document_not_a_missing_one(tmp_path: Path) -> None:
    assert texts_of(write(tmp_path / "a.html", b"")) == [""]
    assert texts_of(write(tmp_path / "b.html", b"<html><body></body></html>")) == [""]


def test_a_folder_is_read_by_name_with_every_kind_in_it(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl.gz", gzip.compress(rows(["row"])))
    write(tmp_path / "a.html", PAGE.encode())
    write(tmp_path / "c.md", b"page")
    write(tmp_path / "d.parquet.gz", b"not a kind that is read")
    parquet.write_table(pyarrow.table({"text": ["column"]}), tmp_path / "d.parquet")
    assert [d.source for d in documents(tmp_path)] == ["a.html", "b.jsonl.gz", "c.md", "d.parquet"]


def test_a_saved_data_set_is_read_from_its_folder(tmp_path: Path) -> None:
    found = list(documents(saved(tmp_path / "plain")))
    assert [d.text for d in found] == TEXTS
    assert [d.id for d in found] == ["a", "b", "c"]
    assert texts_of(saved(tmp_path / "train", "train")) == TEXTS
    assert texts_of(f"dataset:{saved(tmp_path / 'test', 'test')}#test") == TEXTS


def test_a_split_that_a_saved_data_set_has_not_is_refused_with_those_it_has(
    tmp_path: Path,
) -> None:
    folder = saved(tmp_path / "a", "test")
    with pytest.raises(CorpusError, match=r"expected the split 'train', found 'test'; .*a#test"):
        texts_of(folder)
    with pytest.raises(CorpusError, match=r"found one without; leave #test away"):
        texts_of(f"dataset:{saved(tmp_path / 'b')}#test")


def test_a_data_set_is_streamed_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "news").mkdir()
    write(tmp_path / "news" / "train.jsonl", rows(TEXTS))
    write(tmp_path / "news" / "test.jsonl", rows(["held out"]))
    assert texts_of(f"dataset:{tmp_path / 'news'}") == TEXTS
    assert texts_of(f"dataset:{tmp_path / 'news'}#test") == ["held out"]


def test_a_data_set_that_cannot_be_reached_is_refused_with_how_to_name_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match=r"no/such#train: .*name\[:config\]\[@revision\]"):
        texts_of("dataset:no/such#train")
    (tmp_path / "news").mkdir()
    write(tmp_path / "news" / "train.jsonl", rows(TEXTS))
    with pytest.raises(CorpusError, match=r"found: .*Bad split: dev"):
        texts_of(f"dataset:{tmp_path / 'news'}#dev")


def test_broken_lines_up_to_the_number_allowed_are_collected_with_their_places(
    tmp_path: Path,
) -> None:
    write(tmp_path / "a.jsonl", b'{"text": "one"}\n{broken\n{"text": "two"}\n{"body": "x"}\n[1]\n')
    write(tmp_path / "b.txt", b"caf\xe9")
    write(tmp_path / "c.md", b"three")
    broken: list[str] = []
    assert texts_of(tmp_path, max_broken=4, broken=broken) == ["one", "two", "three"]
    places = [fault.partition(": ")[0].removeprefix(f"{tmp_path}/") for fault in broken]
    assert places == ["a.jsonl, line 2", "a.jsonl, line 4", "a.jsonl, line 5", "b.txt, byte 3"]


def test_one_broken_line_too_many_stops_with_the_first_ten(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n' + b"{broken\n" * 30)
    with pytest.raises(CorpusError) as told:
        texts_of(file, max_broken=12)
    message = str(told.value)
    assert message.startswith("expected at most 12 broken lines or files, found more:\n")
    assert message.count("expected a JSON object") == 10
    assert "line 11:" in message
    assert "line 12:" not in message
    assert "and 3 more" in message
    assert "--max-broken" in message


def test_a_path_that_leads_nowhere_stops_whatever_may_be_broken(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="found nothing there"):
        texts_of(tmp_path / "missing.jsonl", max_broken=100)


def lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the system refuse a folder, as it does to all but root."""

    def refusing(call: Callable[..., object], refused: Callable[[Path], bool]) -> object:
        def called(place: object, *rest: object, **more: object) -> object:
            if isinstance(place, str | Path) and refused(Path(place)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
            return call(place, *rest, **more)

        return called

    monkeypatch.setattr(os, "scandir", refusing(os.scandir, lambda place: place == folder))
    monkeypatch.setattr(os, "stat", refusing(os.stat, lambda place: folder in place.parents))


def test_a_folder_that_may_not_be_read_is_named_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = tmp_path / "handbook" / "salaries"
    locked.mkdir(parents=True)
    write(locked / "a.txt", b"secret")
    write(tmp_path / "handbook" / "b.txt", b"open")
    lock(locked, monkeypatch)
    for path in (tmp_path / "handbook", locked, locked / "a.txt", f"dataset:{locked}"):
        with pytest.raises(CorpusError, match=r"at .*salaries\S*, found: Permission denied; check"):
            texts_of(path, max_broken=100)
    with pytest.raises(CorpusError, match=r"salaries, found: Permission denied"):
        num_bytes(tmp_path / "handbook")


@pytest.mark.parametrize("field", ["id", "title", "text"])
def test_half_a_surrogate_pair_is_a_broken_line_wherever_it_stands(
    tmp_path: Path, field: str
) -> None:
    row = {"id": "1", "title": "A", "text": "one"} | {field: "Cut emoji \ud83d"}
    file = write(tmp_path / "a.jsonl", rows(["fine"]) + json.dumps(row).encode() + b"\n")
    place = rf"line 2: .* \\ud83d at character 10 of the field '{field}'; mend or remove"
    with pytest.raises(CorpusError, match=place):
        texts_of(file)
    assert texts_of(file, max_broken=1) == ["fine"]


def test_a_line_with_a_number_too_long_to_read_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}\n" + rows(["b"]))
    with pytest.raises(CorpusError, match=r"line 1: expected a JSON object, found .*4300 digits"):
        texts_of(file)
    assert texts_of(file, max_broken=1) == ["b"]


def test_parquet_text_that_is_not_utf8_is_reported_with_its_rows(tmp_path: Path) -> None:
    good, bad = [b"fine"] * 256, [b"caf\xe9", b"fine"]
    column = pyarrow.array([*good, *bad], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(column), column.buffers())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    place = r"a\.parquet, rows 257 to 258: expected UTF-8 text, found the byte 0xe9"
    with pytest.raises(CorpusError, match=place):
        texts_of(tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet", max_broken=1) == ["fine"] * 256


def test_a_line_nested_too_deep_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", b'{"text": ' + b"[" * 200_000 + b"\n")
    with pytest.raises(CorpusError, match=r"line 1: expected a JSON object, found one nested"):
        texts_of(file)


def test_what_was_read_adds_up_to_the_size_of_the_files(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl.gz", gzip.compress(rows(TEXTS * 1000)))
    write(tmp_path / "b.txt", b"text" * 1000)
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "c.parquet")
    sizes: list[int] = []
    list(documents(tmp_path, read=sizes.append))
    assert sum(sizes) == num_bytes(tmp_path) == sum(f.stat().st_size for f in tmp_path.iterdir())


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(num_rows: int) -> int:
        with gzip.open(tmp_path / "a.jsonl.gz", "wb", 1) as file:
            for number in range(num_rows):
                file.write(rows([f"{number} " + "text " * 400]))
        tracemalloc.start()
        assert sum(1 for _ in documents(tmp_path / "a.jsonl.gz")) == num_rows
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    assert peak(8000) < 1.2 * peak(1000)


@given(st.text(min_size=1), st.text())
def test_a_split_depends_on_the_text_alone(text: str, other: str) -> None:
    one = Document(id="1", text=text, source="a")
    two = Document(id=other, text=text, source=other, facts={"title": other})
    assert split_of(one, validation=0.3, test=0.3) == split_of(two, validation=0.3, test=0.3)


def test_splits_have_about_the_shares_asked_for() -> None:
    made = [Document(id="", text=str(n), source="") for n in range(4000)]
    parts = [split_of(document, validation=0.2, test=0.1) for document in made]
    assert abs(parts.count("validation") - 800) < 80
    assert abs(parts.count("test") - 400) < 60
    with pytest.raises(CorpusError, match=r"found 0\.5 and 0\.5"):
        split_of(made[0], validation=0.5, test=0.5)


@pytest.mark.parametrize("shares", [(math.nan, 0.1), (0.1, math.nan), (-0.1, 0.1), (math.inf, 0)])
def test_a_share_that_is_no_part_of_one_is_refused(shares: tuple[float, float]) -> None:
    with pytest.raises(CorpusError, match=r"expected shares .* choose them with a sum below 1"):
        check_shares(*shares)
