"""What made an artefact: inputs by content hash, settings, versions; written beside every output.

Every output is a directory that appears whole or not at all: it is written into a sibling
temporary directory, gets its record `fedgraft.json`, and is renamed into place. The record holds
no time and no path, so that the same inputs give the same bytes.
"""

import contextlib
import errno
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fedgraft.errors import ArtefactError

RECORD = "fedgraft.json"
LIBRARIES = ("numpy", "torch", "transformers", "peft")
UNWRITABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EBUSY, errno.EXDEV, errno.ENAMETOOLONG, errno.ELOOP),
}

Kind = Literal[
    "checkpoint",
    "residual",
    "inspection",
    "graft",
    "adapter",
    "stage",
    "company",
    "corpus",
    "rows",
    "features",
    "coreset",
    "round",
]


class Record(BaseModel):
    """The content of a `fedgraft.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    fedgraft: str
    """Version of fedgraft that wrote it."""
    inputs: dict[str, str] = {}
    """Role of an input -> its content hash, e.g. `{"base": "sha256:..."}`."""
    ancestors: tuple[str, ...] = ()
    """Content hashes of the checkpoints that this one was trained from, oldest first."""
    residuals: tuple[str, ...] = ()
    """Content hashes of the residuals that were grafted on."""
    settings: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    """What was measured while it was made: counts, exactness, losses."""
    libraries: dict[str, str] = {}

    @classmethod
    def make(cls, kind: Kind, **fields: Any) -> "Record":
        """A record with the versions of this installation filled in."""
        return cls(kind=kind, fedgraft=version(), libraries=library_versions(), **fields)

    @classmethod
    def read(cls, directory: Path) -> "Record | None":
        """The record of an artefact, None where the directory has none (a foreign checkpoint).

        Raises ArtefactError where the record is there but cannot be understood.
        """
        path = directory / RECORD
        try:
            return cls.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValidationError, OSError) as error:
            raise ArtefactError(
                f"{path}: expected the record of an artefact of fedgraft, found {error}; "
                "restore the file or make the artefact again"
            ) from error

    def write(self, directory: Path) -> None:
        (directory / RECORD).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def check_directory(place: Path) -> None:
    """Raise ArtefactError where a file stands in the place of a directory, or above it."""
    for one in (place, *place.absolute().parents):
        if one.exists() and not one.is_dir():
            raise ArtefactError(
                f"{one}: expected a directory to write, found a file; choose another"
            )


def check_free(out: Path, *, overwrite: bool = False) -> None:
    """Ask before long work whether an artefact may be written to `out`.

    Raises ArtefactError where it exists (unless `overwrite`, and it is an artefact), where it is
    not a directory, lies in none, or is a mount point, which nothing can take the place of.
    """
    check_directory(out)
    if os.path.ismount(out):
        raise ArtefactError(
            f"{out}: expected a directory that appears whole, found a mount point, which cannot be "
            f"put into its place; choose a directory in it, such as {out / 'result'}"
        )
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ArtefactError(f"{out} exists already; remove it or choose another --out")
    if not (out / RECORD).is_file():
        raise ArtefactError(
            f"{out}: expected an artefact to overwrite, found a directory without {RECORD}; remove "
            "it yourself or choose another --out"
        )


@contextlib.contextmanager
def new_artefact(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `out`; rename it to `out` on success, remove it on any failure.

    The body writes its files, and its Record last. A kill leaves the old artefact or none. Several
    processes, or threads of one, may write the same `out` at once: it is always a whole one. The
    first to be ready stays, and the others are told that it exists; with `overwrite`, the last.

    Raises ArtefactError where `out` exists (unless `overwrite`), also where another wrote it in the
    meantime; where `check_free` does, or it cannot be written (full disk, no permission).
    """
    out = out.resolve() if out.is_symlink() else out.absolute()
    check_free(out, overwrite=overwrite)
    partial = _beside(out, "partial")
    _writing.add(partial)
    try:
        with told_if_unwritable(out):
            _remove_abandoned(out)
            partial.mkdir(parents=True)
            yield partial
            while not _renamed(partial, out):
                check_free(out, overwrite=overwrite)
                _removed(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _writing.discard(partial)


HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
"""This machine, or container, in a name: the numbers of processes are its own."""
_writing: set[Path] = set()
"""What this process has beside its artefacts at the moment: none of it is abandoned."""


def _beside(out: Path, kind: Literal["partial", "old"]) -> Path:
    """A place that no other process, on any machine, and no other thread of this one, has."""
    return out.with_name(f".{out.name}.{kind}-{HOST}-{threading.get_ident()}-{os.getpid()}")


def _renamed(partial: Path, out: Path) -> bool:
    """Put a whole artefact into its place; False where there is one."""
    try:
        partial.rename(out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _removed(out: Path) -> None:
    """Remove an artefact: it is gone at once, though its files take their time."""
    old = _beside(out, "old")
    _writing.add(old)
    try:
        out.rename(old)
        shutil.rmtree(old)
    except FileNotFoundError:
        pass  # another one removed it
    finally:
        _writing.discard(old)


@contextlib.contextmanager
def told_if_unwritable(place: Path, *, left: str = "nothing was left there") -> Iterator[None]:
    """Turn what the system says of a full disk or a lacking permission into an ArtefactError."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise ArtefactError(
            f"could not write {place}: {error.strerror or error}; {left}. "
            "Free some space or choose another place, then run the same command again"
        ) from error


def _remove_abandoned(out: Path) -> None:
    """Remove what killed runs of this machine left beside `out`; what a living process writes,
    or another machine that shares the disk, stays."""
    for kind in ("partial", "old"):
        for left in out.parent.glob(f".{glob.escape(out.name)}.{kind}-{HOST}-*"):
            owner = left.name.rpartition("-")[2]
            if owner.isdigit() and left not in _writing and not _is_alive(int(owner)):
                shutil.rmtree(left, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def hash_json(value: Any) -> str:
    """Content hash of a JSON-able value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def hash_bytes(*parts: bytes) -> str:
    """Content hash of some bytes, each part with its length, in the given order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return "sha256:" + digest.hexdigest()


def hash_files(paths: list[Path]) -> str:
    """Content hash of some files: their bytes in the given order; names and places do not count."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return "sha256:" + digest.hexdigest()


def derive_seed(seed: int, *labels: str | int) -> int:
    """A 32-bit seed for one purpose, from the study's seed and labels that name the purpose."""
    text = ":".join(map(str, (seed, *labels)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@cache
def version() -> str:
    return importlib.metadata.version("fedgraft")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that can change a number, read without importing them."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
