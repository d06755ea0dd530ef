"""A whole deployment on loopback: TLS, node keys, a proxy, three SuperNodes with residents.

What the open-source SuperLink cannot do is shown too: its control interface knows no users, so
that it must not be reached (`deploy/nginx.conf`).
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedgraft.errors import FederationError
from fedgraft.federation import flower
from fedgraft.federation.in_process import InProcess
from fedgraft.federation.plan import Plan
from fedgraft.federation.rounds import run_rounds
from fedgraft.study.federation import ClientFile
from fedgraft.testing import TEXT, save_tiny

DEPLOY = Path(__file__).parents[2] / "deploy"
NAMES = ("finance-1", "hr-1", "it-1")
NGINX = os.environ.get("FEDGRAFT_NGINX") or shutil.which("nginx")
Loopback = Any


def _loopback() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loopback", DEPLOY / "loopback.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


loopback = _loopback()


def plan(num_rounds: int = 2, **fields: Any) -> Plan:
    return Plan.model_validate(
        {
            "name": "three",
            "departments": {"finance": NAMES[:1], "hr": NAMES[1:2], "it": NAMES[2:]},
            "share": "organisation",
            "num_rounds": num_rounds,
            "training": {"num_tokens": 256, "rank": 2, "learning_rate": 1e-2, "batch_tokens": 64},
            "row_length": 32,
            "window": 32,
            "timeout": 240,
            **fields,
        }
    )


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    """The deployment; tests that break a part mend it."""
    folder = tmp_path_factory.mktemp("up")
    model = save_tiny(folder / "model")
    texts = {}
    for i, name in enumerate(NAMES):
        texts[name] = folder / f"{name}.jsonl"
        rows = [{"text": f"{name} says {k}: {TEXT[(i + k) % 3]}"} for k in range(30)]
        texts[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    with loopback.Loopback(folder, model, texts, nginx=NGINX) as here:
        yield here
    assert loopback.strays(here.home) == []


@pytest.fixture(scope="module")
def in_process(up: Loopback, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The adapter that the same clients make in one process, after a number of rounds."""
    made: dict[int, Path] = {}

    def adapter(num_rounds: int) -> Path:
        if num_rounds not in made:
            folder = tmp_path_factory.mktemp("in-process")
            clients = []
            for name in NAMES:
                own = ClientFile.load(up.client_file(name), {})
                clients.append(own.model_copy(update={"state": folder / name}).client())
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # as the residents have: sums depend on it
            run_rounds(InProcess(clients), plan(num_rounds), up.model, folder / "out")
            torch.set_num_threads(threads)
            made[num_rounds] = folder / "out"
        return made[num_rounds]

    return adapter


def same_to_the_bit(one: Path, other: Path) -> None:
    ours, theirs = (
        load_file(out / "adapters" / "organisation" / "adapter_model.safetensors")
        for out in (one, other)
    )
    assert ours.keys() == theirs.keys()
    assert any(np.any(tensor) for name, tensor in ours.items() if "lora_B" in name)
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []


def ended(here: Loopback, name: str, seconds: float = 60) -> str:
    """The log of a process that ends by itself."""
    here.processes.pop(name).wait(seconds)
    return str(here.log(name).read_text())


def rounds_done(out: Path) -> int:
    history = loopback.history_of(out)
    return len(history.rounds) if history else 0


def lines(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0


def until(ready: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def come_back(here: Loopback, client: str) -> None:
    """Start a node again until the SuperLink lets it in, as `Restart=always` does."""
    until(lambda: _stays(here, client), 180)


def _stays(here: Loopback, client: str) -> bool:
    here.start_node(client)
    with contextlib.suppress(subprocess.TimeoutExpired):
        here.processes[f"node {client}"].wait(8)
        here.processes.pop(f"node {client}")
        return False
    return bool(here.nodes()[client] == "online")


# ─── With everything up ───────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_the_adapter_is_that_of_one_process_to_the_bit(
    up: Loopback, in_process: Callable[[int], Path]
) -> None:
    out = up.work / "run-whole"
    run = up.submit(plan(), out)
    history = up.finished(run, out, 280)
    assert history.transport == "flower"
    assert {part.client for part in history.final if part.counted} == set(NAMES)
    assert all(part.bytes_up > 0 for done in history.rounds for part in done.parts)
    same_to_the_bit(out, in_process(2))

    log = subprocess.run(
        [loopback.PROGRAMS / "flwr", "log", str(run), loopback.NAME, "--show"],
        capture_output=True,
        text=True,
        env={**os.environ, **flower.QUIET, "FLWR_HOME": str(up.home)},
        check=True,
    )
    assert "round 2, train: hr-1 answered after" in log.stdout
    assert "round 2 is kept" in log.stdout


@pytest.mark.slow
def test_the_command_of_a_federation_runs_it_over_flower(up: Loopback) -> None:
    """`fedgraft federate PLAN --superlink NAME`, from the plan to the page; no text is there."""
    out, file = up.work / "run-command", up.work / "federation.yaml"
    departments = [name.removesuffix("-1") for name in NAMES]
    listed = "\n".join(f"  {name}: {{ corpus: [elsewhere.jsonl] }}" for name in departments)
    file.write_text(
        f"name: three\nmodel: {up.model}\ndepartments:\n{listed}\nnum_rounds: 1\n"
        "training: { num_tokens: 256, learning_rate: 1.0e-2, rank: 2, batch_tokens: 64 }\n"
        "row_length: 32\nwindow: 32\n"
    )
    command = [sys.executable, "-m", "fedgraft", "federate", file, "--out", out]
    done = subprocess.run(
        [*command, "--superlink", loopback.NAME],
        capture_output=True,
        text=True,
        env={**os.environ, "FLWR_HOME": str(up.home)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(place.name for place in (out / "adapters").iterdir()) == sorted(departments)
    assert loopback.history_of(out).transport == "flower"
    assert (out / "report.html").exists()


@pytest.mark.slow
def test_an_unknown_key_is_refused(up: Loopback) -> None:
    loopback.script("node-key.sh", up.work / "keys" / "stranger")
    up.start_node("stranger")
    assert "Failed to activate SuperNode" in ended(up, "node stranger")
    assert set(up.nodes()) == set(NAMES)


@pytest.mark.slow
def test_a_node_without_a_key_is_refused(up: Loopback) -> None:
    up.start_node("nobody", keyless=True)
    assert "could not establish a connection" in ended(up, "node nobody")
    assert set(up.nodes()) == set(NAMES)


@pytest.mark.slow
def test_a_name_of_another_cannot_be_had_with_an_own_key(up: Loopback) -> None:
    """A node says nothing of its name: it is what its key was registered under."""
    key = up.work / "keys" / "intruder"
    loopback.script("node-key.sh", key)
    up.register("it-2", key="intruder")
    up.start_node("intruder", key=key)
    until(lambda: up.nodes().get("it-2") == "online", 60)
    assert set(up.nodes()) == {*NAMES, "it-2"}
    up.kill("node intruder")


@pytest.mark.slow
def test_a_server_with_another_authority_is_refused_by_the_node(up: Loopback) -> None:
    other = up.work / "other"
    loopback.script("certificates.sh", other, loopback.NAME)
    up.start_node("it-1b", key=up.key("it-1"), authority=other / "ca.crt")
    assert "certificate" in ended(up, "node it-1b").lower()


@pytest.mark.slow
@pytest.mark.skipif(NGINX is None, reason="nginx is not installed; name it by FEDGRAFT_NGINX")
def test_a_node_reaches_the_fleet_interface_and_nothing_else(up: Loopback) -> None:
    """Through the proxy; what answers 404 there is there behind it."""
    closed = [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/control/list-nodes",
        "/docs",
        "/openapi.json",
        "/health",
        "/",
    ]
    tricks = [
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol/start-run",
        "/v1/fleet//../control/start-run",
        "//v1/control/start-run",
        "/V1/CONTROL/start-run",
        "/v1/fleet/register-node",
        "/v1/fleet",
    ]
    for path in closed:
        assert up.answers(up.proxy_port, path, b"") == 404, path
    for path in tricks:
        assert up.answers(up.proxy_port, path, b"") in (301, 400, 404), path
    for path in closed[:3]:
        assert up.answers(up.port, path, b"") not in (0, 404), path
    assert up.answers(up.proxy_port, "/v1/fleet/pull-messages", b"") not in (0, 404)

    up.configure("outside", up.proxy_port, up.authority)
    with pytest.raises(FederationError, match="expected Flower to do `flwr list`"):
        flower.status(1, superlink="outside", home=up.home)


@pytest.mark.slow
def test_the_superlink_itself_listens_on_loopback_alone(up: Loopback) -> None:
    """Of the sockets that its process listens on, none is open to a network."""
    listening = {
        line.split()[1]
        for file in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(file).read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    }
    port = f"{up.port:04X}"
    assert {place for place in listening if place.endswith(f":{port}")} == {f"0100007F:{port}"}


# ─── With something broken ────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_node_killed_in_a_round_is_lost_and_the_round_ends_with_the_others(up: Loopback) -> None:
    out, resident = up.work / "run-node", up.processes["resident hr-1"]
    run = up.submit(plan(1), out)
    until(lambda: lines(out / "ledger.jsonl") == len(NAMES))  # all have said who they are
    os.killpg(resident.pid, signal.SIGSTOP)  # so that its answer cannot be there before
    try:
        seen = up.log("node hr-1").stat().st_size
        until(lambda: b"query.question" in up.log("node hr-1").read_bytes()[seen:])
        time.sleep(3)
        up.kill("node hr-1")
    finally:
        os.killpg(resident.pid, signal.SIGCONT)
    history = up.finished(run, out, 250)
    parts = {part.client: part.fault for part in history.rounds[0].parts}
    assert parts == {"finance-1": None, "hr-1": "lost", "it-1": None}
    assert not history.rounds[0].kept
    come_back(up, "hr-1")


@pytest.mark.slow
def test_a_superlink_killed_in_a_run_and_started_again_ends_it_as_if_nothing_had_been(
    up: Loopback, in_process: Callable[[int], Path]
) -> None:
    out = up.work / "run-superlink"
    run = up.submit(plan(3), out)
    until(lambda: rounds_done(out) >= 1)
    up.kill("superlink")
    time.sleep(3)
    up.start_superlink()
    history = up.finished(run, out, 250)
    assert [done.number for done in history.rounds] == [1, 2, 3]
    assert all(part.counted for done in history.rounds for part in done.parts)
    same_to_the_bit(out, in_process(3))


@pytest.mark.slow
def test_a_run_whose_server_app_was_killed_goes_on_from_its_last_round(
    up: Loopback, in_process: Callable[[int], Path]
) -> None:
    out = up.work / "run-app"
    run = up.submit(plan(3), out)
    until(lambda: rounds_done(out) >= 1)
    for process in loopback.strays(up.home):
        with contextlib.suppress(OSError):
            if b"flwr-serverapp" in Path(f"/proc/{process}/cmdline").read_bytes():
                os.kill(process, signal.SIGKILL)
    before = loopback.history_of(out)
    until(lambda: up.status(run).startswith("finished"))
    history = up.finished(up.submit(plan(3), out), out, 250)
    assert history.rounds[: len(before.rounds)] == before.rounds
    assert [done.number for done in history.rounds] == [1, 2, 3]
    same_to_the_bit(out, in_process(3))


# ─── What the scripts say ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    loopback.script("certificates.sh", tmp_path, "localhost")
    return tmp_path


def test_a_port_in_use_is_said_before_anything_starts(folder: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(FederationError, match=rf"port {port}: expected it to be free, found a"):
            loopback.script("check.sh", port, folder / "server.crt")
    loopback.script("check.sh", port, folder / "server.crt", folder / "ca.crt")


def test_an_expired_certificate_is_said_with_its_date(folder: Path) -> None:
    (folder / "server.crt").unlink()
    loopback.script("certificates.sh", folder, "localhost", "127.0.0.1", 0)
    time.sleep(1)
    with pytest.raises(FederationError, match=r"expected a certificate that holds, found notAfter"):
        loopback.script("check.sh", 1, folder / "server.crt")


def test_a_certificate_of_another_authority_is_said(folder: Path, tmp_path: Path) -> None:
    loopback.script("certificates.sh", tmp_path / "other", "localhost")
    with pytest.raises(FederationError, match=r"expected a certificate signed by .*ca.crt, found"):
        loopback.script("check.sh", 1, folder / "server.crt", tmp_path / "other" / "ca.crt")


def test_no_certificate_is_said(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match=r"expected a certificate, found none that can be re"):
        loopback.script("check.sh", 1, tmp_path / "server.crt")


def test_keys_are_their_owners_alone(folder: Path) -> None:
    loopback.script("node-key.sh", folder / "hr-1")
    for name in ("ca.key", "server.key", "hr-1"):
        assert (folder / name).stat().st_mode & 0o077 == 0, name


def test_what_is_there_already_stays(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    loopback.script("certificates.sh", folder, "localhost")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_the_units_are_understood_by_systemd() -> None:
    units = sorted((DEPLOY / "systemd").glob("*.service"))
    assert len(units) == 4
    for unit in units:
        text = unit.read_text()
        assert "FLWR_TELEMETRY_ENABLED=0" in text or "resident" in unit.name
        assert "--insecure" not in text
    if not (verify := shutil.which("systemd-analyze")):
        pytest.skip("systemd is not installed")
    done = subprocess.run([verify, "verify", *units], capture_output=True, text=True, check=False)
    faults = [line for line in done.stderr.splitlines() if "is not executable" not in line]
    assert [line for line in faults if ".service" in line] == []


def test_the_app_that_is_submitted_is_that_of_the_package() -> None:
    assert (DEPLOY / "app").resolve() == flower.APP.resolve()
    assert tomllib.loads((DEPLOY / "app" / "pyproject.toml").read_text())


def test_the_loopback_script_says_what_it_wants() -> None:
    done = subprocess.run(
        [sys.executable, DEPLOY / "loopback.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--rounds" in done.stdout
