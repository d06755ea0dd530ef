"""Packed rows on disk: written as they are encoded, mapped into memory when they are read.

    folder/
      tokens.bin      every token, uint16 or uint32      written batch by batch
      pieces.bin      (start, length, position) a piece  ordered by row
      bounds.bin      int64, row r is pieces bounds[r] to bounds[r + 1]
      fedgraft.json   what it was made from, the settings, size and SHA-256 of each file

A billion tokens are 2 GB of tokens.bin (4 GB for vocabularies above 65,536) and 16 bytes a piece;
in memory are the pieces alone, and whatever of the tokens the system likes to keep. Numbers are
little-endian.
"""

from collections.abc import Iterable, Iterator
from hashlib import file_digest, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from fedgraft.errors import ArtefactError
from fedgraft.progress import progress
from fedgraft.provenance import RECORD, Record, hash_json, new_artefact
from fedgraft.text.corpus import Document
from fedgraft.text.packing import (
    Rows,
    arrange,
    check,
    content_hash,
    cut,
    encode,
    nothing_to_pack,
)
from fedgraft.text.rows import PIECE, PackedText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS, PIECES, BOUNDS = "tokens.bin", "pieces.bin", "bounds.bin"


class _File(BaseModel):
    """What the record says of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bytes: int
    sha256: str


class _Figures(BaseModel):
    """What the record says of packed rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_documents: int
    num_tokens: int
    num_rows: int
    fill: float
    highest_id: int
    padding: int
    dtype: str
    files: dict[str, _File]


def pack_to_disk(
    tokenizer: "PreTrainedTokenizerBase",
    documents: Iterable[Document],
    folder: Path,
    row_length: int,
    *,
    seed: int = 0,
    num_positions: int | None = None,
    overwrite: bool = False,
) -> Rows:
    """Pack documents into a folder and map it: the rows of `packing.pack`, in little memory.

    The documents are read once, a batch at a time; a single one is encoded whole.

    Raises CorpusError as `pack` does, ArtefactError where the folder exists or cannot be written;
    then nothing is left there.
    """
    padding = check(tokenizer, row_length, num_positions)
    settings = _settings(row_length, seed, num_positions)
    files: dict[str, _File] = {}
    lengths: list[NDArray[np.int64]] = []
    text = _TextHash()
    highest_id = padding
    with new_artefact(folder, overwrite=overwrite) as partial:
        with (
            _Written(partial / TOKENS, files) as tokens,
            progress("packing", None, "tokens") as advance,
        ):
            for batch in encode(tokenizer, text.over(documents)):
                lengths.append(batch.lengths)
                highest_id = max(highest_id, int(batch.tokens.max()))
                tokens.write(batch.tokens)
                dtype = batch.tokens.dtype.str
                advance(len(batch.tokens), f"{text.num_documents:,} documents")
        if not lengths:
            raise nothing_to_pack()
        found = np.concatenate(lengths)
        pieces, bounds = arrange(cut(found, row_length, num_positions), row_length, seed)
        for name, array in ((PIECES, pieces), (BOUNDS, bounds)):
            with _Written(partial / name, files) as file:
                file.write(array)
        num_rows = len(bounds) - 1
        num_tokens = int(found.sum())
        Record.make(
            "rows",
            inputs={"tokenizer": tokenizer_hash(tokenizer), "text": text.value},
            settings=settings,
            figures=_Figures(
                num_documents=text.num_documents,
                num_tokens=num_tokens,
                num_rows=num_rows,
                fill=num_tokens / (num_rows * row_length),
                highest_id=highest_id,
                padding=padding,
                dtype=dtype,
                files=files,
            ).model_dump(),
        ).write(partial)
    return open_rows(folder)


def open_rows(folder: Path, *, verify: bool = False) -> Rows:
    """Map packed rows into memory.

    The size of every file is checked, and the bytes of those that say where things are. With
    `verify` those of the tokens too, at some 1.5 GB a second.

    Raises ArtefactError where the folder holds no packed rows, or a file is missing, cut short or
    changed.
    """
    record = Record.read(folder)
    if record is None or record.kind != "rows":
        raise ArtefactError(
            f"expected packed rows in {folder}, found {record.kind if record else 'no record'}; "
            "name a folder that fedgraft packed rows into"
        )
    try:
        figures = _Figures.model_validate(record.figures)
        row_length = int(record.settings["row_length"])
        described = {name: figures.files[name] for name in (TOKENS, PIECES, BOUNDS)}
    except (ValidationError, KeyError) as error:
        raise ArtefactError(
            f"{folder / RECORD}: expected the record of packed rows, found {error}; remove the "
            "folder and pack again"
        ) from error
    for name, file in described.items():
        _check_file(folder / name, file, content=verify or name != TOKENS)
    dtype = np.dtype(figures.dtype)
    hashes = {name.removesuffix(".bin"): file.sha256 for name, file in described.items()}
    return Rows.of(
        PackedText(
            tokens=_mapped(folder / TOKENS, dtype),
            pieces=_mapped(folder / PIECES, PIECE),
            bounds=_mapped(folder / BOUNDS, np.dtype("<i8")),
            row_length=row_length,
            padding=figures.padding,
            highest_id=figures.highest_id,
            content_hash=content_hash(hashes, dtype, row_length, figures.padding),
        )
    )


def packed(
    tokenizer: "PreTrainedTokenizerBase",
    documents: Iterable[Document],
    folder: Path,
    row_length: int,
    *,
    seed: int = 0,
    num_positions: int | None = None,
) -> tuple[Rows, str]:
    """The rows of a folder where they are whole and of this very text, else packed anew.

    Returns the rows and a line for the user that says which. The documents are read once to know
    the text, and once more to pack it: pass what can be read twice, not a generator.

    Raises as `pack_to_disk` does, and ArtefactError where the folder holds anything else.
    """
    assert iter(documents) is not documents, "documents that can be read once only"
    check(tokenizer, row_length, num_positions)
    why = "packed into"
    if folder.is_dir() and any(folder.iterdir()):
        foreign = {path.name for path in folder.iterdir()} - {TOKENS, PIECES, BOUNDS, RECORD}
        if foreign:
            raise ArtefactError(
                f"expected packed rows or an empty folder at {folder}, found "
                f"{', '.join(sorted(foreign)[:3])}; choose another folder"
            )
        try:
            rows = open_rows(folder, verify=True)
        except ArtefactError as error:
            why = f"packed again, for what was there is damaged ({error}), into"
        else:
            changed = _changes(folder, tokenizer, documents, row_length, seed, num_positions)
            if not changed:
                return rows, _line("opened, packed before in", folder, rows)
            why = f"packed again, for {' and '.join(changed)} changed, into"
    rows = pack_to_disk(
        tokenizer,
        documents,
        folder,
        row_length,
        seed=seed,
        num_positions=num_positions,
        overwrite=True,
    )
    return rows, _line(why, folder, rows)


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash of what decides on the ids of a text: vocabulary, rules, start and end token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        tokenizer("", add_special_tokens=False)  # the truncation of a call before is not part of it
    rules = backend.to_str() if backend else sorted(tokenizer.get_vocab().items())
    return hash_json([rules, tokenizer.bos_token_id, tokenizer.eos_token_id])


def text_hash(documents: Iterable[Document]) -> str:
    """Hash of the documents' text, in order."""
    text = _TextHash()
    for _ in text.over(documents):
        pass
    return text.value


def _changes(
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase",
    documents: Iterable[Document],
    row_length: int,
    seed: int,
    num_positions: int | None,
) -> list[str]:
    """What is not as it was when the folder was packed."""
    record = Record.read(folder)
    assert record
    settings = _settings(row_length, seed, num_positions)
    changed = [name for name, value in settings.items() if record.settings.get(name) != value]
    if record.inputs.get("tokenizer") != tokenizer_hash(tokenizer):
        changed.append("the tokenizer")
    if not changed and record.inputs.get("text") != text_hash(documents):
        changed.append("the text")
    return changed


def _settings(row_length: int, seed: int, num_positions: int | None) -> dict[str, Any]:
    return {"row_length": row_length, "seed": seed, "num_positions": num_positions}


def _line(what: str, folder: Path, rows: Rows) -> str:
    return (
        f"{what} {folder}: {rows.num_tokens:,} tokens in {len(rows):,} rows of {rows.row_length}, "
        f"{rows.fill:.1%} of their space"
    )


class _TextHash:
    """Hash and number of the documents that passed through."""

    def __init__(self) -> None:
        self._digest = sha256()
        self.num_documents = 0

    def over(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            text = document.text.encode()
            self._digest.update(len(text).to_bytes(8, "little"))
            self._digest.update(text)
            self.num_documents += 1
            yield document

    @property
    def value(self) -> str:
        return "sha256:" + self._digest.hexdigest()


class _Written:
    """A file that arrays are appended to; its size and hash are put down when it is closed."""

    def __init__(self, path: Path, files: dict[str, _File]) -> None:
        self._path, self._files = path, files
        self._digest = sha256()
        self._num_bytes = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> "_Written":
        self._file = self._path.open("wb")
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        assert self._file
        self._file.close()
        self._files[self._path.name] = _File(
            num_bytes=self._num_bytes, sha256=self._digest.hexdigest()
        )

    def write(self, array: "NDArray[Any]") -> None:
        assert self._file
        # not array.tofile, whose OSError on a full disk has no number to know it by
        self._file.write(array.data)
        self._digest.update(array.data)
        self._num_bytes += array.nbytes


def _check_file(path: Path, described: _File, *, content: bool) -> None:
    remedy = "remove the folder and pack again"
    try:
        num_bytes = path.stat().st_size
        if num_bytes != described.num_bytes:
            raise ArtefactError(
                f"{path}: expected {described.num_bytes:,} bytes, found {num_bytes:,}; {remedy}"
            )
        if content:
            with path.open("rb") as file:
                found = file_digest(file, "sha256").hexdigest()
            if found != described.sha256:
                raise ArtefactError(
                    f"{path}: expected the SHA-256 {described.sha256[:12]}, found {found[:12]}: "
                    f"its bytes have changed; {remedy}"
                )
    except OSError as error:
        raise ArtefactError(
            f"{path}: expected a file of packed rows, found: {error.strerror}; {remedy}"
        ) from error


def _mapped(path: Path, dtype: "np.dtype[Any]") -> "NDArray[Any]":
    return np.asarray(np.memmap(path, dtype, mode="r"))
