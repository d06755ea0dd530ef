"""The process beside a SuperNode that keeps a client's model and text loaded from round to round.

    SuperLink ──> SuperNode ──> ClientApp ──────── socket ────────> resident ──> Client.answer
                                a new process                       one process, all rounds
                                for every message                   one question at a time

Flower starts a process for every message. One that loaded torch and peft each time took 12 s an
exchange, before any model; one that asks a resident takes 6 s, most of it Flower's own polling.

What goes through the socket, both ways, a message each:

    length n, 8 bytes, little endian | n bytes: `message.question_bytes` or `message.answer_bytes`

Both are safetensors, so nothing is unpickled. The socket belongs to its user alone (mode 0600).
"""

import contextlib
import fcntl
import logging
import os
import signal
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Protocol

from fedgraft.errors import FederationError
from fedgraft.federation.message import (
    Answer,
    Question,
    answer_bytes,
    answer_from,
    question_bytes,
    question_from,
)

LONGEST = 2**36
"""Bytes of a message at most; a length above it is noise, not a length."""
PATIENCE = 60.0
"""Seconds in which who asks must have sent its question, once it has connected."""
_BLOCK = 2**20
_LONGEST_PATH = 107
"""Bytes of a socket's path, on Linux."""

log = logging.getLogger(__name__)


class Answering(Protocol):
    """A `client.Client`, as far as it matters here."""

    @property
    def name(self) -> str: ...

    def answer(self, question: Question, /) -> Answer: ...


def serve(client: Answering, place: Path) -> None:
    """Answer questions that come through the socket at `place`, one at a time, until SIGTERM.

    What a client did not foresee becomes the fault `failed`, with the traceback in the log of this
    machine, and the next question is answered. A socket that a dead process left is replaced.
    SIGTERM and SIGINT end a training that is under way; the question is lost, the client's state
    on disk is whole.

    Raises FederationError where a living process answers there already, where something else than a
    socket stands there, and for a path that is too long for one.
    """
    with _listening(place) as listener, _ended_by_signals():
        log.info("%s answers at %s", client.name, place)
        while True:
            connection, _ = listener.accept()
            with connection:
                try:
                    _answer_one(client, connection)
                except (OSError, FederationError) as error:
                    log.warning("%s: a question came to nothing: %s", client.name, error)


def ask(place: Path, question: Question, timeout: float) -> Answer:
    """Ask the resident at `place`; waits while it answers others.

    Raises FederationError where nobody is there, it breaks off, or `timeout` seconds pass.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(str(place))
            _send(connection, question_bytes(question))
            return answer_from(_received(connection))
        except TimeoutError as error:
            raise FederationError(
                f"{place}: expected an answer within {timeout:g} s, found none; raise the plan's "
                "timeout, or look whether the resident is still training"
            ) from error
        except OSError as error:
            raise FederationError(
                f"{place}: expected a resident to answer there, found {error.strerror or error}; "
                "start it, and give the SuperNode the same path"
            ) from error


def _answer_one(client: Answering, connection: socket.socket) -> None:
    connection.settimeout(PATIENCE)
    question = question_from(_received(connection))
    connection.settimeout(None)
    try:
        answer = client.answer(question)
    except Exception:  # whatever it is, the next round needs this process
        log.exception("%s broke off over %s", client.name, question.kind)
        answer = Answer(
            client=client.name, kind=question.kind, round=question.round, fault="failed"
        )
    connection.settimeout(PATIENCE)
    _send(connection, answer_bytes(answer))


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(len(data).to_bytes(8, "little"))
    connection.sendall(data)


def _received(connection: socket.socket) -> bytes:
    head = _exactly(connection, 8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > LONGEST:
        raise FederationError(
            f"expected a message of at most {LONGEST} bytes after its length, found "
            f"{f'a length of {length}' if len(head) == 8 else f'{len(head)} bytes of a length'}; "
            "use one version of fedgraft on both sides, and look into the log of the resident"
        )
    data = _exactly(connection, length)
    if len(data) < length:
        raise FederationError(
            f"expected a message of {length} bytes, found {len(data)}; the other side broke off: "
            "look into its log"
        )
    return data


def _exactly(connection: socket.socket, length: int) -> bytes:
    """So many bytes, or fewer if the other side closes before; memory grows with what comes."""
    parts, missing = [], length
    while missing and (part := connection.recv(min(missing, _BLOCK))):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


@contextlib.contextmanager
def _listening(place: Path) -> Iterator[socket.socket]:
    """A socket of our own; the lock beside it lives as long as this process does."""
    place = place.absolute()
    if len(os.fsencode(place)) > _LONGEST_PATH:
        raise FederationError(
            f"{place}: expected a path of at most {_LONGEST_PATH} bytes for a socket, found "
            f"{len(os.fsencode(place))}; choose a shorter one, such as below /run"
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(place.with_name(place.name + ".lock"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FederationError(
                f"{place}: expected no resident there yet, found one that is alive; stop it, or "
                "choose another path"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(place.lstat().st_mode):
                raise FederationError(
                    f"{place}: expected nothing or a socket there, found a file; choose another "
                    "path"
                )
            place.unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            mask = os.umask(0o177)  # never open to others, not even for a moment
            try:
                listener.bind(str(place))
            finally:
                os.umask(mask)
            listener.listen(16)
            try:
                yield listener
            finally:
                place.unlink(missing_ok=True)
    finally:
        os.close(lock)


class _EndedError(BaseException):
    """The process shall end; not an Exception, so that no training takes it for a fault."""


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Return where SIGTERM or SIGINT come, in the main thread; others get no signals."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise _EndedError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except _EndedError:
        log.info("ended by a signal")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
