"""The federation over Flower: questions as Flower's messages, and the two ends of a deployment.

    server's machine                                  a department's machine
    ────────────────                                  ──────────────────────
    rounds.run_rounds                                 resident ── Client.answer
          │                                               │ socket
    FlowerExchange <── server_app                     client_app, new for every message
          │ Grid                                          │
    SuperLink <─── TLS, node keys, proxy for /v1/fleet/ ── SuperNode

A question is four records, and so is an answer; there are no bytes that somebody must unpickle:

    question   about     client, kind, round, phase, nonce             ConfigRecord
               settings  what the question says                        ConfigRecord
               tensors   name -> type and shape: `float32[8,64]`       ConfigRecord
               arrays    type -> the numbers of its tensors, in turn   ArrayRecord
    answer     about     client, kind, round, fault, nonce             ConfigRecord
               scalars   counts and figures                            MetricRecord
               tensors, arrays                                         what the gate let through

Numbers of all tensors stand in one array a type, because Flower makes every array two objects, and
every object a request of its own, on each of the four hops between a resident and the rounds.

Who is who. A client's name is the one under which the server's operator registered the public key
of its SuperNode (`flwr supernode register KEY --name hr-1`): the SuperLink proves the key at every
call and tells us the name, so that no node can say who it is. Two nodes of one name count as none.

What comes back is not trusted. Each message is asked for alone, so that one that cannot be read
costs its own client the round and nobody else; a reply that does not name the question it was
fetched for, or another node as its sender, is dropped and counted; a nonce in the question, which
the answer repeats, keeps old answers from counting again and message ids (hashes of messages in
Flower) from being guessed. What the numbers are is for `rounds` to check.

How this differs from Flower's strategies: those send a whole round through `send_and_receive`,
match replies by sender (an error of a dead node comes from the SuperLink, not from it), look every
three seconds, and end the run over one reply of another form.

flwr 1.41 is pinned: the transport changed between 1.28 and 1.41, and may again.
"""

import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray
from pydantic import ValidationError

from fedgraft.errors import FederationError
from fedgraft.federation.message import FAULTS, Answer, Fault, Question, Value
from fedgraft.federation.plan import Plan
from fedgraft.federation.resident import ask

if TYPE_CHECKING:
    from fedgraft.federation.asking import Event

ACTION = "question"
APP = Path(__file__).with_name("app")
"""The app that is submitted: a pyproject.toml and nothing else."""
QUIET: Mapping[str, str] = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""Environment in which Flower calls nobody."""
POLL = 0.5
"""Seconds between two looks for answers; Flower's own loop takes 3."""
DTYPES = ("float32", "float16", "int64")
SHAPED = re.compile(r"(float32|float16|int64)\[((?:\d{1,12}(?:,\d{1,12})*)?)\]")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """A question on its way."""

    client: str
    node: int
    question: Question
    nonce: str
    bytes_down: int


class FlowerExchange:
    """An Exchange over Flower: through a Grid to the SuperNodes that have the clients' names."""

    transport = "flower"

    def __init__(self, grid: Grid, names: Collection[str], *, poll: float = POLL) -> None:
        """`names` are those of `Plan.clients`; no other node is asked, or believed."""
        self._grid, self._names, self._poll = grid, frozenset(names), poll
        self._doubled: frozenset[str] = frozenset()
        self.num_dropped = 0
        """Replies that were to no question of ours, came twice, or from another node."""

    @property
    def clients(self) -> tuple[str, ...]:
        return tuple(sorted(self._nodes()))

    def wait(self, seconds: float) -> tuple[str, ...]:
        """Give all clients time to come online; return those that did not."""
        end = time.monotonic() + seconds
        while missing := tuple(sorted(self._names - self._nodes().keys())):
            if (left := end - time.monotonic()) <= 0:
                break
            time.sleep(min(self._poll, left))
        return missing

    def ask(self, questions: Mapping[str, Question], timeout: float) -> Iterator[Answer]:
        begin = time.monotonic()
        nodes = self._nodes()
        found = [(name, nodes[name]) for name in sorted(questions) if name in nodes]
        pending = self._pushed({name: (node, questions[name]) for name, node in found}, timeout)
        reached = {asked.client for asked in pending.values()}
        for name in sorted(questions.keys() - reached):
            yield _faulty(name, questions[name], "lost")
        while pending:
            for message_id, asked in list(pending.items()):
                if answer := self._look(message_id, asked):
                    del pending[message_id]
                    yield replace(answer, seconds=time.monotonic() - begin)
            left = begin + timeout - time.monotonic()
            if left <= 0:
                break
            if pending:
                time.sleep(min(self._poll, left))
        for asked in pending.values():
            late = _faulty(asked.client, asked.question, "late")
            seconds = time.monotonic() - begin
            yield replace(late, bytes_down=asked.bytes_down, seconds=seconds)

    def _nodes(self) -> dict[str, int]:
        """Client -> its SuperNode, of those that are online."""
        found: dict[str, list[int]] = {}
        for node in self._grid.get_nodes():
            if node.name in self._names:
                found.setdefault(node.name, []).append(node.node_id)
        doubled = frozenset(name for name, ids in found.items() if len(ids) > 1)
        for name in sorted(doubled - self._doubled):
            log.warning("%s: expected one node of that name, found %d", name, len(found[name]))
        self._doubled = doubled
        return {name: ids[0] for name, ids in found.items() if len(ids) == 1}

    def _pushed(
        self, questions: Mapping[str, tuple[int, Question]], timeout: float
    ) -> dict[str, _Asked]:
        """Message id -> what was asked, of all that went out."""
        messages, waiting = [], []
        held: dict[bytes, Array] = {}  # an adapter that goes to all is held once
        for client, (node, question) in questions.items():
            nonce = secrets.token_hex(16)
            content = question_records(question, client=client, nonce=nonce, held=held)
            messages.append(Message(content, node, f"query.{ACTION}", ttl=timeout))
            waiting.append(
                _Asked(
                    client=client,
                    node=node,
                    question=question,
                    nonce=nonce,
                    bytes_down=travelled(messages[-1]),
                )
            )
        ids = list(self._grid.push_messages(messages)) if messages else []
        return {i: asked for i, asked in zip(ids, waiting, strict=False) if i}

    def _look(self, message_id: str, asked: _Asked) -> Answer | None:
        """The answer to one message, if it is there."""
        answer = None
        try:
            for reply in self._grid.pull_messages([message_id]):
                own = reply.metadata.reply_to_message_id == message_id
                if reply.has_error():  # of the node, or of the SuperLink about it
                    own &= reply.metadata.src_node_id in (asked.node, SUPERLINK_NODE_ID)
                else:
                    own &= reply.metadata.src_node_id == asked.node
                if own and answer is None:
                    answer = _read(reply, asked)
                else:
                    self.num_dropped += 1
                    log.warning("%s: a reply to another question was dropped", asked.client)
        except Exception as error:  # noqa: BLE001 - a stranger made what is read here
            log.warning(
                "%s: expected an answer of this version of fedgraft, found one that cannot be "
                "read (%s)",
                asked.client,
                _short(error),
            )
            answer = answer or _faulty(asked.client, asked.question, "unreadable")
        return answer and replace(answer, bytes_down=asked.bytes_down)


def question_records(
    question: Question, *, client: str, nonce: str, held: dict[bytes, Array] | None = None
) -> RecordDict:
    """A question to `client` as Flower's records; see the head of this file.

    Args:
        held: Arrays of other questions by their digest: equal ones are one object.
    """
    about = ConfigRecord(
        {
            "client": client,
            "kind": question.kind,
            "round": question.round,
            "phase": question.phase,
            "nonce": nonce,
        }
    )
    settings = ConfigRecord(dict(question.settings))
    return RecordDict({"about": about, "settings": settings, **_packed(question.tensors, held)})


def question_of(records: RecordDict) -> Question:
    """The question that `question_records` made; the resident looks at its fields.

    Raises FederationError where these are other records.
    """
    about, settings = _first_two(records, "settings", ConfigRecord)
    _keys(about, {"client", "kind", "round", "phase", "nonce"})
    return Question(
        kind=cast("Any", about["kind"]),
        round=cast("int", about["round"]),
        phase=cast("Any", about["phase"]),
        settings=cast("Any", dict(settings)),
        tensors=_unpacked(records),
    )


def answer_records(answer: Answer, *, nonce: str) -> RecordDict:
    """An answer as Flower's records: what the client's gate let through, or a word of FAULTS."""
    arrays = {k: v for k, v in answer.payload.items() if isinstance(v, np.ndarray)}
    scalars = {k: v for k, v in answer.payload.items() if not isinstance(v, np.ndarray)}
    about = ConfigRecord(
        {
            "client": answer.client,
            "kind": answer.kind,
            "round": answer.round,
            "fault": answer.fault or "",
            "nonce": nonce,
        }
    )
    figures = MetricRecord(cast("Any", scalars))
    return RecordDict({"about": about, "scalars": figures, **_packed(arrays)})


def answer_of(records: RecordDict, question: Question, *, client: str, nonce: str) -> Answer:
    """The answer of `client` to a question, from what `answer_records` made.

    Raises FederationError for other records, for an answer to another question or by another
    client, and for a fault that is none; what numpy raises for an array that is none.
    """
    about, scalars = _first_two(records, "scalars", MetricRecord)
    _keys(about, {"client", "kind", "round", "fault", "nonce"})
    expected = {
        "client": client,
        "kind": question.kind,
        "round": question.round,
        "nonce": nonce,
    }
    for key, value in expected.items():
        if type(about[key]) is not type(value) or about[key] != value:
            raise _other(f"{key} {value!r}", f"{key} {about[key]!r}")
    fault = about["fault"]
    if fault not in ("", *FAULTS):
        raise _other(f"one of {', '.join(FAULTS)}", f"the fault {fault!r}")
    payload: dict[str, Value] = dict(_unpacked(records))
    for name, scalar in scalars.items():
        if type(scalar) not in (int, float) or name in payload:
            raise _other("counts and figures, each once", f"{name!r}")
        payload[name] = cast("Value", scalar)
    return Answer(
        client=client,
        kind=question.kind,
        round=question.round,
        payload=payload,
        fault=cast("Fault | None", fault or None),
    )


def travelled(message: Message) -> int:
    """Bytes of a message as Flower sends it: every object that it is cut into, but HTTP's heads."""

    def size(part: Any) -> int:
        return len(part.deflate()) + sum(map(size, (part.children or {}).values()))

    return size(message)


def _read(reply: Message, asked: _Asked) -> Answer:
    if reply.has_error():
        match reply.error.code:
            case ErrorCode.NODE_UNAVAILABLE:
                fault: Fault = "lost"
            case ErrorCode.MESSAGE_UNAVAILABLE | ErrorCode.REPLY_MESSAGE_UNAVAILABLE:
                fault = "late"
            case _:
                fault = "failed"
        return _faulty(asked.client, asked.question, fault)
    answer = answer_of(reply.content, asked.question, client=asked.client, nonce=asked.nonce)
    return replace(answer, bytes_up=travelled(reply))


def _first_two(records: RecordDict, name: str, kind: type[Any]) -> tuple[ConfigRecord, Any]:
    """The records `about` and `name`, where there are the four that shall be there."""
    types: dict[str, type[Any]] = {"about": ConfigRecord, name: kind}
    types |= {"tensors": ConfigRecord, "arrays": ArrayRecord}
    if {key: type(record) for key, record in records.items()} != types:
        found = ", ".join(f"{_short(k)}: {type(v).__name__}" for k, v in records.items())
        expected = ", ".join(f"{k}: {v.__name__}" for k, v in types.items())
        raise _other(expected, found or "nothing")
    return cast("ConfigRecord", records["about"]), records[name]


def _keys(about: ConfigRecord, keys: set[str]) -> None:
    if about.keys() != keys:
        raise _other(", ".join(sorted(keys)), ", ".join(sorted(about)))


def _packed(
    tensors: Mapping[str, NDArray[Any]], held: dict[bytes, Array] | None = None
) -> dict[str, ConfigRecord | ArrayRecord]:
    """The records `tensors` and `arrays`."""
    table, parts = ConfigRecord(), dict[str, list[NDArray[Any]]]()
    for name, tensor in tensors.items():
        if tensor.dtype.name not in DTYPES:
            raise _other(" or ".join(DTYPES), f"{name} of {tensor.dtype}")
        table[name] = f"{tensor.dtype.name}[{','.join(map(str, tensor.shape))}]"
        parts.setdefault(tensor.dtype.name, []).append(np.ravel(tensor))
    known, arrays = {} if held is None else held, ArrayRecord()
    for dtype, flat in parts.items():
        made = Array(np.concatenate(flat))
        arrays[dtype] = known.setdefault(hashlib.sha256(made.data).digest(), made)
    return {"tensors": table, "arrays": arrays}


def _unpacked(records: RecordDict) -> dict[str, NDArray[Any]]:
    """Named tensors. Raises FederationError where table and numbers do not agree to the last."""
    table, arrays = records["tensors"], cast("ArrayRecord", records["arrays"])
    flat, found = dict[str, NDArray[Any]](), dict[str, NDArray[Any]]()
    for dtype, array in arrays.items():
        numbers = array.numpy()  # numpy's format, without pickles
        plain = type(numbers) is np.ndarray and numbers.ndim == 1 and numbers.dtype == dtype
        if dtype not in DTYPES or not plain:
            raise _other(f"a row of {' or '.join(DTYPES)}", f"{_short(dtype)} of another form")
        flat[dtype] = numbers
    taken = dict.fromkeys(flat, 0)
    for name, shaped in table.items():
        match = SHAPED.fullmatch(shaped) if isinstance(shaped, str) else None
        if not match or match[1] not in flat:
            raise _other("type and shape of a tensor that is there", f"{_short(shaped)}")
        dtype, shape = match[1], tuple(map(int, filter(None, match[2].split(","))))
        begin, end = taken[dtype], taken[dtype] + math.prod(shape)
        if end > flat[dtype].size:
            raise _other(f"{end} numbers of {dtype}", str(flat[dtype].size))
        found[name] = flat[dtype][begin:end].reshape(shape)
        taken[dtype] = end
    for dtype, numbers in flat.items():
        if taken[dtype] < numbers.size:
            raise _other(f"{taken[dtype]} numbers of {dtype}", str(numbers.size))
    return found


def _faulty(client: str, question: Question, fault: Fault) -> Answer:
    return Answer(client=client, kind=question.kind, round=question.round, fault=fault)


def _short(text: object) -> str:
    """What a stranger wrote, cut short, on one line."""
    return ascii(str(text))[1:201]


def _other(expected: str, found: str) -> FederationError:
    return FederationError(
        f"expected {expected} in a message, found {_short(found)}; use one version of fedgraft "
        "everywhere"
    )


# ─── The client's end ─────────────────────────────────────────────────────────────────────────────

client_app = ClientApp()


@client_app.query(ACTION)
def _forward(message: Message, context: Context) -> Message:
    """Hand a question to the resident and its answer back. Loads no torch: a process a message.

    Nothing that a reason could quote leaves: an exception here would travel to the server.
    """
    try:
        question, about = question_of(message.content), message.content["about"]
        client, nonce = str(about["client"]), str(about["nonce"])
    except Exception:
        log.exception("a question that cannot be read")
        return Message(Error(ErrorCode.UNKNOWN, "unreadable"), reply_to=message)
    try:
        answer = ask(_socket(context), question, _left(message))
        if answer.client != client:
            log.error(
                "expected the resident of %s behind this SuperNode, found that of %s; nothing "
                "left it. Give the SuperNode the socket of its own",
                client,
                answer.client,
            )
            answer = _faulty(client, question, "refused")
        return Message(answer_records(answer, nonce=nonce), reply_to=message)
    except Exception:
        log.exception("%s has no answer", client)
        answer = _faulty(client, question, "failed")
        return Message(answer_records(answer, nonce=nonce), reply_to=message)


def _socket(context: Context) -> Path:
    place = context.node_config.get("socket")
    if not isinstance(place, str) or not place:
        raise FederationError(
            f"expected the path of the resident's socket in the node's configuration, found "
            f"{place!r}; start the SuperNode with --node-config 'socket=\"PATH\"'"
        )
    return Path(place)


def _left(message: Message) -> float:
    """Seconds until nobody waits for the answer any more."""
    return max(message.metadata.created_at + message.metadata.ttl - time.time(), 1.0)


# ─── The server's end ─────────────────────────────────────────────────────────────────────────────

server_app = ServerApp()


@server_app.main()
def _rounds(grid: Grid, context: Context) -> None:
    """Run the rounds of the plan that the run's configuration names, from where they stopped."""
    plan_file, model, out = (_path(context, key) for key in ("plan", "model", "out"))
    plan = read_plan(plan_file)
    exchange = FlowerExchange(grid, plan.clients)
    if missing := exchange.wait(_seconds(context)):
        log.warning("not online: %s; the rounds begin without them", ", ".join(missing))
    from fedgraft.federation.rounds import run_rounds  # with torch

    run_rounds(exchange, plan, model, out, watch=_tell)
    if exchange.num_dropped:
        log.warning("%d replies to no question of this run were dropped", exchange.num_dropped)


def _tell(event: "Event") -> None:
    """A line in the run's log, which `flwr log` shows."""
    from fedgraft.federation.asking import Answered, Asked

    match event:
        case Asked(round=number, phase=phase, clients=clients):
            log.warning("round %d, %s: asked %s", number, phase, ", ".join(clients))
        case Answered(round=number, phase=phase, part=part):
            said = part.fault or part.refused or "answered"
            log.warning(
                "round %d, %s: %s %s after %.0f s", number, phase, part.client, said, part.seconds
            )
        case done:
            kept = "; ".join(done.kept.values())
            log.warning("round %d is kept%s", done.number, f", but: {kept}" if kept else "")


def read_plan(file: Path) -> Plan:
    """A plan from its JSON. Raises FederationError with everything that is wrong in it."""
    try:
        return Plan.model_validate_json(file.read_bytes())
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}"
            for fault in error.errors()
        )
        raise FederationError(f"{file}: expected a plan as JSON, found {faults}; mend it") from None
    except OSError as error:
        raise FederationError(
            f"{file}: expected a plan as JSON, found {error.strerror or error}; name a file on the "
            "server"
        ) from error


def _path(context: Context, key: str) -> Path:
    value = context.run_config.get(key)
    if not isinstance(value, str) or not Path(value).is_absolute():
        raise FederationError(
            f"expected an absolute path as {key} in the run's configuration, found {value!r}; "
            f"submit it with --run-config '{key}=\"/...\"'"
        )
    return Path(value)


def _seconds(context: Context) -> float:
    value = context.run_config.get("wait", 0)
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise FederationError(
            f"expected seconds to wait in the run's configuration, found {value!r}; submit it with "
            "--run-config 'wait=120'"
        )
    return float(value)


# ─── Who submits ──────────────────────────────────────────────────────────────────────────────────


def submit(
    plan: Path,
    model: Path,
    out: Path,
    *,
    superlink: str,
    wait: float = 120,
    home: Path | None = None,
) -> int:
    """Start rounds on a SuperLink and return the number of the run.

    Paths are those of the server. A run that was stopped goes on from its last round when it is
    submitted again with the same `out`.

    Args:
        superlink: A connection of Flower's `config.toml`.
        wait: Seconds for clients to come online before the first question.
        home: Where that file is; what FLWR_HOME names, or Flower's own folder, where None.

    Raises FederationError with what Flower said where it refused.
    """
    configured = " ".join(
        f"{key}={json.dumps(str(path.absolute()))}"
        for key, path in (("plan", plan), ("model", model), ("out", out))
    )
    configured += f" wait={wait:g}"
    found = _flwr("run", str(APP), superlink, "--run-config", configured, home=home)
    return int(found["run-id"])


def status(run: int, *, superlink: str, home: Path | None = None) -> str:
    """`pending`, `running`, `finished:completed`, `finished:failed` or `finished:stopped`."""
    found = _flwr("list", "--run-id", str(run), superlink, home=home)
    return str(found["runs"][0]["status"])


def stop(run: int, *, superlink: str, home: Path | None = None) -> None:
    """Stop a run; its rounds stay, and `submit` with the same `out` goes on after them."""
    _flwr("stop", str(run), superlink, home=home)


def register(public_key: Path, client: str, *, superlink: str, home: Path | None = None) -> int:
    """Let the SuperNode with a key take part, as the client of that name; returns its node id."""
    arguments = (str(public_key), superlink, "--name", client)
    return int(_flwr("supernode", "register", *arguments, home=home)["node-id"])


def nodes(*, superlink: str, home: Path | None = None) -> dict[int, str]:
    """Node id -> `online`, `offline` or `registered`, of all that are registered."""
    found = _flwr("supernode", "list", superlink, home=home)["nodes"]
    return {int(node["node-id"]): str(node["status"]) for node in found}


def _flwr(*arguments: str, home: Path | None) -> dict[str, Any]:
    """What a command of Flower's says as JSON."""
    program = shutil.which("flwr", path=Path(sys.executable).parent) or shutil.which("flwr")
    if program is None:
        raise FederationError(
            "expected Flower's command `flwr`, found none; pip install 'fedgraft[flower]'"
        )
    done = subprocess.run(
        [program, *arguments, "--format", "json"],
        capture_output=True,
        text=True,
        env={**os.environ, **QUIET, **({"FLWR_HOME": str(home.absolute())} if home else {})},
        check=False,
    )
    try:
        found = json.loads(done.stdout)
    except json.JSONDecodeError:
        found = {}
    if done.returncode or not found.get("success"):
        said = found.get("error-message") or done.stderr.strip() or done.stdout.strip()
        raise FederationError(
            f"expected Flower to do `flwr {arguments[0]}`, found: {' '.join(said.split())} Look "
            "whether the SuperLink runs, and whether `config.toml` below FLWR_HOME names its "
            "address and certificate"
        )
    return cast("dict[str, Any]", found)
