"""What may leave a client, and the record of all that did.

    client's answer --> allow(kind, payload) --> away --> Ledger.append(Entry) --> ledger.jsonl
                             |
                             +--> FederationError: nothing leaves

    kind        arrays                                  counts              figures
    sizes       -                                       num_examples, ...   -
    centroids   centroids [k, d], counts [k]            num_examples        -
    adapter     the tensors that the server named       num_examples, ...   loss, seconds, scores
    scores      -                                       num_examples, ...   global/right, ...

An array is float32 or float16, its numbers finite; counts alone are int64. A count is an int, a
figure a float. Nothing else is let through: no text, no bytes, no other type and no other key, not
nested, not as an object, not as a subclass that carries more than its numbers.

What is promised. Text does not leave by a mistake of ours or of a department's own code: as a
string, as bytes, as an array of characters or of bytes (uint8), nor as numbers that plainly stand
for it: token ids or code points as integers or as floats, or the bytes of Latin prose read as
float16, float32 or int64. That rests on bounds which answers keep and text does not: `counts` add
up to `num_examples` at most; no float is above LARGEST in magnitude; and in no array are at least
half of the numbers that are not zero whole, with more than MAX_WHOLE different ones among them. A
centroid whose count is 0 is all zeros. So
16 token ids may pass in an array, as many as add up to `num_examples` may pass as counts, and the
8 bytes of each figure may be those of a word.

What is not. Numbers can mean anything: a client whose code is hostile can scale its text, hide it
in the last bits of an adapter or in the counts that it claims, and no check of numbers can tell.
An honest adapter may have learned text by heart, and the centroid of one example is that example's
features. Against those there are code that each department installed itself, and noise
(client-level privacy); this gate is neither.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from fedgraft.errors import FederationError
from fedgraft.provenance import told_if_unwritable

Kind = Literal["sizes", "centroids", "adapter", "scores"]
Phase = Literal["select", "train", "aggregate", "evaluate"]
DType = Literal["float32", "float16", "int64", "int", "float"]
By = Literal["client", "round", "kind", "phase"]

MODELS = ("graft", "global", "department", "client")
"""What a client scores: the graft alone, and it with one of three adapters."""
SCORES = (
    "nats_per_token",
    "bits_per_byte",
    "prompt_strict",
    "prompt_loose",
    "instruction_strict",
    "instruction_loose",
    "right",
    "right_and_as_instructed",
    "asked",
    "recall",
)
"""Figures of a scorecard (see `evaluation.scorecard`)."""
COUNTS: Mapping[Kind, frozenset[str]] = {
    "sizes": frozenset({"num_examples", "num_documents", "num_dialogues", "num_left_out"}),
    "centroids": frozenset({"num_examples"}),
    "adapter": frozenset({"num_examples", "num_tokens", "num_steps", "num_scored"}),
    "scores": frozenset({"num_examples", "num_documents", "num_tokens", "num_prompts"}),
}
"""Plain ints from 0 to MAX_COUNT."""
FIGURES: Mapping[Kind, frozenset[str]] = {
    "sizes": frozenset(),
    "centroids": frozenset(),
    "adapter": frozenset(
        {"loss", "seconds", "seconds_scoring", *(f"{model}/nats_per_token" for model in MODELS)}
    ),
    "scores": frozenset(f"{model}/{score}" for model in MODELS for score in SCORES),
}
"""Plain floats up to LARGEST in magnitude."""

MAX_COUNT = 2**31 - 1
MAX_CENTROIDS = 4096
"""Rows of `centroids`, and so the length of `counts`, the only array of integers."""
LARGEST = 1e6
"""A bound on any float: bytes of lower-case text read as float32 are above 1e19."""
MAX_WHOLE = 16
"""Different whole numbers, but for zero, in an array of floats most of which are whole."""


class Item(BaseModel):
    """One array or scalar of a message: what it was, without its numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dtype: DType
    shape: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Empty for a scalar, an `int` or a `float`."""

    @property
    def num_bytes(self) -> int:
        """Of the numbers alone; a scalar counts as 8."""
        width = 8 if self.dtype in ("int", "float") else np.dtype(self.dtype).itemsize
        return math.prod(self.shape) * width


def allow(
    kind: Kind,
    payload: Mapping[str, object],
    *,
    tensors: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Item, ...]:
    """Let a client's answer pass, and say what is in it, by name; see the head of this file.

    The one gate through which an answer leaves. It looks and changes nothing; whether all is there
    that was asked for is the server's question.

    Args:
        payload: Key -> array or scalar; a plain dict.
        tensors: Of an adapter: the tensors that may leave, each with its shape, as the client got
            them. Their names are text, so the client does not choose them.

    Raises FederationError for anything else. It names the key, cut short, and what kind of thing
    stood there; never a value.
    """
    if kind not in get_args(Kind):
        raise FederationError(
            f"expected an answer of the kind {', '.join(get_args(Kind))}, found {_shown(kind)}; "
            "nothing else leaves a client"
        )
    if type(payload) is not dict:
        raise FederationError(
            f"expected {kind} as a plain dict, found {_type(payload)}; nothing left the client"
        )
    for key in payload:
        if type(key) is not str:
            raise FederationError(
                f"{kind}: expected keys that are plain strings, found {_type(key)}; nothing left "
                "the client"
            )
    named = tensors or {}
    items = []
    for key, value in sorted(payload.items()):
        if key in COUNTS[kind]:
            _check_count(kind, key, value)
            items.append(Item(name=key, dtype="int"))
        elif key in FIGURES[kind]:
            _check_figure(kind, key, value)
            items.append(Item(name=key, dtype="float"))
        elif kind == "centroids" and key == "counts":
            items.append(_item(key, _checked_counts(payload)))
        elif kind == "centroids" and key == "centroids":
            items.append(_item(key, _checked_centroids(payload)))
        elif kind == "adapter" and key in named:
            items.append(_item(key, _checked_floats(kind, key, value, named[key])))
        else:
            raise FederationError(
                f"{kind}: expected only {_keys(kind, len(named))}, found {_shown(key)} "
                f"({_type(value)}); nothing left the client. Take it out of the answer"
            )
    return tuple(items)


class Entry(BaseModel):
    """One message and its answer: one line of a ledger."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    round: Annotated[int, Field(ge=0)]
    phase: Phase
    client: Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$", max_length=200)]
    kind: Kind
    items: tuple[Item, ...]
    """What left the client, as `allow` returned it."""
    bytes_up: Annotated[int, Field(ge=0)]
    """From the client, as they travelled; in one process the sum over the items."""
    bytes_down: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """From the question to the answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Total:
    """The messages of one client, round, kind or phase, added up."""

    num_messages: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0


class Ledger:
    """What left the clients of a run: entries are added, never changed or taken away.

    In memory, and where a file is given also there, a line of JSON an entry, which is written
    before the entry is in memory and is there if the process dies (not if the machine loses its
    power). A line is written by one call to the system; one that a kill or a full disk cut short is
    taken away, or completed where its newline alone is missing. A run that resumes a round again
    adds its messages again: they left twice.

    One process, and one thread of it, writes a file.
    """

    def __init__(self, file: Path | None = None) -> None:
        """Read what is in the file already; one that is not there is made by the first entry.

        Raises FederationError, with file and line, for a line that is no entry and is not the last,
        cut one, and for a file that cannot be read; ArtefactError where a cut line cannot be mended
        since the file cannot be written.
        """
        self.file = file
        self.num_bytes_cut = 0
        """How much of an unfinished last line was taken away when the file was opened."""
        self._entries: list[Entry] = []
        self._items: dict[tuple[Item, ...], tuple[Item, ...]] = {}
        if file is not None:
            self._read(file)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries, oldest first."""
        return tuple(self._entries)

    def append(self, entry: Entry) -> None:
        """Add an entry.

        Raises ArtefactError where the file cannot be written; the ledger is then as it was.
        """
        if self.file is not None:
            with told_if_unwritable(self.file, left="the entries before are whole"):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                _append_line(self.file, entry.model_dump_json().encode() + b"\n")
        self._hold(entry)

    def totals(self, by: By) -> dict[str | int, Total]:
        """The messages of each client, round, kind or phase added up, in the order of their name.

        Those of all keys together are those of the run, whatever they are added up by.
        """
        totals: dict[str | int, Total] = {}
        for entry in self._entries:
            key: str | int = getattr(entry, by)
            before = totals.get(key, Total())
            totals[key] = Total(
                num_messages=before.num_messages + 1,
                bytes_up=before.bytes_up + entry.bytes_up,
                bytes_down=before.bytes_down + entry.bytes_down,
                seconds=before.seconds + entry.seconds,
            )
        return dict(sorted(totals.items()))

    def _hold(self, entry: Entry) -> None:
        """Keep an entry; what is in it, hundreds of tensors often, once for all that are alike."""
        items = self._items.setdefault(entry.items, entry.items)
        self._entries.append(entry.model_copy(update={"items": items}))

    def _read(self, file: Path) -> None:
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise FederationError(
                f"{file}: expected the ledger of a run, found {error.strerror or error}; name "
                "another file"
            ) from error
        *lines, last = data.split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                self._hold(Entry.model_validate_json(line))
            except ValidationError as error:
                fault = error.errors()[0]
                place = ".".join(map(str, fault["loc"])) or "line"
                raise FederationError(
                    f"{file}, line {number}: expected what left a client, found {place}: "
                    f"{fault['msg']}; a ledger is only added to: restore the file or name a new one"
                ) from error
        if last:
            with told_if_unwritable(file, left="its last line is cut short"):
                self._mend(file, len(data) - len(last), last)

    def _mend(self, file: Path, start: int, last: bytes) -> None:
        """Complete the last line, or take it away; it has no newline."""
        try:
            entry = Entry.model_validate_json(last)
        except ValidationError:
            os.truncate(file, start)
            self.num_bytes_cut = len(last)
        else:
            _append_line(file, b"\n")
            self._hold(entry)


def _append_line(file: Path, line: bytes) -> None:
    """Write all of the line at the end of the file, or leave the file as it was."""
    opened = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(opened).st_size
        try:
            written = 0
            while written < len(line):  # one call, but for a disk that is nearly full
                written += os.write(opened, line[written:])
        except OSError:
            os.ftruncate(opened, size)
            raise
    finally:
        os.close(opened)


def _check_count(kind: Kind, key: str, value: object) -> int:
    if type(value) is not int:
        raise FederationError(
            f"{kind}: expected a plain int for {key}, found {_type(value)}; nothing left the client"
        )
    if not 0 <= value <= MAX_COUNT:
        raise FederationError(
            f"{kind}: expected {key} from 0 to {MAX_COUNT}, found another int; nothing left the "
            "client. Count again"
        )
    return value


def _check_figure(kind: Kind, key: str, value: object) -> None:
    if type(value) is not float:
        raise FederationError(
            f"{kind}: expected a plain float for {key}, found {_type(value)}; nothing left the "
            "client"
        )
    if not abs(value) <= LARGEST:
        raise FederationError(
            f"{kind}: expected {key} to be finite and at most {LARGEST:g} in magnitude, found "
            "another float; nothing left the client"
        )


def _checked_array(kind: Kind, key: str, value: object, dtypes: tuple[DType, ...]) -> NDArray[Any]:
    """The array, if it is one and nothing more, of one of the dtypes in this machine's order."""
    if type(value) is not np.ndarray:
        raise FederationError(
            f"{kind}: expected a plain array of {' or '.join(dtypes)} for {_shown(key)}, found "
            f"{_type(value)}; nothing left the client"
        )
    plain = any(value.dtype == np.dtype(dtype) for dtype in dtypes)
    if not plain or value.dtype.metadata or value.dtype.fields:
        raise FederationError(
            f"{kind}: expected {' or '.join(dtypes)} for {_shown(key)}, found {_type(value)}"
            f"{' with metadata' if value.dtype.metadata else ''}; nothing left the client. "
            "Convert it"
        )
    return value


def _checked_counts(payload: dict[str, object]) -> NDArray[np.int64]:
    """How many examples each centroid stands for: not more than the client has, all together."""
    counts = _checked_array("centroids", "counts", payload["counts"], ("int64",))
    num_examples = _num_examples(payload)
    centroids = payload.get("centroids")
    rows = len(centroids) if isinstance(centroids, np.ndarray) and centroids.ndim == 2 else 0
    if counts.shape != (rows,) or rows > MAX_CENTROIDS:
        raise FederationError(
            f"centroids: expected one of counts for each of {rows} centroids, at most "
            f"{MAX_CENTROIDS}, found {_type(counts)}; nothing left the client"
        )
    if (counts < 0).any() or (counts > num_examples).any() or counts.sum() > num_examples:
        raise FederationError(
            "centroids: expected counts of at least 0 that add up to num_examples at most, found "
            "others; nothing left the client. Counts are all the integers that may leave"
        )
    return counts


def _checked_centroids(payload: dict[str, object]) -> NDArray[Any]:
    """At most one row an example; others say nothing: count and numbers are zero (`privacy`)."""
    num_examples = _num_examples(payload)
    centroids = _checked_floats("centroids", "centroids", payload["centroids"], None)
    rows = np.count_nonzero(centroids.any(axis=1)) if centroids.ndim == 2 else MAX_CENTROIDS + 1
    if rows > min(num_examples, MAX_CENTROIDS):
        raise FederationError(
            f"centroids: expected [k, d] with at most {min(num_examples, MAX_CENTROIDS)} rows (one "
            f"an example, {MAX_CENTROIDS} in all), found {_type(centroids)}; nothing left the "
            "client"
        )
    counts = payload.get("counts")
    matched = isinstance(counts, np.ndarray) and counts.shape == centroids.shape[:1]
    if matched and centroids[counts == 0].any():
        raise FederationError(
            "centroids: expected zeros in the rows whose count is 0, found others; nothing left "
            "the client. A cluster that is not told says nothing"
        )
    return centroids


def _num_examples(payload: dict[str, object]) -> int:
    if "num_examples" not in payload:
        raise FederationError(
            "centroids: expected num_examples beside them, found none; nothing left the client. "
            "Say how many examples they stand for"
        )
    return _check_count("centroids", "num_examples", payload["num_examples"])


def _checked_floats(
    kind: Kind, key: str, value: object, shape: tuple[int, ...] | None
) -> NDArray[Any]:
    """The array, if its numbers are floats that do not plainly stand for something else."""
    array = _checked_array(kind, key, value, ("float32", "float16"))
    if shape is not None and array.shape != tuple(shape):
        raise FederationError(
            f"{kind}: expected {_shown(key)} of shape {list(shape)}, found {_type(array)}; nothing "
            "left the client"
        )
    if array.size and not (float(array.max()) <= LARGEST and float(array.min()) >= -LARGEST):
        raise FederationError(
            f"{kind}: expected numbers in {_shown(key)} that are finite and at most {LARGEST:g} in "
            f"magnitude, found others in {_type(array)}; nothing left the client. Look at the "
            "training that made them"
        )
    whole = array[(array == np.rint(array)) & (array != 0)]
    if 2 * whole.size >= np.count_nonzero(array) and np.unique(whole).size > MAX_WHOLE:
        raise FederationError(
            f"{kind}: expected numbers in {_shown(key)} that are not whole, found more than "
            f"{MAX_WHOLE} different whole ones in {_type(array)}, as token ids are; nothing left "
            "the client. Send large float16 numbers as float32"
        )
    return array


def _item(name: str, array: NDArray[Any]) -> Item:
    return Item(name=name, dtype=cast("DType", array.dtype.name), shape=array.shape)


def _keys(kind: Kind, num_tensors: int) -> str:
    """What an answer may have, in words."""
    keys = sorted(COUNTS[kind])
    if kind == "centroids":
        keys = ["centroids", "counts", *keys]
    if kind == "adapter":
        keys = [f"the {num_tensors} tensors that were named", *keys]
    if kind == "scores":
        keys += [f"{'|'.join(MODELS)}/{'|'.join(SCORES)}"]
    else:
        keys += sorted(FIGURES[kind])
    return ", ".join(keys)


def _shown(key: object) -> str:
    """A key, cut short: it is text of somebody else."""
    text = repr(key) if type(key) is str else _type(key)
    return text if len(text) <= 80 else f"{text[:76]}...{text[-1]}"


def _type(value: object) -> str:
    """What kind of thing a value is; nothing of what it says."""
    if type(value) is np.ndarray and not value.dtype.fields:
        return (
            f"an array of {value.dtype.str[0].strip('=|<')}{value.dtype.name} {list(value.shape)}"
        )
    return f"a {type(value).__name__[:40]}"
