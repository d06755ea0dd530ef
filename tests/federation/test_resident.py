"""A resident answers through its socket until it is told to end, whatever happens in between."""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fedgraft.errors import FederationError
from fedgraft.federation.message import Question, question_bytes
from fedgraft.federation.resident import LONGEST, ask, serve

SCRIPT = """
import logging, sys, time
from pathlib import Path
from fedgraft.federation.message import Answer, Question
from fedgraft.federation.resident import serve

class Client:
    name = "hr-1"

    def answer(self, question: Question) -> Answer:
        if question.settings.get("sleep"):
            time.sleep(question.settings["sleep"])
        if question.settings.get("break"):
            raise RuntimeError("row 7 of the text")
        payload = {name: 2 * tensor for name, tensor in question.tensors.items()}
        return Answer(client=self.name, kind=question.kind, round=question.round, payload=payload)

logging.basicConfig(level="INFO")
serve(Client(), Path(sys.argv[1]))
"""
Start = Callable[[Path], "subprocess.Popen[str]"]
TWO = {"q.lora_A.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}


def question(**settings: float) -> Question:
    return Question(kind="adapter", round=3, phase="train", settings=settings, tensors=TWO)


@pytest.fixture
def start() -> Iterator[Start]:
    begun: list[subprocess.Popen[str]] = []

    def started(place: Path) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(place)], stderr=subprocess.PIPE, text=True
        )
        begun.append(process)
        end = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < end:
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(place)) == 0:
                    return process
            time.sleep(0.02)
        return process

    yield started
    for process in begun:
        process.kill()
        process.communicate()


def log_of(process: "subprocess.Popen[str]") -> str:
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=20)[1]


def test_an_answer_comes_back_as_the_client_gave_it(start: Start, tmp_path: Path) -> None:
    start(tmp_path / "s")
    for _ in range(2):
        answer = ask(tmp_path / "s", question(), 20)
        assert (answer.client, answer.kind, answer.round, answer.fault) == (
            "hr-1",
            "adapter",
            3,
            None,
        )
        np.testing.assert_array_equal(answer.payload["q.lora_A.weight"], 2 * TWO["q.lora_A.weight"])


def test_an_answer_may_be_larger_than_the_buffers_of_a_socket(start: Start, tmp_path: Path) -> None:
    start(tmp_path / "s")
    large = {"w": np.random.default_rng(0).standard_normal((1500, 1000)).astype(np.float32)}
    asked = Question(kind="adapter", round=0, phase="train", tensors=large)
    np.testing.assert_array_equal(ask(tmp_path / "s", asked, 20).payload["w"], 2 * large["w"])


def test_the_socket_is_its_users_alone(start: Start, tmp_path: Path) -> None:
    start(tmp_path / "s")
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600


def test_what_the_client_did_not_foresee_is_a_fault_with_a_traceback_in_its_own_log(
    start: Start, tmp_path: Path
) -> None:
    process = start(tmp_path / "s")
    answer = ask(tmp_path / "s", question(**{"break": 1}), 20)
    assert answer.fault == "failed"
    assert not answer.payload
    assert ask(tmp_path / "s", question(), 20).fault is None
    log = log_of(process)
    assert "RuntimeError: row 7 of the text" in log
    assert "hr-1 broke off over adapter" in log


@pytest.mark.parametrize(
    "spoiled",
    [
        b"",
        b"\x05",
        b"GET / HTTP/1.1\r\n\r\n",
        (LONGEST + 1).to_bytes(8, "little"),
        (40).to_bytes(8, "little") + b"too short",
        (9).to_bytes(8, "little") + b"\x80\x04no text",
        (len(question_bytes(question())) - 9).to_bytes(8, "little") + question_bytes(question()),
    ],
)
def test_noise_leaves_it_alive(start: Start, tmp_path: Path, spoiled: bytes) -> None:
    start(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(tmp_path / "s"))
        connection.sendall(spoiled)
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
    assert ask(tmp_path / "s", question(), 20).fault is None


def test_one_who_asks_and_leaves_does_not_end_it(start: Start, tmp_path: Path) -> None:
    start(tmp_path / "s")
    with pytest.raises(FederationError, match=r"expected an answer within 0.1 s, found none; rais"):
        ask(tmp_path / "s", question(sleep=0.5), 0.1)
    assert ask(tmp_path / "s", question(), 20).fault is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_even_while_it_trains(
    start: Start, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(tmp_path / "s")
    with pytest.raises(FederationError):
        ask(tmp_path / "s", question(sleep=60), 0.2)
    process.send_signal(number)
    _, log = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in log
    assert not (tmp_path / "s").exists()


def test_the_socket_of_a_dead_resident_is_replaced(start: Start, tmp_path: Path) -> None:
    process = start(tmp_path / "s")
    process.kill()
    process.wait()
    assert (tmp_path / "s").exists()
    start(tmp_path / "s")
    assert ask(tmp_path / "s", question(), 20).fault is None


def test_the_socket_of_a_living_resident_is_refused(start: Start, tmp_path: Path) -> None:
    start(tmp_path / "s")
    second = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "s")], stderr=subprocess.PIPE, text=True
    )
    _, log = second.communicate(timeout=30)
    assert second.returncode
    assert "expected no resident there yet, found one that is alive; stop it, or" in log
    assert ask(tmp_path / "s", question(), 20).fault is None


class Nobody:
    name = "nobody"

    def answer(self, question: Question) -> None:
        raise AssertionError(question)


def test_a_file_in_its_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("mine")
    with pytest.raises(FederationError, match=r"expected nothing or a socket there, found a file"):
        serve(Nobody(), tmp_path / "s")  # type: ignore[arg-type]
    assert (tmp_path / "s").read_text() == "mine"


def test_a_path_that_is_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=r"at most 107 bytes for a socket, found 2\d\d; choo"):
        serve(Nobody(), tmp_path / ("s" * 200))  # type: ignore[arg-type]


def test_nobody_there_is_said_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        FederationError, match=r"expected a resident to answer there, found No such file.*; start"
    ):
        ask(tmp_path / "s", question(), 1)


def test_one_who_breaks_off_is_said_with_the_remedy(tmp_path: Path) -> None:
    place = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        if (child := os.fork()) == 0:
            connection, _ = listener.accept()
            connection.recv(2**16)
            os._exit(0)
        with pytest.raises(FederationError, match=r"found (0 bytes of a length|Connection reset)"):
            ask(place, question(), 20)
        os.waitpid(child, 0)
