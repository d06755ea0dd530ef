"""A department's text, in memory or on disk: what its sources hold, without duplicates, in splits.

    Corpus.load     all documents in memory, without exact duplicates: for studies and departments
    write_corpus    sources of any size, cleaned and split into files:

        out/train.jsonl  validation.jsonl  test.jsonl     a document a line: id, facts, text
        out/broken.log                                    lines that were passed over, if any
        out/fedgraft.json                                 the record

Nothing is dropped in silence: duplicates are counted, and a line or a file that cannot be read
stops the load with its place.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from fedgraft.errors import CorpusError, FedgraftError
from fedgraft.progress import progress
from fedgraft.provenance import Record, new_artefact
from fedgraft.text.cleaning import Cleaning, Count, Tally, clean
from fedgraft.text.sources import (
    SUFFIXES,
    Document,
    Hashed,
    Part,
    check_shares,
    documents,
    num_bytes,
    read_json_lines,
    split_of,
)

__all__ = [
    "Corpus",
    "Document",
    "Splits",
    "Written",
    "load_lines",
    "read_json_lines",
    "write_corpus",
]

_Line = TypeVar("_Line", bound=BaseModel)
_Hashed = TypeVar("_Hashed", bound=Hashed)
_Example = TypeVar("_Example", covariant=True)

PARTS: tuple[Part, ...] = ("train", "validation", "test")
BROKEN = "broken.log"


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits(Generic[_Example]):
    """Documents, or dialogues, by what they are for; none is in two of them."""

    train: tuple[_Example, ...]
    validation: tuple[_Example, ...]
    test: tuple[_Example, ...]
    num_duplicates: int = 0
    """How many were dropped because an earlier one says the same."""


def split(
    examples: Iterable[_Hashed], *, validation: float = 0.1, test: float = 0.1
) -> Splits[_Hashed]:
    """Split by hash: an example's place depends on what it says and the shares alone.

    Raises CorpusError where the shares leave nothing for training.
    """
    check_shares(validation, test)
    parts: dict[Part, dict[str, _Hashed]] = {"train": {}, "validation": {}, "test": {}}
    num_read = 0
    for example in examples:
        num_read += 1
        parts[split_of(example, validation=validation, test=test)].setdefault(example.hash, example)
    return Splits(
        train=tuple(parts["train"].values()),
        validation=tuple(parts["validation"].values()),
        test=tuple(parts["test"].values()),
        num_duplicates=num_read - sum(map(len, parts.values())),
    )


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

        Raises CorpusError, with file and line, for a missing path, a kind of file that is not read,
        bytes that are not UTF-8, a broken line, a missing field, or no text at all; for a folder
        that `write_corpus` wrote, of which the caller names the part.
        """
        kept: dict[str, Document] = {}
        num_read = 0
        for document in documents(*paths, field=field):
            if document.text.strip():
                num_read += 1
                kept.setdefault(document.hash, document)
        if not kept:
            raise CorpusError(
                f"expected at least one document with text, found none in "
                f"{', '.join(map(str, paths)) or 'no path at all'}; name files or folders with "
                f"{', '.join(SUFFIXES)}"
            )
        return cls(
            documents=tuple(kept.values()),
            num_duplicates=num_read - len(kept),
            department=department,
        )

    def split(self, *, validation: float = 0.1, test: float = 0.1) -> Splits[Document]:
        """Its documents, as `split` says."""
        found = split(self.documents, validation=validation, test=test)
        return replace(found, num_duplicates=self.num_duplicates)


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What `write_corpus` wrote, and what it left out."""

    tally: Tally
    broken: tuple[str, ...]
    """A message with file and line for each line or file that was passed over."""
    num_documents: dict[Part, int]
    num_tokens: dict[Part, int]
    """Empty where nothing counted tokens."""


def write_corpus(
    paths: Sequence[str | Path],
    out: Path,
    cleaning: Cleaning,
    *,
    count: Count | None = None,
    validation: float = 0.1,
    test: float = 0.1,
    field: str = "text",
    max_broken: int = 0,
    overwrite: bool = False,
) -> Written:
    """Read sources, clean and split what they hold, and write it; memory does not grow with it.

    What does grow is what finds duplicates: see `cleaning`.

    Arguments:
        paths, field, max_broken: as for `documents`.
        count: the model's tokenizer, as for `clean`.

    Raises CorpusError for sources that cannot be read, for shares that leave nothing for training,
    and where no document is left; ArtefactError where `out` exists or cannot be written.
    """
    check_shares(validation, test)
    broken: list[str] = []
    tally = Tally()
    num_documents = dict.fromkeys(PARTS, 0)
    num_tokens = dict.fromkeys(PARTS, 0) if count else {}
    digest = hashlib.sha256()

    def told(read: Iterator[Document]) -> Iterator[Document]:
        for document in read:
            digest.update(bytes.fromhex(document.hash))
            yield document

    total = num_bytes(*paths)
    unit = "documents" if total is None else "MB"
    with (
        new_artefact(out, overwrite=overwrite) as folder,
        ExitStack() as opened,
        progress("clean", None if total is None else total / 1e6, unit) as advance,
    ):
        files = {
            part: opened.enter_context((folder / f"{part}.jsonl").open("w", encoding="utf-8"))
            for part in PARTS
        }
        read = documents(
            *paths,
            field=field,
            max_broken=max_broken,
            broken=broken,
            read=lambda size: advance(size / 1e6, f"{tally.num_read:,} documents"),
        )
        for document in clean(told(read), cleaning, tally=tally, count=count):
            part = split_of(document, validation=validation, test=test)
            line = {"id": document.id, **document.facts, "text": document.text}
            files[part].write(json.dumps(line, ensure_ascii=False) + "\n")
            num_documents[part] += 1
            if count:
                num_tokens[part] += document.num_tokens or 0
            if total is None:
                advance(1)
        if not tally.num_kept:
            dropped = ", ".join(f"{number} {reason}" for reason, number in tally.dropped.items())
            raise CorpusError(
                f"expected at least one document to keep in {', '.join(map(str, paths))}, found "
                f"{tally.num_read} and dropped all ({dropped}); name other text or ask for less"
            )
        if broken:
            (folder / BROKEN).write_text("\n".join(broken) + "\n", encoding="utf-8")
        Record.make(
            "corpus",
            inputs={"documents": "sha256:" + digest.hexdigest()},
            settings={
                "cleaning": cleaning.model_dump(mode="json"),
                "validation": validation,
                "test": test,
            },
            figures={
                "num_read": tally.num_read,
                "num_normalised": tally.num_changed,
                "num_dropped": tally.dropped,
                "num_broken": len(broken),
                "num_documents": num_documents,
                "num_tokens": num_tokens,
            },
        ).write(folder)
    return Written(
        tally=tally, broken=tuple(broken), num_documents=num_documents, num_tokens=num_tokens
    )


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
