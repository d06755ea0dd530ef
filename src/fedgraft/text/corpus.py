"""A department's text: documents from JSONL, plain text and Markdown, without exact duplicates.

Nothing is dropped in silence: duplicates are counted, and a line or a file that cannot be read
stops the load with its place.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from pydantic import BaseModel, ValidationError

from fedgraft.errors import CorpusError, FedgraftError

_Line = TypeVar("_Line", bound=BaseModel)

SUFFIXES = (".jsonl", ".txt", ".md")


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text and where it came from."""

    id: str
    text: str
    source: str

    @property
    def hash(self) -> str:
        """Hash of the text alone: the same text is the same document, wherever it stands."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """Documents by what they are for; no document is in two of them."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """The documents of one department."""

    documents: tuple[Document, ...]
    num_duplicates: int
    """How many documents were dropped because an earlier one has the same text."""
    department: str | None = None

    @classmethod
    def load(
        cls, *paths: str | Path, department: str | None = None, field: str = "text"
    ) -> "Corpus":
        """Read files and folders in the order given (a folder's files by name).

        Raises CorpusError, with file and line, for a missing path, a suffix other than .jsonl, .txt
        or .md, bytes that are not UTF-8, a broken line, a missing field, or no text at all.
        """
        seen: set[str] = set()
        documents: list[Document] = []
        num_read = 0
        for file in _files(paths):
            for document in _read(file, field):
                num_read += 1
                found = document.hash
                if found not in seen:
                    seen.add(found)
                    documents.append(document)
        if not documents:
            raise CorpusError(
                f"expected at least one document with text, found none in "
                f"{', '.join(map(str, paths)) or 'no path at all'}; name files or folders with "
                f"{', '.join(SUFFIXES)}"
            )
        return cls(
            documents=tuple(documents),
            num_duplicates=num_read - len(documents),
            department=department,
        )

    def split(self, *, validation: float = 0.1, test: float = 0.1) -> Splits:
        """Split by document hash: a document's place depends on its text and the shares alone.

        Raises CorpusError where the shares leave nothing for training.
        """
        if validation < 0 or test < 0 or validation + test >= 1:
            raise CorpusError(
                f"expected shares for validation and test that leave text for training, found "
                f"{validation} and {test}; choose them with a sum below 1"
            )
        parts: dict[str, list[Document]] = {"train": [], "validation": [], "test": []}
        for document in self.documents:
            place = int(document.hash[:8], 16) / 2**32
            name = "test" if place < test else "validation"
            parts[name if place < test + validation else "train"].append(document)
        return Splits(**{name: tuple(part) for name, part in parts.items()})


def _files(paths: Sequence[str | Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_dir():
            inside = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            yield from sorted(p for p in inside if p.is_file())
        elif not path.exists():
            raise CorpusError(f"expected a file or folder of text at {path}, found nothing there")
        elif path.suffix.lower() not in SUFFIXES:
            raise CorpusError(
                f"expected a file with one of {', '.join(SUFFIXES)}, found {path}; convert it or "
                "name a folder"
            )
        else:
            yield path


def _read(file: Path, field: str) -> Iterator[Document]:
    if file.suffix.lower() == ".jsonl":
        for number, row in read_json_lines(file):
            text = row.get(field)
            if not isinstance(text, str):
                raise CorpusError(
                    f"{file}, line {number}: expected text in the field {field!r}, found the "
                    f"fields {', '.join(map(repr, row)) or 'none'}; name the right field or mend "
                    "the line"
                )
            _check_characters(text, file, number)
            if text.strip():
                name = str(row.get("id", f"{file.name}:{number}"))
                yield Document(id=name, text=text, source=file.name)
    else:
        with _opened(file) as opened:
            text = _decode(opened.read(), file)
        if text.strip():
            yield Document(id=file.name, text=text, source=file.name)


def read_json_lines(file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Line number and object of each line that is not blank.

    Raises CorpusError with file and line where a line is not UTF-8, not JSON or not an object.
    """
    with _opened(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(_decode(line, file, number))
            except json.JSONDecodeError as error:
                raise CorpusError(
                    f"{file}, line {number}: expected a JSON object, found {error.msg} at column "
                    f"{error.colno}; mend or remove the line"
                ) from error
            if not isinstance(row, dict):
                raise CorpusError(
                    f"{file}, line {number}: expected a JSON object, found {type(row).__name__}; "
                    "mend or remove the line"
                )
            yield number, row


def load_lines(
    file: Path, kind: type[_Line], *, noun: str, error: type[FedgraftError]
) -> tuple[_Line, ...]:
    """Each line of a file as a record of the kind.

    Raises `error` with file, line and every fault for a line that is no such record, and for a file
    without any; CorpusError for a line that is no JSON object.
    """
    records = []
    for number, row in read_json_lines(file):
        try:
            records.append(kind.model_validate(row))
        except ValidationError as invalid:
            faults = "; ".join(
                f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in invalid.errors()
            )
            raise error(
                f"{file}, line {number}: expected a {noun} with the fields "
                f"{', '.join(kind.model_fields)}, found {faults}; mend the line"
            ) from invalid
    if not records:
        raise error(f"{file}: expected at least one {noun}, found none")
    return tuple(records)


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    try:
        opened = file.open("rb")
    except OSError as error:
        raise CorpusError(
            f"expected a file to read at {file}, found: {error.strerror}; check its name and rights"
        ) from error
    with opened:
        yield opened


def _check_characters(text: str, file: Path, line: int) -> None:
    """JSON can spell half a surrogate pair, which is no character and has no bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{file}, line {line}: expected characters of Unicode, found the lone surrogate "
            f"\\u{ord(text[error.start]):04x} at character {error.start} of the text; mend "
            "or remove the line"
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
