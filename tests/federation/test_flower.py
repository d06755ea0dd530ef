"""Over Flower comes back what the clients gave, and whatever else comes back does no harm."""

import io
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import (
    Array,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.common.constant import ErrorCode
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tests.federation.grids import LocalGrid, Node, contents_of, inflated, node_of

from fedgraft.errors import FederationError
from fedgraft.federation import flower
from fedgraft.federation.flower import (
    APP,
    FlowerExchange,
    answer_of,
    answer_records,
    question_of,
    question_records,
    read_plan,
    server_app,
    submit,
)
from fedgraft.federation.message import FAULTS, Answer, Question

NAMES = ("finance-1", "hr-1", "it-1")
A, B = "q.lora_A.weight", "q.lora_B.weight"


def tensors(seed: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    return {
        A: generator.normal(size=(2, 5)).astype(np.float32),
        B: generator.normal(size=(7, 2)).astype(np.float16),
    }


def question(number: int = 3, **settings: Any) -> Question:
    return Question(
        kind="adapter", round=number, phase="train", settings=settings, tensors=tensors()
    )


def honest(message: Message) -> list[Message]:
    """A node whose client doubles every tensor."""
    doubled = {name: 2 * tensor for name, tensor in question_of(message.content).tensors.items()}
    return list(answering({**doubled, "num_examples": 4, "loss": 0.5})(message))


def answering(payload: dict[str, Any]) -> Node:
    def replies(message: Message) -> list[Message]:
        client, nonce = (str(message.content["about"][key]) for key in ("client", "nonce"))
        number = question_of(message.content).round
        answer = Answer(client=client, kind="adapter", round=number, payload=payload)
        return [Message(answer_records(answer, nonce=nonce), reply_to=message)]

    return replies


def grid_of(**others: Node) -> LocalGrid:
    return LocalGrid({name: others.get(name.replace("-", "_"), honest) for name in NAMES})


def asked(
    grid: LocalGrid, *, names: tuple[str, ...] = NAMES, timeout: float = 0.2, number: int = 3
) -> tuple[dict[str, Answer], FlowerExchange]:
    """The answers by client, each of which there is one."""
    exchange = FlowerExchange(grid, NAMES, poll=0.01)
    found = list(exchange.ask({name: question(number) for name in names}, timeout))
    assert len(found) == len({answer.client for answer in found}) == len(names)
    return {answer.client: answer for answer in found}, exchange


def faults(answers: dict[str, Answer]) -> dict[str, str]:
    return {name: answer.fault for name, answer in answers.items() if answer.fault}


# ─── As records and back ──────────────────────────────────────────────────────────────────────────

DTYPES: Any = st.sampled_from([np.dtype(name) for name in flower.DTYPES])
NUMBERS: Any = arrays.arrays(
    dtype=DTYPES,
    shape=arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
WORDS = st.text(min_size=1, max_size=12)
SCALARS = st.one_of(
    st.integers(-(2**62), 2**62), st.floats(allow_nan=False), st.booleans(), st.text(max_size=9)
)


def travels(records: RecordDict) -> RecordDict:
    """Through Flower's bytes."""
    LocalGrid({})
    contents, number = contents_of(Message(records, 7, "query.question"))
    return inflated(contents, number).content


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert type(one[name]) is type(other[name])
        np.testing.assert_array_equal(one[name], other[name])
        assert getattr(one[name], "dtype", None) == getattr(other[name], "dtype", None)


@given(
    settings=st.dictionaries(WORDS, SCALARS, max_size=4),
    named=st.dictionaries(WORDS, NUMBERS, max_size=4),
)
def test_a_question_arrives_as_it_was_asked(
    settings: dict[str, Any], named: dict[str, Any]
) -> None:
    sent = Question(kind="scores", round=9, phase="evaluate", settings=settings, tensors=named)
    came = question_of(travels(question_records(sent, client="hr-1", nonce="n")))
    assert (came.kind, came.round, came.phase) == ("scores", 9, "evaluate")
    same(dict(came.settings), settings)
    same(dict(came.tensors), named)


@given(
    scalars=st.dictionaries(
        WORDS, st.one_of(st.integers(0, 2**40), st.floats(allow_nan=False)), max_size=4
    ),
    named=st.dictionaries(WORDS, NUMBERS, max_size=4),
    fault=st.sampled_from([None, *FAULTS]),
)
def test_an_answer_arrives_as_it_was_given(
    scalars: dict[str, Any], named: dict[str, Any], fault: Any
) -> None:
    payload = {**scalars, **named}
    given_ = Answer(client="hr-1", kind="adapter", round=3, payload=payload, fault=fault)
    records = travels(answer_records(given_, nonce="n"))
    came = answer_of(records, question(), client="hr-1", nonce="n")
    assert came.fault == fault
    same(dict(came.payload), payload)


def test_bfloat16_does_not_travel() -> None:
    import ml_dtypes

    wide = Question(
        kind="adapter",
        round=0,
        phase="train",
        tensors={A: np.ones((2, 2), ml_dtypes.bfloat16)},
    )
    with pytest.raises(FederationError, match=r"expected float32 or float16 or int64 in a message"):
        question_records(wide, client="hr-1", nonce="n")


def test_numbers_of_all_tensors_are_one_array_a_type() -> None:
    many = {f"layer.{i}": np.full((3, 2), i, np.float32) for i in range(100)}
    records = question_records(
        Question(kind="adapter", round=0, phase="train", tensors=many), client="hr-1", nonce="n"
    )
    contents, _ = contents_of(Message(travels(records), 7, "query.question"))
    assert len(contents) == 8  # message, dict, four records, an array and its bytes


def test_equal_tensors_of_many_questions_are_held_once() -> None:
    held: dict[bytes, Array] = {}
    for name in NAMES:
        question_records(question(), client=name, nonce="n", held=held)
    assert len(held) == 2  # float32 and float16


@pytest.mark.parametrize("size", [9, 11])
def test_numbers_and_their_table_agree_to_the_last(size: int) -> None:
    answer = Answer(client="hr-1", kind="adapter", round=3, payload=tensors())
    records = answer_records(answer, nonce="n")
    records.array_records["arrays"]["float32"] = Array(np.ones(size, np.float32))
    with pytest.raises(FederationError, match=rf"10 numbers of float32 in a message, found {size}"):
        answer_of(records, question(), client="hr-1", nonce="n")


# ─── Asking ───────────────────────────────────────────────────────────────────────────────────────


def test_every_client_gets_its_question_and_its_answer_comes_back() -> None:
    answers, exchange = asked(grid_of())
    assert faults(answers) == {}
    for answer in answers.values():
        assert (answer.kind, answer.round) == ("adapter", 3)
        same(
            dict(answer.payload),
            {n: 2 * t for n, t in tensors().items()} | {"num_examples": 4, "loss": 0.5},
        )
    assert exchange.num_dropped == 0


def test_bytes_are_those_that_travelled() -> None:
    grid = grid_of()
    answers, _ = asked(grid)
    down = {number for number in grid.num_bytes if not number.endswith(" reply")}
    assert {a.bytes_down for a in answers.values()} == {grid.num_bytes[n] for n in down}
    assert {a.bytes_up for a in answers.values()} == {grid.num_bytes[f"{n} reply"] for n in down}
    numbers = sum(tensor.nbytes for tensor in tensors().values())
    assert all(numbers < a.bytes_up < numbers + 2500 for a in answers.values())


@pytest.mark.parametrize("seed", range(3))
def test_in_whatever_order_replies_come_each_is_its_own_clients(seed: int) -> None:
    nodes = {name: answering({A: np.full((1, 1), i, np.float32)}) for i, name in enumerate(NAMES)}
    grid, generator = LocalGrid(nodes), np.random.default_rng(seed)
    grid.order = lambda waiting: list(generator.permutation(waiting)[:1])
    answers, exchange = asked(grid, timeout=20)
    assert [int(np.asarray(answers[n].payload[A])[0, 0]) for n in NAMES] == [0, 1, 2]
    assert exchange.num_dropped == 0


def test_tensors_that_are_read_when_asked_for_are_not_mixed_up() -> None:
    class Lazy(dict[str, Any]):
        def items(self) -> Any:  # a new array each time, at the place of the one before
            return ((name, np.full((300, 300), i, np.float32)) for i, name in enumerate(self))

    lazy = Lazy({f"t{i}": None for i in range(6)})
    exchange, seen = FlowerExchange(grid_of(), NAMES, poll=0.01), []
    questions = {
        name: Question(kind="adapter", round=3, phase="train", tensors=lazy) for name in NAMES
    }
    for answer in exchange.ask(questions, 20):
        seen += [float(np.asarray(answer.payload[f"t{i}"]).mean()) for i in range(6)]
    assert seen == [0, 2, 4, 6, 8, 10] * 3


# ─── What may come back instead ───────────────────────────────────────────────────────────────────


def silent(_: Message) -> list[Message]:
    return []


def crashed(code: int) -> Node:
    return lambda message: [Message(Error(code, "row 7: Mara"), reply_to=message)]


def from_superlink(message: Message) -> list[Message]:
    """As a SuperLink says that a node is dead: the sender is the SuperLink."""
    reply = Message(Error(ErrorCode.NODE_UNAVAILABLE), reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = 1
    return [reply]


def other_sender(message: Message) -> list[Message]:
    (reply,) = honest(message)
    reply.metadata.__dict__["_src_node_id"] = 100
    return [reply]


def other_id(message: Message) -> list[Message]:
    (reply,) = honest(message)
    reply.metadata.__dict__["_reply_to_message_id"] = "0" * 64
    return [reply]


def spoiled(change: Callable[[RecordDict], object]) -> Node:
    def replies(message: Message) -> list[Message]:
        (reply,) = honest(message)
        change(reply.content)
        return [reply]

    return replies


def put(record: str, key: str, value: Any) -> Node:
    def change(content: RecordDict) -> None:
        content[record][key] = value

    return spoiled(change)


def pickled() -> Array:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return Array("object", (1,), "numpy.ndarray", buffer.getvalue())


def zipped() -> Array:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    return Array("float32", (3,), "numpy.ndarray", buffer.getvalue())


def huge() -> Array:
    """The head of an array of 2^60 numbers, and none of them."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": (2**60,)}
    )
    return Array("float32", (2**60,), "numpy.ndarray", buffer.getvalue())


def twice(message: Message) -> list[Message]:
    (first,), (second,) = honest(message), honest(message)
    second.content["scalars"] = MetricRecord({"loss": 99.0})
    return [first, second]


NOISE: dict[str, tuple[Node, str, int]] = {
    "silence": (silent, "late", 0),
    "a dead node, as the SuperLink says": (from_superlink, "lost", 0),
    "an app that crashed": (crashed(ErrorCode.CLIENT_APP_CRASHED), "failed", 0),
    "an app that raised": (crashed(ErrorCode.CLIENT_APP_RAISED_EXCEPTION), "failed", 0),
    "a message that ran out": (crashed(ErrorCode.MESSAGE_UNAVAILABLE), "late", 0),
    "a reply to another question": (other_id, "late", 1),
    "another node's reply": (other_sender, "late", 1),
    "no records": (spoiled(lambda content: content.__dict__["_data"].clear()), "unreadable", 0),
    "one record too many": (
        spoiled(lambda c: c.__setitem__("more", MetricRecord({"a": 1}))),
        "unreadable",
        0,
    ),
    "a record of another type": (
        spoiled(lambda c: c.__setitem__("arrays", ConfigRecord({"a": b"code"}))),
        "unreadable",
        0,
    ),
    "another field": (put("about", "path", "/etc"), "unreadable", 0),
    "another client": (put("about", "client", "finance-1"), "unreadable", 0),
    "another round": (put("about", "round", 2), "unreadable", 0),
    "a round that only looks equal": (put("about", "round", 3.0), "unreadable", 0),
    "another kind": (put("about", "kind", "scores"), "unreadable", 0),
    "another nonce": (put("about", "nonce", "0" * 32), "unreadable", 0),
    "a fault that is none": (put("about", "fault", "Mara lives in Lisbon"), "unreadable", 0),
    "a list of figures": (put("scalars", "loss", [1.0, 2.0]), "unreadable", 0),
    "a figure named as a tensor": (put("scalars", A, 1.0), "unreadable", 0),
    "a pickle": (put("arrays", "float32", pickled()), "unreadable", 0),
    "an archive": (put("arrays", "float32", zipped()), "unreadable", 0),
    "more numbers than memory": (put("arrays", "float32", huge()), "unreadable", 0),
    "noise as an array": (
        put("arrays", "float32", Array("float32", (1,), "numpy.ndarray", b"?")),
        "unreadable",
        0,
    ),
    "another format": (
        put("arrays", "float32", Array("float32", (1,), "torch", b"?")),
        "unreadable",
        0,
    ),
    "numbers of another type": (put("arrays", "float32", Array(np.ones(10))), "unreadable", 0),
    "a type that is none of ours": (put("arrays", "float64", Array(np.ones(3))), "unreadable", 0),
    "letters": (put("arrays", "<U4", Array(np.array(["Mara"]))), "unreadable", 0),
    "another byte order": (put("arrays", "float32", Array(np.ones(10, ">f4"))), "unreadable", 0),
    "numbers in rows": (
        put("arrays", "float32", Array(np.ones((2, 5), np.float32))),
        "unreadable",
        0,
    ),
    "a number too few": (put("arrays", "float32", Array(np.ones(9, np.float32))), "unreadable", 0),
    "a number too many": (
        put("arrays", "float32", Array(np.ones(11, np.float32))),
        "unreadable",
        0,
    ),
    "numbers of no tensor": (put("arrays", "int64", Array(np.ones(1, np.int64))), "unreadable", 0),
    "a tensor without numbers": (put("tensors", "more", "int64[2]"), "unreadable", 0),
    "a shape that is none": (put("tensors", A, "float32[-2,-5]"), "unreadable", 0),
    "a shape beyond all bounds": (
        put("tensors", A, f"float32[{'9' * 12},{'9' * 12}]"),
        "unreadable",
        0,
    ),
    "a shape as a number": (put("tensors", A, 10), "unreadable", 0),
}


@pytest.mark.parametrize(("node", "fault", "dropped"), NOISE.values(), ids=NOISE)
def test_noise_from_one_client_is_a_fault_of_its_own(node: Node, fault: str, dropped: int) -> None:
    answers, exchange = asked(grid_of(hr_1=node))
    assert faults(answers) == {"hr-1": fault}
    assert exchange.num_dropped == dropped
    assert not answers["hr-1"].payload


def test_a_message_that_flower_itself_cannot_read_is_a_fault_of_its_own() -> None:
    class Broken(LocalGrid):
        def pull_messages(self, message_ids: Any) -> Any:
            (number,) = message_ids  # each is fetched alone
            if self._asked[number] == "hr-1":
                raise ValueError("Mismatch in children object IDs")
            return super().pull_messages(message_ids)

    answers, _ = asked(Broken(dict.fromkeys(NAMES, honest)))
    assert faults(answers) == {"hr-1": "unreadable"}


def test_a_second_reply_is_dropped_and_the_first_one_counts() -> None:
    answers, exchange = asked(grid_of(hr_1=twice))
    assert faults(answers) == {}
    assert answers["hr-1"].payload["loss"] == 0.5
    assert exchange.num_dropped == 1


def test_an_old_answer_does_not_count_again() -> None:
    kept: list[RecordDict] = []

    def replaying(message: Message) -> list[Message]:
        kept.extend(reply.content for reply in honest(message))
        return [Message(kept[0], reply_to=message)]

    grid = grid_of(hr_1=replaying)
    assert faults(asked(grid)[0]) == {}
    assert faults(asked(grid)[0]) == {"hr-1": "unreadable"}


def test_a_late_reply_of_the_last_exchange_is_not_seen_in_the_next() -> None:
    grid = grid_of()
    grid.order = lambda waiting: [name for name in waiting if name != "hr-1"]
    exchange = FlowerExchange(grid, NAMES, poll=0.01)
    first = {a.client: a for a in exchange.ask(dict.fromkeys(NAMES, question(3)), 0.1)}
    assert faults(first) == {"hr-1": "late"}
    assert first["hr-1"].bytes_down > 0
    grid.order = list
    second = {a.client: a for a in exchange.ask(dict.fromkeys(NAMES, question(4)), 5)}
    assert faults(second) == {}
    assert {answer.round for answer in second.values()} == {4}


def test_nothing_that_a_client_wrote_is_in_the_servers_log_in_full(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked(grid_of(hr_1=put("about", "nonce", "\x1b[2J" + 5000 * "x" + "\nfinance-1: all is well")))
    assert "\x1b" not in caplog.text
    assert all(len(record.getMessage()) < 600 for record in caplog.records)
    assert "hr-1: expected an answer of this version of fedgraft" in caplog.text


# ─── Who is who ───────────────────────────────────────────────────────────────────────────────────


def test_only_nodes_that_the_plan_names_are_asked() -> None:
    def never(_: Message) -> list[Message]:
        raise AssertionError

    grid = LocalGrid({**dict.fromkeys(NAMES, honest), "stranger": never, "": never})
    assert FlowerExchange(grid, NAMES).clients == NAMES
    assert faults(asked(grid)[0]) == {}


def test_two_nodes_of_one_name_count_as_none(caplog: pytest.LogCaptureFixture) -> None:
    grid = grid_of()
    grid.names[777] = "hr-1"
    exchange = FlowerExchange(grid, NAMES, poll=0.01)
    assert exchange.clients == ("finance-1", "it-1")
    assert faults(asked(grid)[0]) == {"hr-1": "lost"}
    assert "hr-1: expected one node of that name, found 2" in caplog.text


def test_who_is_not_online_is_lost_at_once_and_cost_no_bytes() -> None:
    grid = grid_of()
    del grid.names[101]
    answers, _ = asked(grid, timeout=20)
    assert faults(answers) == {"hr-1": "lost"}
    assert answers["hr-1"].bytes_down == 0


def test_waiting_ends_when_all_are_online() -> None:
    grid = grid_of()
    exchange = FlowerExchange(grid, NAMES, poll=0.01)
    assert exchange.wait(20) == ()
    del grid.names[101]
    assert exchange.wait(0.05) == ("hr-1",)


# ─── The client's end ─────────────────────────────────────────────────────────────────────────────


def test_the_app_of_a_client_loads_no_torch() -> None:
    code = (
        "import sys; from fedgraft.federation.flower import client_app, server_app\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_a_resident_the_client_failed_and_no_reason_leaves_it(tmp_path: Path) -> None:
    grid = grid_of(hr_1=node_of(str(tmp_path / "nobody")))
    assert faults(asked(grid)[0]) == {"hr-1": "failed"}


def test_a_node_without_the_path_of_a_socket_says_so_in_its_own_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answers, _ = asked(grid_of(hr_1=node_of("")))
    assert faults(answers) == {"hr-1": "failed"}
    assert "expected the path of the resident's socket in the node's configuration" in caplog.text


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        flower,
        "ask",
        lambda _place, asked_, _left: Answer(
            client="it-1", kind=asked_.kind, round=asked_.round, payload=tensors()
        ),
    )


@pytest.mark.usefixtures("swapped")
def test_the_resident_of_another_client_behind_a_node_is_refused_before_anything_leaves(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answers, _ = asked(grid_of(hr_1=node_of("s")))
    assert faults(answers) == {"hr-1": "refused"}
    assert not answers["hr-1"].payload
    assert "expected the resident of hr-1 behind this SuperNode, found that of it-1" in caplog.text


@pytest.mark.parametrize("missing", ["about", "settings", "tensors", "arrays"])
def test_a_question_that_cannot_be_read_is_answered_by_an_error_without_words(missing: str) -> None:
    LocalGrid({})
    records = question_records(question(), client="hr-1", nonce="n")
    del records[missing]
    (reply,) = node_of("s")(Message(records, 7, "query.question"))
    assert reply.has_error()
    assert reply.error.reason == "unreadable"


# ─── The server's end ─────────────────────────────────────────────────────────────────────────────


def context(**run_config: Any) -> Context:
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=run_config)


@pytest.mark.parametrize("key", ["plan", "model", "out"])
@pytest.mark.parametrize("value", ["", "relative/x", 3, None])
def test_the_server_wants_absolute_paths(key: str, value: Any) -> None:
    paths = {"plan": "/p.json", "model": "/m", "out": "/o", key: value}
    with pytest.raises(FederationError, match=rf"expected an absolute path as {key} in the run's"):
        server_app(LocalGrid({}), context(**paths))


@pytest.mark.parametrize("wait", [True, "60", -1])
def test_the_server_wants_seconds_to_wait(wait: Any, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(PLAN))
    paths = {"plan": str(plan), "model": "/m", "out": "/o", "wait": wait}
    with pytest.raises(FederationError, match=r"expected seconds to wait in the run's configurati"):
        server_app(LocalGrid({}), context(**paths))


PLAN = {
    "name": "three",
    "departments": {"finance": ["finance-1"], "hr": ["hr-1"], "it": ["it-1"]},
    "num_rounds": 2,
    "training": {"num_tokens": 1000, "rank": 2, "learning_rate": 1e-3},
}


def test_a_plan_is_read_from_json(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(PLAN))
    assert read_plan(tmp_path / "p.json").clients == NAMES


def test_everything_that_is_wrong_in_a_plan_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps({**PLAN, "num_rounds": 0, "colour": "red"}))
    with pytest.raises(FederationError, match=r"(?s)p.json: expected a plan.*num_rounds.*colour"):
        read_plan(tmp_path / "p.json")
    with pytest.raises(FederationError, match=r"expected a plan as JSON, found No such file"):
        read_plan(tmp_path / "none.json")


# ─── What is submitted ────────────────────────────────────────────────────────────────────────────


def test_the_app_brings_no_code_and_asks_for_no_package() -> None:
    from flwr.cli.build import build_fab_from_disk

    archive = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(APP)))
    assert {name for name in archive.namelist() if not name.startswith(".info/")} == {
        "pyproject.toml"
    }
    found = tomllib.loads((APP / "pyproject.toml").read_text())
    assert found["project"]["dependencies"] == []
    for reference in found["tool"]["flwr"]["app"]["components"].values():
        module, name = reference.split(":")
        assert module == flower.__name__
        assert hasattr(flower, name)


@pytest.mark.parametrize(
    ("superlink", "found"), [("nowhere", "'nowhere' not found"), ("closed", "is unavailable")]
)
def test_a_superlink_that_is_not_there_is_said_with_the_remedy(
    superlink: str, found: str, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text(
        '[superlink]\ndefault = "closed"\n\n'
        '[superlink.closed]\naddress = "127.0.0.1:9"\ninsecure = true\n'
    )
    with pytest.raises(
        FederationError, match=rf"to do `flwr run`, found: .*{found}.* Look whether"
    ):
        submit(Path("/p"), Path("/m"), Path("/o"), superlink=superlink, home=tmp_path)


def test_without_flowers_command_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(FederationError, match=r"found none; pip install 'fedgraft\[flower\]'"):
        submit(Path("/p"), Path("/m"), Path("/o"), superlink="x")
