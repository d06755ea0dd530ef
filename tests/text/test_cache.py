"""Laws of rows on disk: those of memory, whole or not at all, and damage is seen."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgraft.errors import ArtefactError, CorpusError
from fedgraft.provenance import Record
from fedgraft.testing import TEXT, tiny_tokenizer
from fedgraft.text import packing
from fedgraft.text.cache import BOUNDS, PIECES, TOKENS, open_rows, pack_to_disk, packed, text_hash
from fedgraft.text.corpus import Document
from fedgraft.text.packing import pack

tokenizer = cache(tiny_tokenizer)
DOCUMENTS = tuple(
    Document(id=str(n), text=f"{n}. {TEXT[n % 3]}" * (1 + n % 4), source="test") for n in range(40)
)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


texts = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), min_size=1)


@settings(max_examples=30)
@given(texts, st.integers(8, 48), st.integers(0, 3), st.booleans())
def test_rows_on_disk_are_those_in_memory(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    row_length: int,
    seed: int,
    limited: bool,
) -> None:
    documents = [Document(id=str(n), text=t, source="test") for n, t in enumerate(texts)]
    num_positions = 2 * row_length if limited else None
    expected = pack(tokenizer(), documents, row_length, seed=seed, num_positions=num_positions)
    folder = tmp_path_factory.mktemp("packed") / "rows"
    written = pack_to_disk(
        tokenizer(), iter(documents), folder, row_length, seed=seed, num_positions=num_positions
    )
    for rows in (written, open_rows(folder, verify=True)):
        assert rows.content_hash == expected.content_hash
        assert rows.highest_id == expected.highest_id
        assert rows.num_targets == expected.num_targets
        assert rows.num_positions == expected.num_positions
        for name, array in expected.stacked().items():
            assert np.array_equal(rows.stacked()[name], array)


def test_the_same_text_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        pack_to_disk(tokenizer(), DOCUMENTS, tmp_path / name, 64)
    for name in leftovers(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_tokens_stay_on_disk(tmp_path: Path) -> None:
    rows = pack_to_disk(tokenizer(), DOCUMENTS, tmp_path / "rows", 64)
    base = rows.take(np.arange(3)).texts[0].tokens
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        assert base.base is not None
        base = base.base
    assert isinstance(base, np.memmap)
    assert (tmp_path / "rows" / TOKENS).stat().st_size == 2 * rows.num_tokens


def test_the_record_says_what_the_rows_were_made_of(tmp_path: Path) -> None:
    rows = pack_to_disk(tokenizer(), DOCUMENTS, tmp_path / "rows", 64, seed=3)
    record = Record.read(tmp_path / "rows")
    assert record
    assert record.settings == {"row_length": 64, "seed": 3, "num_positions": None}
    assert record.inputs["text"] == text_hash(DOCUMENTS)
    assert record.figures["num_documents"] == 40
    assert record.figures["num_tokens"] == rows.num_tokens
    assert record.figures["fill"] == rows.fill
    assert str(tmp_path) not in (tmp_path / "rows" / "fedgraft.json").read_text()


def test_packed_rows_are_opened_again(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    first, line = packed(tokenizer(), DOCUMENTS, folder, 64)
    assert line.startswith(
        f"packed into {folder}: {first.num_tokens:,} tokens in {len(first)} rows"
    )
    written = (folder / TOKENS).stat().st_mtime_ns
    again, line = packed(tokenizer(), DOCUMENTS, folder, 64)
    assert line.startswith("opened, packed before in")
    assert (folder / TOKENS).stat().st_mtime_ns == written
    assert again.content_hash == first.content_hash


def test_what_changed_is_packed_again_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    packed(tokenizer(), DOCUMENTS, folder, 64)
    other = tiny_tokenizer(vocabulary=300)
    for arguments, changed in (
        ((tokenizer(), DOCUMENTS[:20], folder, 64), "the text"),
        ((tokenizer(), DOCUMENTS[:20], folder, 32), "row_length"),
        ((other, DOCUMENTS[:20], folder, 32), "the tokenizer"),
    ):
        rows, line = packed(*arguments)
        assert line.startswith(f"packed again, for {changed} changed, into")
        assert rows.content_hash == pack(arguments[0], arguments[1], arguments[3]).content_hash
    _, line = packed(other, DOCUMENTS[:20], folder, 32, seed=1, num_positions=64)
    assert line.startswith("packed again, for seed and num_positions changed, into")


@pytest.mark.parametrize("name", [TOKENS, PIECES, BOUNDS])
def test_a_file_that_is_cut_short_is_refused_and_packed_again(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "rows"
    whole = pack_to_disk(tokenizer(), DOCUMENTS, folder, 64)
    file = folder / name
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-8])
    message = rf"{name}: expected {size:,} bytes, found {size - 8:,}; remove the folder"
    with pytest.raises(ArtefactError, match=message):
        open_rows(folder)
    rows, line = packed(tokenizer(), DOCUMENTS, folder, 64)
    assert line.startswith("packed again, for what was there is damaged (")
    assert rows.content_hash == whole.content_hash
    assert open_rows(folder, verify=True).content_hash == whole.content_hash


@pytest.mark.parametrize("name", [TOKENS, PIECES, BOUNDS])
def test_a_flipped_bit_is_refused_and_packed_again(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "rows"
    pack_to_disk(tokenizer(), DOCUMENTS, folder, 64)
    flip(folder / name, 40)
    with pytest.raises(ArtefactError, match=rf"{name}: expected the SHA-256 .* have changed; rem"):
        open_rows(folder, verify=True)
    if name == TOKENS:
        open_rows(folder)  # where things are is right, so it opens; what they are was not asked
    else:
        with pytest.raises(ArtefactError, match="have changed"):
            open_rows(folder)
    assert "is damaged (" in packed(tokenizer(), DOCUMENTS, folder, 64)[1]
    open_rows(folder, verify=True)


def test_a_file_that_is_gone_is_refused(tmp_path: Path) -> None:
    pack_to_disk(tokenizer(), DOCUMENTS, tmp_path / "rows", 64)
    (tmp_path / "rows" / PIECES).unlink()
    with pytest.raises(ArtefactError, match=r"pieces\.bin: expected a file .* No such file"):
        open_rows(tmp_path / "rows")


def test_a_record_that_says_nothing_is_refused(tmp_path: Path) -> None:
    pack_to_disk(tokenizer(), DOCUMENTS, tmp_path / "rows", 64)
    record = tmp_path / "rows" / "fedgraft.json"
    facts = json.loads(record.read_text())
    del facts["figures"]["files"][TOKENS]
    record.write_text(json.dumps(facts))
    with pytest.raises(ArtefactError, match="expected the record of packed rows, found"):
        open_rows(tmp_path / "rows")
    record.write_text("{")
    assert "is damaged" in packed(tokenizer(), DOCUMENTS, tmp_path / "rows", 64)[1]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ArtefactError, match=r"found no record; name a folder"):
        open_rows(tmp_path)
    with pytest.raises(ArtefactError, match=r"an empty folder at .*, found thesis\.txt; choose"):
        packed(tokenizer(), DOCUMENTS, tmp_path, 64)
    with pytest.raises(ArtefactError, match="exists already"):
        pack_to_disk(tokenizer(), DOCUMENTS, tmp_path, 64)
    with pytest.raises(ArtefactError, match="expected a directory to write, found a file"):
        packed(tokenizer(), DOCUMENTS, tmp_path / "thesis.txt", 64)
    assert leftovers(tmp_path) == ["thesis.txt"]


def test_an_empty_corpus_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="expected text to pack"):
        pack_to_disk(tokenizer(), [], tmp_path / "rows", 64)
    assert leftovers(tmp_path) == []


def test_text_that_breaks_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 100)

    def breaking() -> Iterator[Document]:
        yield from DOCUMENTS
        raise CorpusError("line 41 is broken")

    with pytest.raises(CorpusError, match="line 41"):
        pack_to_disk(tokenizer(), breaking(), tmp_path / "rows", 64)
    assert leftovers(tmp_path) == []


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from fedgraft.errors import ArtefactError\n"
        "from fedgraft.testing import tiny_tokenizer\n"
        "from fedgraft.text.cache import pack_to_disk\n"
        "from fedgraft.text.corpus import Document\n"
        "documents = [Document(id='a', text='The heron. ' * 2000, source='test')] * 9\n"
        "try: pack_to_disk(tiny_tokenizer(), documents, Path(sys.argv[1]), 64)\n"
        "except ArtefactError as error: print(error)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "rows")],
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
    )
    assert ran.stdout.startswith(f"could not write {tmp_path / 'rows'}: File too large"), ran
    assert "nothing was left there" in ran.stdout
    assert leftovers(tmp_path) == []


def test_packing_says_how_far_it_is_without_knowing_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedgraft.progress.SECONDS_BETWEEN_LINES", 0.0)
    rows = pack_to_disk(tokenizer(), DOCUMENTS, tmp_path / "rows", 64)
    line = capsys.readouterr().err
    assert line.startswith(f"packing: {rows.num_tokens:,} tokens, ")
    assert line.rstrip().endswith("tokens/s, 40 documents")
