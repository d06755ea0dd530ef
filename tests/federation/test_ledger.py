"""Only what is known by name and plainly a number leaves a client, and all that left is written."""

import errno
import json
import os
import resource
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from pydantic import ValidationError

from fedgraft.errors import ArtefactError, FederationError
from fedgraft.federation.ledger import (
    COUNTS,
    FIGURES,
    LARGEST,
    MAX_CENTROIDS,
    MAX_COUNT,
    MAX_WHOLE,
    Entry,
    Item,
    Kind,
    Ledger,
    Total,
    allow,
)

A, B = "model.layers.0.q_proj.lora_A.weight", "model.layers.0.q_proj.lora_B.weight"
TENSORS = {A: (2, 24), B: (16, 2)}
KINDS: tuple[Kind, ...] = ("sizes", "centroids", "adapter", "scores")
PROSE = (
    "Every morning the baker opens the door, sweeps the step and puts out the first bread. In 2026 "
    "the heron still stands in the river; it runs past the mill, where Nobody is awake before six. "
    "A ticket is closed when the person who opened it says so, and not before: ask Ms. Ozolins "
    "(HR) for the key to room 4.12, sign the list, and bring both back on the same day, please."
)


def random(*shape: int, dtype: str = "float32", scale: float = 1.0) -> NDArray[Any]:
    return (np.random.default_rng(0).standard_normal(shape) * scale).astype(dtype)


def answers() -> dict[Kind, dict[str, object]]:
    """An answer of each kind that may leave."""
    return {
        "sizes": {"num_examples": 200, "num_documents": 40},
        "centroids": {
            "num_examples": 200,
            "centroids": random(3, 8),
            "counts": np.array([20, 150, 5]),
        },
        "adapter": {
            A: random(2, 24),
            B: np.zeros((16, 2), np.float32),
            "num_examples": 12,
            "loss": 2.25,
        },
        "scores": {"global/right": 0.5, "graft/nats_per_token": 3.0, "num_tokens": 900},
    }


def test_an_answer_of_each_kind_passes_and_is_described() -> None:
    named = {kind: allow(kind, payload, tensors=TENSORS) for kind, payload in answers().items()}
    assert named["centroids"] == (
        Item(name="centroids", dtype="float32", shape=(3, 8)),
        Item(name="counts", dtype="int64", shape=(3,)),
        Item(name="num_examples", dtype="int"),
    )
    assert {item.name for item in named["adapter"]} == {A, B, "num_examples", "loss"}
    assert sum(item.num_bytes for item in named["centroids"]) == 4 * 24 + 8 * 3 + 8


def test_what_may_leave_is_this_and_a_change_of_it_is_a_decision() -> None:
    """A ratchet: whoever adds a key here says that it may leave every department."""
    assert {kind: sorted(keys) for kind, keys in COUNTS.items()} == {
        "sizes": ["num_dialogues", "num_documents", "num_examples", "num_left_out"],
        "centroids": ["num_examples"],
        "adapter": ["num_examples", "num_scored", "num_steps", "num_tokens"],
        "scores": ["num_documents", "num_examples", "num_prompts", "num_tokens"],
    }
    assert {kind: len(keys) for kind, keys in FIGURES.items()} == {
        "sizes": 0,
        "centroids": 0,
        "adapter": 7,
        "scores": 40,
    }
    assert sorted(FIGURES["adapter"]) == [
        "client/nats_per_token",
        "department/nats_per_token",
        "global/nats_per_token",
        "graft/nats_per_token",
        "loss",
        "seconds",
        "seconds_scoring",
    ]
    assert {key.split("/")[0] for key in FIGURES["scores"]} == {
        "graft",
        "global",
        "department",
        "client",
    }


SHAPES = st.sampled_from([(), (3,), (3, 8), (2, 24)])
ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.text()
    | st.binary()
    | st.complex_numbers()
    | arrays.arrays(
        st.sampled_from(["uint8", "int8", "int32", "uint64", "bool", "complex64", "U3", "S3"]),
        SHAPES,
    )
    | arrays.arrays(st.sampled_from(["float64", "M8[s]", ">f4", ">i8"]), SHAPES)
    | st.builds(lambda text: np.array([text, None], object), st.text()),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        | st.tuples(inner)
        | st.sets(st.text(max_size=3), max_size=3)
    ),
    max_leaves=6,
)


@given(kind=st.sampled_from(KINDS), value=ODD, data=st.data())
def test_anything_else_is_refused_by_key_and_type_nested_or_not(
    kind: Kind, value: object, data: st.DataObject
) -> None:
    key = data.draw(st.sampled_from(sorted(answers()[kind])) | st.text(max_size=8))
    payload = answers()[kind] | {key: value}
    with pytest.raises(FederationError, match="nothing left the client"):
        allow(kind, payload, tensors=TENSORS)


DTYPES = "uint8 int8 int16 int32 uint64 bool float64 complex64 longdouble >f4 >f2 U4 S4 O M8[s]"


@pytest.mark.parametrize("dtype", DTYPES.split())
def test_an_array_of_another_dtype_is_refused_whatever_its_key(dtype: str) -> None:
    for kind, payload in answers().items():
        for key, value in payload.items():
            if isinstance(value, np.ndarray):
                with pytest.raises(FederationError, match=rf"{kind}: expected .* for '{key}'"):
                    allow(kind, payload | {key: value.astype(dtype)}, tensors=TENSORS)


@given(
    kind=st.sampled_from(KINDS),
    key=st.text(),
    value=st.integers(0, 9) | st.floats(-1, 1) | st.builds(random, st.just(2), st.just(3)),
)
def test_a_number_under_an_unknown_key_is_refused(kind: Kind, key: str, value: object) -> None:
    if key in COUNTS[kind] | FIGURES[kind] | {"centroids", "counts"}:
        return
    with pytest.raises(FederationError, match=r"expected only .* found"):
        allow(kind, {key: value}, tensors=TENSORS)


@given(secret=st.text(min_size=12, max_size=40).map("§".__add__))
def test_a_refusal_does_not_say_what_the_value_was(secret: str) -> None:
    for value in (secret, secret.encode(), np.array([secret]), [secret], {secret: secret}):
        with pytest.raises(FederationError) as refused:
            allow("sizes", {"num_examples": value})
        assert secret not in str(refused.value)
    with pytest.raises(FederationError) as refused:
        allow("sizes", {"x" + PROSE: 1})
    assert PROSE[:60] in str(refused.value)
    assert PROSE[80:] not in str(refused.value)


class Carrier(np.ndarray[Any, Any]):
    """An array that could carry an attribute."""


class Chatty(dict[str, object]):
    """A dict that could."""


class Name(str):
    """A key that could."""


class Number(int):
    """A count that could."""


def test_what_carries_more_than_its_numbers_is_refused() -> None:
    with pytest.raises(FederationError, match=r"plain array of float32 or float16 .* a Carrier"):
        allow("adapter", {A: random(2, 24).view(Carrier)}, tensors=TENSORS)
    with pytest.raises(FederationError, match=r"a plain array .* found a MaskedArray"):
        allow("adapter", {A: np.ma.masked_array(random(2, 24))}, tensors=TENSORS)
    with pytest.raises(FederationError, match="sizes as a plain dict, found a Chatty"):
        allow("sizes", Chatty(num_examples=1))
    with pytest.raises(FederationError, match="keys that are plain strings, found a Name"):
        allow("sizes", {Name("num_examples"): 1})
    with pytest.raises(FederationError, match="keys that are plain strings, found a int"):
        allow("sizes", {1: 1})  # type: ignore[dict-item]
    with pytest.raises(FederationError, match="plain int for num_examples, found a Number"):
        allow("sizes", {"num_examples": Number(1)})
    told = np.dtype("float32", metadata={"said": PROSE})
    with pytest.raises(FederationError, match="float32 \\[2, 24\\] with metadata; nothing left"):
        allow("adapter", {A: random(2, 24).astype(told)}, tensors=TENSORS)
    fields = np.zeros((2, 24), [(PROSE, "f4")])
    with pytest.raises(FederationError, match="found a ndarray; nothing left") as refused:
        allow("adapter", {A: fields}, tensors=TENSORS)
    assert PROSE not in str(refused.value)


REFUSED: list[tuple[Kind, dict[str, object], str]] = [
    ("sizes", {"num_examples": -1}, "num_examples from 0 to 2147483647, found another int"),
    ("sizes", {"num_examples": MAX_COUNT + 1}, "Count again"),
    ("sizes", {"num_examples": int.from_bytes(b"salary")}, "found another int"),
    ("sizes", {"num_examples": True}, "plain int for num_examples, found a bool"),
    ("sizes", {"num_examples": np.int64(3)}, "plain int for num_examples, found a int64"),
    ("sizes", {"name": "hr"}, "only num_dialogues, .* found 'name' \\(a str\\); .* Take it out"),
    ("adapter", {"loss": 2}, "plain float for loss, found a int"),
    ("adapter", {"loss": np.float64(2)}, "plain float .* found a float64"),
    ("adapter", {"loss": float("nan")}, "to be finite and at most 1e\\+06"),
    ("adapter", {"loss": -2 * LARGEST}, "at most 1e\\+06 in magnitude"),
    (
        "adapter",
        {"secret.lora_A.weight": random(2, 24)},
        "only the 2 tensors that were named, .* found 'secret.lora_A.weight' \\(an array",
    ),
    ("adapter", {A: random(24, 2)}, "lora_A.weight' of shape \\[2, 24\\], found .* \\[24, 2\\]"),
    ("adapter", {A: random(2, 24, dtype="float64")}, "float32 or float16 .* float64 .* Convert it"),
    ("adapter", {A: random(2, 24).astype(">f4")}, "found an array of >float32 \\[2, 24\\]"),
    ("adapter", {A: random(2, 24).tolist()}, "a plain array .* found a list; nothing left"),
    ("adapter", {A: random(2, 24) * np.inf}, "finite .* Look at the training that made them"),
    ("adapter", {A: np.full((2, 24), np.nan, "f4")}, "that are finite and at most 1e\\+06"),
    ("adapter", {A: np.full((2, 24), 2 * LARGEST, "f4")}, "at most 1e\\+06 in magnitude"),
    ("adapter", {A: np.full((2, 24), -2 * LARGEST, "f4")}, "at most 1e\\+06 in magnitude"),
    (
        "scores",
        {"right": 0.5},
        "graft\\|global\\|department\\|client/nats.* found 'right' \\(a float",
    ),
    ("centroids", {"centroids": random(3, 8)}, "num_examples beside them, found none"),
    ("centroids", {"centroids": random(3, 8), "num_examples": 2.0}, "plain int for num_examples"),
    (
        "centroids",
        {"centroids": random(3, 8), "num_examples": 2},
        "at most 2 rows \\(one an example, 4096 in all\\), found an array of float32 \\[3, 8\\]",
    ),
    ("centroids", {"centroids": random(8), "num_examples": 9}, "expected \\[k, d\\]"),
    (
        "centroids",
        {"centroids": random(MAX_CENTROIDS + 1, 1), "num_examples": 9999},
        "at most 4096 rows",
    ),
    (
        "centroids",
        {"counts": np.array([1]), "num_examples": 9},
        "one of counts for each of 0 centroids, at most 4096, found an array of int64 \\[1\\]",
    ),
    (
        "centroids",
        {"centroids": random(3, 8), "counts": np.array([1, 2]), "num_examples": 9},
        "each of 3 centroids",
    ),
    (
        "centroids",
        {"centroids": random(2, 8), "counts": np.array([-1, 2]), "num_examples": 9},
        "counts of at least 0 that add up to num_examples at most",
    ),
    (
        "centroids",
        {"centroids": random(2, 8), "counts": np.array([0, 2]), "num_examples": 9},
        "zeros in the rows whose count is 0",
    ),
    (
        "centroids",
        {"centroids": random(2, 8), "counts": np.array([5, 5]), "num_examples": 9},
        "all the integers that may leave",
    ),
    (
        "centroids",
        {"centroids": random(2, 8), "counts": np.array([2**62, 2**62]), "num_examples": 9},
        "add up to num_examples",
    ),
    (
        "centroids",
        {"centroids": random(2, 8), "counts": np.array([5, 4], "i4"), "num_examples": 9},
        "expected int64 for 'counts', found an array of int32",
    ),
]


@pytest.mark.parametrize(("kind", "payload", "message"), REFUSED)
def test_a_known_key_with_another_value_is_refused(
    kind: Kind, payload: dict[str, object], message: str
) -> None:
    with pytest.raises(FederationError, match=message):
        allow(kind, payload, tensors=TENSORS)


def test_an_unknown_kind_and_an_unnamed_tensor_are_refused() -> None:
    with pytest.raises(FederationError, match="sizes, centroids, adapter, scores, found 'text'"):
        allow("text", {})  # type: ignore[arg-type]
    with pytest.raises(FederationError, match="only the 0 tensors that were named"):
        allow("adapter", {A: random(2, 24)})


PLACES = st.integers(0, len(PROSE) - 128)


def leaves_as_adapter(array: NDArray[Any]) -> bool:
    try:
        allow("adapter", {A: array}, tensors={A: array.shape})
    except FederationError:
        return False
    return True


@given(start=PLACES, dtype=st.sampled_from(["uint8", "float16", "float32", "float64", "int64"]))
def test_the_bytes_of_prose_do_not_leave_as_numbers(start: int, dtype: str) -> None:
    text = np.frombuffer(PROSE[start : start + 128].encode(), dtype)
    assert not leaves_as_adapter(text)
    with pytest.raises(FederationError):
        allow("centroids", {"centroids": text.reshape(1, -1), "num_examples": 9999})


@given(start=PLACES, dtype=st.sampled_from(["float16", "float32"]), padding=st.integers(0, 500))
def test_code_points_do_not_leave_as_floats(start: int, dtype: str, padding: int) -> None:
    numbers = [ord(letter) for letter in PROSE[start : start + 128]]
    assert not leaves_as_adapter(np.array(numbers + [0] * padding, dtype))


@given(
    ids=st.lists(st.integers(1, 2047), min_size=MAX_WHOLE + 1, unique=True), mirrored=st.booleans()
)
def test_token_ids_do_not_leave_as_floats(ids: list[int], *, mirrored: bool) -> None:
    for dtype in ("float16", "float32"):
        assert not leaves_as_adapter(np.array(ids, dtype) * (-1 if mirrored else 1))


@given(ids=st.lists(st.integers(256, 151_935), min_size=1, max_size=99), data=st.data())
def test_token_ids_do_not_leave_as_counts_of_as_many_examples(
    ids: list[int], data: st.DataObject
) -> None:
    num_examples = data.draw(st.integers(0, sum(ids) - 1))
    payload: dict[str, object] = {
        "centroids": random(len(ids), 2),
        "counts": np.array(ids),
        "num_examples": num_examples,
    }
    with pytest.raises(FederationError):
        allow("centroids", payload)


@given(
    dtype=st.sampled_from(["float16", "float32"]),
    scale=st.sampled_from([0.0, 1e-6, 1e-3, 1.0, 30.0]),
    rows=st.integers(1, 300),
)
def test_what_training_makes_does_leave(dtype: str, scale: float, rows: int) -> None:
    assert leaves_as_adapter(random(rows, 16, dtype=dtype, scale=scale))


def test_ones_and_zeros_leave() -> None:
    assert leaves_as_adapter(np.ones((4, 64), np.float32))
    assert leaves_as_adapter(np.zeros((0, 8), np.float32))


def test_large_half_numbers_are_told_to_be_sent_as_single_ones() -> None:
    """Above 1024 float16 knows whole numbers alone."""
    large = random(64, 4, scale=5000)
    with pytest.raises(
        FederationError, match=r"as token ids are; .* Send large float16 numbers as"
    ):
        allow("adapter", {A: large.astype(np.float16)}, tensors={A: (64, 4)})
    assert leaves_as_adapter(large)


def test_the_gate_changes_nothing() -> None:
    for kind, payload in answers().items():
        before = {key: np.array(value) for key, value in payload.items()}
        allow(kind, payload, tensors=TENSORS)
        assert payload.keys() == before.keys()
        assert all(np.array_equal(np.asarray(payload[key]), before[key]) for key in before)


ITEMS = (Item(name="num_examples", dtype="int"),)
ENTRIES = st.builds(
    Entry,
    round=st.integers(0, 12),
    phase=st.sampled_from(["select", "train", "aggregate", "evaluate"]),
    client=st.sampled_from(["hr-1", "hr-2", "Büro-10"]),
    kind=st.sampled_from(KINDS),
    items=st.just(ITEMS) | st.just(allow("centroids", answers()["centroids"])),
    bytes_up=st.integers(0, 10**12),
    bytes_down=st.integers(0, 10**12),
    seconds=st.integers(0, 4000).map(lambda quarters: quarters / 4),
)


def entry(client: str = "hr-1", number: int = 0) -> Entry:
    return Entry(
        round=number,
        phase="train",
        client=client,
        kind="sizes",
        items=ITEMS,
        bytes_up=8,
        bytes_down=0,
        seconds=0.5,
    )


def filled(file: Path | None, num: int = 3) -> Ledger:
    made = Ledger(file)
    for number in range(num):
        made.append(entry(number=number))
    return made


@given(entries=st.lists(ENTRIES, max_size=8))
def test_on_disk_and_in_memory_are_the_same(
    entries: list[Entry], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("run") / "below" / "ledger.jsonl"
    held, written = Ledger(), Ledger(file)
    for one in entries:
        held.append(one)
        written.append(one)
    read = Ledger(file)
    assert held.entries == written.entries == read.entries == tuple(entries)
    assert read.totals("client") == held.totals("client")
    if entries:
        lines = file.read_text(encoding="utf-8").splitlines()
        assert [Entry.model_validate(json.loads(line)) for line in lines] == entries


@given(entries=st.lists(ENTRIES, max_size=12))
def test_totals_add_up_to_the_same_whatever_they_are_added_up_by(entries: list[Entry]) -> None:
    held = Ledger()
    for one in entries:
        held.append(one)
    for by in ("client", "round", "kind", "phase"):
        totals = held.totals(by)
        assert list(totals) == sorted(totals)
        assert {key: total.num_messages for key, total in totals.items()} == Counter(
            getattr(one, by) for one in entries
        )
        assert sum(total.bytes_up for total in totals.values()) == sum(e.bytes_up for e in entries)
        assert sum(t.bytes_down for t in totals.values()) == sum(e.bytes_down for e in entries)
        assert sum(total.seconds for total in totals.values()) == sum(e.seconds for e in entries)


def test_totals_of_a_client_are_its_own() -> None:
    held = Ledger()
    for client in ("hr-2", "hr-1", "hr-2"):
        held.append(entry(client))
    assert held.totals("client") == {
        "hr-1": Total(num_messages=1, bytes_up=8, seconds=0.5),
        "hr-2": Total(num_messages=2, bytes_up=16, seconds=1.0),
    }


def test_a_ledger_goes_on_where_it_stopped(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    filled(file, 2)
    before = file.read_bytes()
    second = Ledger(file)
    second.append(entry("hr-2"))
    assert file.read_bytes().startswith(before)
    assert Ledger(file).entries == second.entries
    assert len(second.entries) == 3


def test_what_is_alike_in_many_messages_is_held_once(tmp_path: Path) -> None:
    """An adapter has hundreds of tensors, and leaves each client in each round."""
    file = tmp_path / "ledger.jsonl"
    held = Ledger(file)
    for number in range(5):
        items = allow("adapter", answers()["adapter"], tensors=TENSORS)
        held.append(entry(number=number).model_copy(update={"kind": "adapter", "items": items}))
    assert len({id(one.items) for one in held.entries}) == 1
    assert len({id(one.items) for one in Ledger(file).entries}) == 1


def test_a_last_line_cut_anywhere_is_repaired(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    entries = filled(file).entries
    whole = file.read_bytes()
    two = len(b"".join(whole.splitlines(keepends=True)[:2]))
    for length in range(two, len(whole)):
        file.write_bytes(whole[:length])
        read = Ledger(file)
        complete = length == len(whole) - 1
        assert read.entries == (entries if complete else entries[:2])
        assert read.num_bytes_cut == (0 if complete else length - two)
        assert file.read_bytes() == (whole if complete else whole[:two])
        read.append(entry("hr-9"))
        assert Ledger(file).entries == read.entries


def test_a_full_disk_leaves_whole_lines_and_the_entry_out(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    held = filled(file)
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        with pytest.raises(
            ArtefactError, match=r"could not write .*; the entries before are whole"
        ):
            held.append(entry("hr-2"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before
    assert len(held.entries) == 3
    held.append(entry("hr-2"))
    assert Ledger(file).entries == held.entries


def test_a_line_is_one_call_to_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[bytes] = []
    write = os.write

    def watched(opened: int, data: bytes) -> int:
        lines.append(bytes(data))
        return write(opened, data)

    monkeypatch.setattr(os, "write", watched)
    filled(tmp_path / "ledger.jsonl")
    assert len(lines) == 3
    assert all(line.endswith(b"}\n") and line.count(b"\n") == 1 for line in lines)


def test_a_cut_line_that_cannot_be_mended_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ledger.jsonl"
    filled(file)
    file.write_bytes(file.read_bytes()[:-5])

    def refused(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "truncate", refused)
    with pytest.raises(ArtefactError, match="Read-only file system; its last line is cut short"):
        Ledger(file)


def test_a_broken_line_that_is_not_the_last_is_refused_by_number(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    filled(file)
    whole = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(whole[0] + whole[1][:20] + b"\n" + whole[2])
    with pytest.raises(FederationError, match="jsonl, line 2: expected what left a client, found"):
        Ledger(file)
    file.write_bytes(whole[0].replace(b'"sizes"', b'"text"') + whole[1])
    with pytest.raises(FederationError, match=r"line 1: .* found kind: .*restore the file or name"):
        Ledger(file)


def test_a_folder_is_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="expected the ledger of a run, found Is a directory"):
        Ledger(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("round", -1),
        ("phase", "gossip"),
        ("client", "../hr"),
        ("client", "a name with spaces"),
        ("kind", "text"),
        ("bytes_up", -1),
        ("seconds", float("nan")),
        ("note", "hello"),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        Entry.model_validate(entry().model_dump() | {field: value})


def test_entries_cannot_be_changed() -> None:
    held = filled(None)
    with pytest.raises(ValidationError, match="frozen"):
        held.entries[0].bytes_up = 0
    assert isinstance(held.entries, tuple)
