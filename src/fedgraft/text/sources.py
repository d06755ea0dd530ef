"""Where text comes from: files, folders and data sets become documents, one at a time.

    .jsonl  .parquet            a row is a document; its text stands in a field
    .txt  .md  .html  .htm      a file is a document; of HTML the main text alone, without menus
    folder                      every such file below it, by name
    folder of `save_to_disk`    a data set of the library `datasets`
    dataset:org/name            a data set of the hub, streamed

All but Parquet may be compressed: .gz, .bz2, .xz, .zst. One row, or one file of plain text, is in
memory at a time, whatever the size of the source.

Nothing is skipped in silence: what cannot be read stops the reader with its file and line, or,
where some broken lines are allowed, is collected for the user to see.
"""

import bz2
import gzip
import hashlib
import html
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, cast, get_args

import zstandard

from fedgraft.errors import CorpusError
from fedgraft.provenance import RECORD, Record

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

ROWS = (".jsonl", ".parquet")
HTML = (".html", ".htm")
SUFFIXES = (".parquet", *HTML, ".jsonl", ".txt", ".md")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
FACTS = ("title", "date", "url", "publisher", "license")
"""What is kept of a row beside its text, where the source has it."""

NUM_SHOWN = 10
"""How many broken lines the message of a refusal lists."""

ROWS_PER_READ = 256
BYTES_PER_READ = 1 << 20
DATASET = re.compile(
    r"dataset:(?P<name>[^:@#]+)(:(?P<config>[^@#]+))?(@(?P<revision>[^#]+))?(#(?P<split>.+))?"
)
BROKEN = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""What the readers of compressed files raise where one is damaged."""

Part = Literal["train", "validation", "test"]
Read = Callable[[int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text and where it came from."""

    id: str
    text: str
    source: str
    facts: Mapping[str, str] = field(default_factory=dict, hash=False)
    """What else the source knows of it: title, date, url, publisher, license."""
    num_tokens: int | None = None
    """Its length, where a tokenizer has counted it."""

    @property
    def hash(self) -> str:
        """Hash of the text alone: the same text is the same document, wherever it stands."""
        return hashlib.sha256(self.text.encode()).hexdigest()


class Hashed(Protocol):
    """A document or a dialogue: it has a hash of what it says alone."""

    @property
    def hash(self) -> str: ...


def split_of(example: Hashed, *, validation: float = 0.1, test: float = 0.1) -> Part:
    """The split an example belongs to: it depends on what it says and the shares alone.

    Raises CorpusError where the shares leave nothing for training.
    """
    check_shares(validation, test)
    place = int(example.hash[:8], 16) / 2**32
    if place < test:
        return "test"
    return "validation" if place < test + validation else "train"


def check_shares(validation: float, test: float) -> None:
    """Raise CorpusError where the shares of validation and test leave nothing for training."""
    if not (validation >= 0 and test >= 0 and validation + test < 1):  # NaN is no share
        raise CorpusError(
            f"expected shares for validation and test that leave text for training, found "
            f"{validation} and {test}; choose them with a sum below 1"
        )


def documents(
    *paths: str | Path,
    field: str = "text",
    max_broken: int = 0,
    broken: list[str] | None = None,
    read: Read | None = None,
) -> Iterator[Document]:
    """Read sources in the order given (a folder's files by name), one document at a time.

    A document without text (a blank field, a page without main text) is yielded too: who reads
    decides, and counts.

    Arguments:
        paths: files, folders, or `dataset:name[:config][@revision][#split]`; the name is one on the
            hub or a folder, the split is `train` where none is given.
        field: where the text of a row stands.
        max_broken: how many lines or files that cannot be read are passed over.
        broken: gets a message with file and line for each of those.
        read: is told how many bytes were read, out of `num_bytes(*paths)`.

    Raises CorpusError, with file and line, for a missing path, another kind of file, bytes that are
    not UTF-8, a broken line, a missing field, or a damaged file; with `max_broken`, for the first
    one above that number, listing the first ten. Whatever `max_broken` says, for a folder that
    cannot be read, and for one that `fedgraft corpus` wrote: held-out text stays apart.
    """
    faults = _Faults(limit=max_broken, found=[] if broken is None else broken)
    tell = read or _ignore
    for path in paths:
        if match := DATASET.fullmatch(str(path)):
            yield from _dataset(match, field, faults)
        elif _is_saved_dataset(Path(path)):
            yield from _saved_dataset(Path(path), None, field, faults)
        else:
            for file in _files([path]):
                yield from _read(file, field, faults, tell)


def num_bytes(*paths: str | Path) -> int | None:
    """How many bytes `documents` will read of some paths; None where a data set does not say."""
    if any(DATASET.fullmatch(str(path)) or _is_saved_dataset(Path(path)) for path in paths):
        return None
    return sum(file.stat().st_size for file in _files(paths))


@dataclass(frozen=True, slots=True)
class _Faults:
    """The broken lines met so far, and how many are allowed."""

    limit: int
    found: list[str]

    def meet(self, error: CorpusError) -> None:
        """Note a fault. Raises CorpusError where it is one too many."""
        if not self.limit or len(self.found) > self.limit:
            raise error
        self.found.append(str(error))
        if len(self.found) > self.limit:
            shown = "\n  ".join(self.found[:NUM_SHOWN])
            more = len(self.found) - NUM_SHOWN
            raise CorpusError(
                f"expected at most {self.limit} broken lines or files, found more:\n  {shown}"
                + (f"\n  and {more} more" if more > 0 else "")
                + "\nmend them, or allow more with --max-broken"
            ) from error


def _ignore(_: int) -> None:
    pass


def _kind(file: Path) -> str:
    """The suffix that says how to read a file: `.jsonl` for `a.jsonl.gz`."""
    suffix = file.suffix.lower()
    if suffix in COMPRESSED:
        inner = Path(file.stem).suffix.lower()
        return "" if inner == ".parquet" else inner
    return suffix


def _files(paths: Iterable[str | Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_dir():
            yield from _below(path)
        elif not path.exists():
            raise CorpusError(f"expected a file or folder of text at {path}, found nothing there")
        elif _kind(path) not in SUFFIXES:
            raise CorpusError(
                f"expected a file with one of {', '.join(SUFFIXES)}, found {path} (text may be "
                f"compressed: {', '.join(COMPRESSED)}); convert it or name a folder"
            )
        else:
            yield path


def _below(folder: Path) -> list[Path]:
    """The files of text below a folder, by name; Path.rglob would pass over what is locked."""

    def stop(error: OSError) -> None:
        raise error

    found = []
    try:
        for place, _, names in os.walk(folder, onerror=stop):
            if RECORD in names:
                _refuse_parts(Path(place))
            inside = (Path(place, name) for name in names)
            found += [path for path in inside if _kind(path) in SUFFIXES and path.is_file()]
    except OSError as error:
        raise _unreadable(error.filename, error) from error
    return sorted(found)


def _refuse_parts(folder: Path) -> None:
    """Raise CorpusError for a folder that `fedgraft corpus` wrote."""
    record = Record.read(folder)
    if record and record.kind == "corpus":
        parts = ", ".join(str(folder / f"{part}.jsonl") for part in get_args(Part))
        raise CorpusError(
            f"{folder}: expected text for one purpose, found what `fedgraft corpus` wrote, where "
            f"text to train on stands beside text that is held out; name what you mean of {parts}"
        )


def _unreadable(place: str | Path, error: OSError) -> CorpusError:
    return CorpusError(
        f"expected a file or folder to read at {place}, found: {error.strerror}; check its name "
        "and rights"
    )


def _read(file: Path, field: str, faults: _Faults, read: Read) -> Iterator[Document]:
    try:
        match _kind(file):
            case ".jsonl":
                lines = _json_rows(file, faults, read)
                yield from _documents_of(lines, f"{file}, line", file.name, field, faults)
            case ".parquet":
                rows = _parquet_rows(file, field)
                yield from _documents_of(rows, f"{file}, row", file.name, field, faults)
                read(file.stat().st_size)
            case kind:
                with _opened(file, read) as opened:
                    data = _untorn(opened.read, file)
                if kind in HTML:
                    yield _page(file, data)
                else:
                    yield Document(id=file.name, text=_decode(data, file), source=file.name)
    except CorpusError as error:
        faults.meet(error)


def _documents_of(
    rows: Iterable[tuple[int, Mapping[str, object]]],
    place: str,
    source: str,
    field: str,
    faults: _Faults,
) -> Iterator[Document]:
    """Rows, each with its number, as documents; `place` and the number say where a fault is."""
    for number, row in rows:
        try:
            text = row.get(field)
            if not isinstance(text, str):
                raise CorpusError(
                    f"{place} {number}: expected text in the field {field!r}, found the "
                    f"fields {', '.join(map(repr, row)) or 'none'}; name the right field or mend "
                    "the line"
                )
            name = f"{source}:{number}" if row.get("id") is None else str(row["id"])
            facts = {fact: str(row[fact]) for fact in FACTS if row.get(fact) and fact != field}
            for what, said in {"id": name, **facts, field: text}.items():
                _check_characters(said, f"{place} {number}", what)
        except CorpusError as error:
            faults.meet(error)
            continue
        yield Document(
            id=name,
            text=text,
            source=source,
            facts=facts,
        )


def read_json_lines(file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Line number and object of each line that is not blank; the file may be compressed.

    Raises CorpusError with file and line where a line is not UTF-8, not JSON or not an object.
    """
    return _json_rows(file, _Faults(limit=0, found=[]), _ignore)


def raw_lines(file: Path, numbers: Collection[int]) -> dict[int, str]:
    """The lines with these numbers (the first is 1) as they are written, without their ends.

    A line ends at a line feed, as `read_json_lines` counts them, and at nothing else that Unicode
    calls a separator. Raises CorpusError as it does.
    """
    with _opened(file, _ignore) as lines:
        return {
            number: _decode(line, file, number).rstrip("\r\n")
            for number, line in enumerate(_lines(lines, file), 1)
            if number in numbers
        }


def _json_rows(file: Path, faults: _Faults, read: Read) -> Iterator[tuple[int, dict[str, object]]]:
    with _opened(file, read) as lines:
        for number, line in enumerate(_lines(lines, file), 1):
            if line.strip():
                try:
                    row = json_object(line, file, number)
                except CorpusError as error:
                    faults.meet(error)
                else:
                    yield number, row


def json_object(line: bytes, file: Path, number: int) -> dict[str, object]:
    """The object that a line of a file is. Raises CorpusError as `read_json_lines`."""
    try:
        row = json.loads(_decode(line, file, number))
    except json.JSONDecodeError as error:
        raise CorpusError(
            f"{file}, line {number}: expected a JSON object, found {error.msg} at column "
            f"{error.colno}; mend or remove the line"
        ) from error
    except ValueError as error:
        raise CorpusError(
            f"{file}, line {number}: expected a JSON object, found one with an integer of over "
            f"{sys.get_int_max_str_digits()} digits; mend or remove the line"
        ) from error
    except RecursionError as error:
        raise CorpusError(
            f"{file}, line {number}: expected a JSON object, found one nested too deep to read; "
            "mend or remove the line"
        ) from error
    if not isinstance(row, dict):
        raise CorpusError(
            f"{file}, line {number}: expected a JSON object, found {type(row).__name__}; "
            "mend or remove the line"
        )
    return row


def _parquet_rows(file: Path, field: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            if field not in names:
                raise CorpusError(
                    f"{file}: expected text in the column {field!r}, found the columns "
                    f"{', '.join(map(repr, names)) or 'none'}; name the right one with --field"
                )
            wanted = [name for name in (field, "id", *FACTS) if name in names]
            number = 0
            for batch in opened.iter_batches(ROWS_PER_READ, columns=list(dict.fromkeys(wanted))):
                try:
                    rows = batch.to_pylist()
                except UnicodeDecodeError as error:
                    raise CorpusError(
                        f"{file}, rows {number + 1} to {number + len(batch)}: expected UTF-8 text, "
                        f"found the byte 0x{error.object[error.start]:02x} in one of them; write "
                        "the file again with text in UTF-8"
                    ) from error
                for row in rows:
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(
            f"{file}: expected a Parquet file, found: {error}; write or download it again"
        ) from error


def _page(file: Path, data: bytes) -> Document:
    """The main text of a web page, and its title."""
    from trafilatura import bare_extraction

    try:
        page: Any = bare_extraction(data, include_comments=False, with_metadata=False)
    except (ValueError, AssertionError, TypeError) as error:
        raise CorpusError(
            f"{file}: expected a page of HTML, found: {error}; mend or remove the file"
        ) from error
    title = re.search(rb"<title[^>]*>([^<]+)</title>", data, re.IGNORECASE)
    facts = {"title": " ".join(_unescape(title[1]).split())} if title else {}
    text = (page.text or "") if page else ""
    return Document(id=file.name, text=text, source=file.name, facts=facts)


def _unescape(data: bytes) -> str:
    return html.unescape(data.decode("utf-8", errors="replace"))


def _is_saved_dataset(folder: Path) -> bool:
    try:
        return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    except OSError as error:
        raise _unreadable(folder, error) from error


def _dataset(match: "re.Match[str]", field: str, faults: _Faults) -> Iterator[Document]:
    """A data set of the hub, or of a folder that the library `datasets` can read, streamed."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, split = match["name"], match["split"]
    if _is_saved_dataset(Path(name)):
        yield from _saved_dataset(Path(name), split, field, faults)
        return
    try:
        rows = load_dataset(
            name,
            match["config"],
            revision=match["revision"],
            split=split or "train",
            streaming=True,
        )
        place = f"{match[0]}, row"
        yield from _documents_of(enumerate(rows, 1), place, name, field, faults)
    except (DatasetsError, OSError, ValueError) as error:
        raise CorpusError(
            f"{match[0]}: expected a data set that can be read "
            f"(dataset:organisation/name[:config][@revision][#split]), found: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; check its name "
            "and the network"
        ) from error


def _saved_dataset(
    folder: Path, split: str | None, field: str, faults: _Faults
) -> Iterator[Document]:
    """A data set that `save_to_disk` wrote, mapped into memory."""
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f"{folder}: expected a data set of `save_to_disk`, found: {error}; write it again"
        ) from error
    if isinstance(found, DatasetDict):
        if (split or "train") not in found:
            raise CorpusError(
                f"{folder}: expected the split {split or 'train'!r}, found "
                f"{', '.join(map(repr, found))}; name one: dataset:{folder}#{next(iter(found), '')}"
            )
        found = found[split or "train"]
    elif split:
        raise CorpusError(
            f"{folder}: expected a data set with splits, found one without; leave #{split} away"
        )
    wanted = [name for name in (field, "id", *FACTS) if name in found.column_names]
    rows = found.select_columns(wanted) if field in wanted else found
    yield from _documents_of(enumerate(rows, 1), f"{folder}, row", folder.name, field, faults)


class _Metered(io.RawIOBase):
    """A file that tells how many bytes were read from it."""

    def __init__(self, file: IO[bytes], read: Read) -> None:
        self._file, self._read = file, read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        size: int = self._file.readinto(buffer)  # type: ignore[attr-defined]
        self._read(size)
        return size


class _Zstandard(io.RawIOBase):
    """The content of a .zst file; unlike the library's own reader it tells of a missing end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new()
        self._begun = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        target = memoryview(buffer).cast("B")
        while not self._ready:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._begun = self._new(), False
            data = data or self._file.read(BYTES_PER_READ)
            if not data:
                if self._begun:
                    raise EOFError("the end is missing")
                return 0
            self._begun = True
            self._ready = memoryview(self._frame.decompress(data))
        size = min(len(target), len(self._ready))
        target[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


@contextmanager
def _opened(file: Path, read: Read) -> Iterator[IO[bytes]]:
    """A file to read bytes from, decompressed where its name says so.

    Raises CorpusError where it cannot be opened.
    """
    try:
        raw = file.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(file, error) from error
    with (
        raw,
        io.BufferedReader(_Metered(raw, read), BYTES_PER_READ) as metered,
        _decompressed(metered, file.suffix.lower()) as opened,
    ):
        yield opened


def _decompressed(file: IO[bytes], suffix: str) -> IO[bytes]:
    match suffix:
        case ".gz":
            return cast(IO[bytes], gzip.open(file))
        case ".bz2":
            return bz2.open(file)
        case ".xz":
            return lzma.open(file)
        case ".zst":
            return io.BufferedReader(_Zstandard(file), BYTES_PER_READ)
        case _:
            return file


def _lines(opened: IO[bytes], file: Path) -> Iterator[bytes]:
    while line := _untorn(opened.readline, file):
        yield line


def _untorn(take: Callable[[], bytes], file: Path) -> bytes:
    """What `take` reads. Raises CorpusError where the file is damaged or was cut."""
    try:
        return take()
    except BROKEN as error:
        raise CorpusError(
            f"{file}: expected a file that is whole, found: {error or type(error).__name__}; "
            "make or download it again"
        ) from error


def _check_characters(text: str, place: str, field: str) -> None:
    """JSON can spell half a surrogate pair, which is no character and has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{place}: expected characters of Unicode, found the lone surrogate "
            f"\\u{ord(text[error.start]):04x} at character {error.start} of the field {field!r}; "
            "mend or remove the line"
        ) from error


def _decode(data: bytes, file: Path, line: int | None = None) -> str:
    """The text without the byte order mark that some editors put before it."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        place = f"line {line}, " if line else ""
        raise CorpusError(
            f"{file}, {place}byte {error.start}: expected UTF-8 text, found the byte "
            f"0x{data[error.start]:02x}; convert the file to UTF-8"
        ) from error
