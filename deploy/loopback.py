"""A whole deployment on this machine: TLS, node keys, a SuperLink, three SuperNodes and residents.

    python deploy/loopback.py --out runs/loopback

trains adapters of three departments on the embedded pocket model over Flower, shows what happened,
and takes everything down again; logs stay in `runs/loopback/logs`. It starts what the units in
`deploy/systemd` start, with the scripts beside it, so it is also the shortest description of a
deployment that runs:

    certificates.sh, node-key.sh     an authority, the server's certificate, a key a client
    check.sh                         the port is free, the certificate holds
    flower-superlink                 state in a file, server apps in processes of their own
    flower-superexec                 starts the server app
    resident                         a client's model and text
    flower-supernode                 fetches questions for its resident
    nginx, if it is installed        lets nodes reach /v1/fleet/ and nothing else
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from fedgraft.errors import FederationError, FedgraftError
from fedgraft.federation import flower
from fedgraft.federation.history import History
from fedgraft.federation.plan import Plan

HERE = Path(__file__).parent
NAME = "localhost"
"""Of the server, in its certificate and in Flower's configuration."""
PROGRAMS = Path(sys.executable).parent
PATIENCE = 90.0
"""Seconds that a process has to come up."""


class Loopback:
    """Processes of a deployment, by name: `superlink`, `superexec`, `proxy`, `node CLIENT`,
    `resident CLIENT`. A context manager that ends them all.
    """

    def __init__(
        self, work: Path, model: Path, texts: Mapping[str, Path], *, nginx: str | None = None
    ) -> None:
        """
        Args:
            work: Everything is below it: certificates, keys, state, logs.
            texts: Client -> its documents.
            nginx: The program, where nodes shall go through the proxy.
        """
        self.work, self.model, self.texts = work.absolute(), model.absolute(), texts
        self.nginx = nginx
        self.port, self.proxy_port = free_ports(2)
        self.names: dict[int, str] = {}
        """Node id -> client."""
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.home = self.work / "flwr"
        self.certificates = self.work / "certificates"
        self.certificate = self.certificates / "server.crt"
        self.authority = self.certificates / "ca.crt"

    def __enter__(self) -> Self:
        self.prepare()
        try:
            self.start_server()
            if self.nginx:
                self.start_proxy()
            for client in self.texts:
                self.start_resident(client)
            for client in self.texts:
                self.register(client)
            for client in self.texts:
                self.until(self.socket(client).exists, f"resident {client}")
                self.start_node(client)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ── parts ────────────────────────────────────────────────────────────────────────────────

    def prepare(self) -> None:
        """Certificates, keys, and where Flower's commands find the server."""
        for folder in ("logs", "keys", "s", "clients", "flwr"):
            (self.work / folder).mkdir(parents=True, exist_ok=True)
        script("certificates.sh", self.certificates, NAME)
        for client in self.texts:
            if not self.key(client).exists():
                script("node-key.sh", self.key(client))
        self.configure(NAME, self.port, self.authority)

    def configure(self, connection: str, port: int, authority: Path) -> None:
        """Add a connection to Flower's `config.toml`."""
        file = self.home / "config.toml"
        known = file.read_text() if file.exists() else f'[superlink]\ndefault = "{NAME}"\n'
        file.write_text(
            f'{known}\n[superlink.{connection}]\naddress = "{NAME}:{port}"\n'
            f'root-certificates = "{authority}"\n'
        )

    def start_server(self) -> None:
        """A SuperLink and the SuperExec that starts server apps for it."""
        script("check.sh", self.port, self.certificate, self.authority)
        self.start_superlink()
        self.start(
            "superexec",
            PROGRAMS / "flower-superexec",
            f"--runtime-api-address={NAME}:{self.port}",
            f"--root-certificates={self.authority}",
        )

    def start_superlink(self) -> None:
        self.start(
            "superlink",
            PROGRAMS / "flower-superlink",
            "--host=127.0.0.1",
            f"--port={self.port}",
            f"--ssl-ca-certfile={self.authority}",
            f"--ssl-certfile={self.certificate}",
            f"--ssl-keyfile={self.certificates / 'server.key'}",
            f"--database={self.work / 'state.db'}",
            "--isolation=process",
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        )
        self.until(lambda: self.answers(self.port, "/health") == 200, "superlink")

    def register(self, client: str, key: str = "") -> None:
        """Let the node with a key take part as a client."""
        public_key = self.key(key or client, ".pub")
        number = flower.register(public_key, client, superlink=NAME, home=self.home)
        self.names[number] = client

    def nodes(self) -> dict[str, str]:
        """Client -> status of its node, as the operator sees it."""
        found = flower.nodes(superlink=NAME, home=self.home)
        return {self.names[number]: status for number, status in found.items()}

    def start_proxy(self) -> None:
        """nginx with our configuration, its paths and ports exchanged for these."""
        text = (HERE / "nginx.conf").read_text()
        for ours, here in (
            ("/etc/fedgraft/certificates", str(self.certificates)),
            ("listen 443", f"listen 127.0.0.1:{self.proxy_port}"),
            ("127.0.0.1:8443", f"127.0.0.1:{self.port}"),
            ("federation.example.org", NAME),
        ):
            assert ours in text
            text = text.replace(ours, here)
        folder = self.work / "nginx"
        folder.mkdir(exist_ok=True)
        places = "".join(
            f"{kind}_temp_path {folder}/{kind};"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        user = "user root;" if os.geteuid() == 0 else ""
        (folder / "nginx.conf").write_text(
            f"{user} daemon off; pid {folder}/pid; error_log {folder}/error.log;\n"
            f"events {{}}\nhttp {{ access_log {folder}/access.log; {places}\n{text}\n}}\n"
        )
        assert self.nginx
        self.start("proxy", self.nginx, "-c", folder / "nginx.conf", "-e", folder / "error.log")
        self.until(lambda: self.answers(self.proxy_port, "/") == 404, "proxy")

    def start_resident(self, client: str) -> None:
        """The client's file, as a department writes it, and the command that reads it."""
        file = self.client_file(client)
        file.write_text(
            f"name: {client}\n"
            f"model: {self.model}\n"
            f"corpus: [{self.texts[client].absolute()}]\n"
            f"state: state-{client}\n"
        )
        command = (sys.executable, "-m", "fedgraft", "federate", "serve", file)
        self.start(f"resident {client}", *command, f"--socket={self.socket(client)}")

    def start_node(
        self,
        client: str,
        *,
        key: Path | None = None,
        authority: Path | None = None,
        keyless: bool = False,
    ) -> None:
        """A SuperNode; with another key or authority to see it refused, or without a key.

        The last goes to the SuperLink directly, for the proxy would refuse it already.
        """
        (port,) = free_ports(1)
        server = self.proxy_port if self.nginx and not keyless else self.port
        shown = [] if keyless else [f"--auth-supernode-private-key={key or self.key(client)}"]
        self.start(
            f"node {client}",
            PROGRAMS / "flower-supernode",
            f"--superlink={NAME}:{server}",
            f"--root-certificates={authority or self.authority}",
            *shown,
            f"--port={port}",
            f"--node-config=socket={json.dumps(str(self.socket(client)))}",
        )

    # ── rounds ───────────────────────────────────────────────────────────────────────────────

    def submit(self, plan: Plan, out: Path) -> int:
        """Start a run; returns its number."""
        file = self.work / "plan.json"
        file.write_text(plan.model_dump_json(indent=1))
        return flower.submit(file, self.model, out, superlink=NAME, home=self.home)

    def status(self, run: int) -> str:
        return flower.status(run, superlink=NAME, home=self.home)

    def finished(self, run: int, out: Path, seconds: float) -> History:
        """Wait for a run. Raises FederationError where it fails or takes longer."""
        end, looked = time.monotonic() + seconds, time.monotonic()
        while time.monotonic() < end:
            history = history_of(out)
            if history and history.final:
                return history
            if time.monotonic() - looked > 15:
                if (found := self.status(run)).startswith("finished") and not (
                    (history := history_of(out)) and history.final
                ):
                    raise FederationError(f"run {run}: {found}; {self.tail('superexec')}")
                looked = time.monotonic()
            time.sleep(0.5)
        raise FederationError(f"run {run}: not finished after {seconds:g} s; see {self.work}/logs")

    # ── processes ────────────────────────────────────────────────────────────────────────────

    def start(self, name: str, *command: object) -> None:
        environment = {
            **os.environ,
            **flower.QUIET,
            "FLWR_HOME": str(self.home),
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}",  # Flower's programs start each other
            "OMP_NUM_THREADS": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # seconds, instead of 1
        }
        with self.log(name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a group of its own, to be ended as one
            )

    def kill(self, name: str) -> None:
        """As a machine dies: at once, with all that the process started."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """End everything, nodes first."""
        for process in reversed(self.processes.values()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        end = time.monotonic() + 10
        for name in list(self.processes):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.processes[name].wait(max(0.1, end - time.monotonic()))
            self.kill(name)
        for number in strays(self.home):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def until(self, ready: Callable[[], bool], name: str) -> None:
        """Wait for a process. Raises FederationError with the end of its log where it dies."""
        end = time.monotonic() + PATIENCE
        while not ready():
            if self.processes[name].poll() is not None or time.monotonic() > end:
                raise FederationError(
                    f"{name}: expected it to come up, found that it "
                    f"{'ended' if self.processes[name].poll() is not None else 'did not'}; its log "
                    f"{self.log(name)} ends:\n{self.tail(name)}"
                )
            time.sleep(0.1)

    def answers(self, port: int, path: str, data: bytes | None = None) -> int:
        """HTTP status of a path, over TLS; 0 where nobody answers."""
        context = ssl.create_default_context(cafile=str(self.authority))
        url = f"https://{NAME}:{port}{path}"
        try:
            with urllib.request.urlopen(url, data, timeout=10, context=context) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def log(self, name: str) -> Path:
        return self.work / "logs" / f"{name.replace(' ', '-')}.log"

    def tail(self, name: str, lines: int = 15) -> str:
        text = self.log(name).read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def socket(self, client: str) -> Path:
        return self.work / "s" / client

    def client_file(self, client: str) -> Path:
        return self.work / "clients" / f"{client}.yaml"

    def key(self, client: str, suffix: str = "") -> Path:
        return self.work / "keys" / f"{client}{suffix}"


def script(name: str, *arguments: object) -> None:
    """Run one of the scripts beside this file. Raises FederationError with what it said."""
    done = subprocess.run(
        [str(HERE / name), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise FederationError(done.stderr.strip().removeprefix("error: ") or f"{name} failed")
    if done.stderr:
        print(done.stderr.strip(), file=sys.stderr)  # noqa: T201


def free_ports(count: int) -> list[int]:
    """Ports of this machine on which nobody listens now."""
    with contextlib.ExitStack() as held:
        found = []
        for _ in range(count):
            probe = held.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            found.append(int(probe.getsockname()[1]))
        return found


def strays(home: Path) -> list[int]:
    """Processes that were started with this folder as Flower's; none after `stop`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"FLWR_HOME={home}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def history_of(out: Path) -> History | None:
    with contextlib.suppress(OSError):
        return History.model_validate_json((out / "history.json").read_bytes())
    return None


def departments(folder: Path) -> dict[str, Path]:
    """Three clients' pages of the fictional company."""
    from fedgraft.pocket.company import write_company

    company = write_company(folder, overwrite=True) / "year2"
    return {f"{file.stem}-1": file for file in sorted(company.glob("*.jsonl"))[:3]}


def plan_for(clients: Mapping[str, object], num_rounds: int) -> Plan:
    return Plan.model_validate(
        {
            "name": "loopback",
            "departments": {name.rpartition("-")[0]: (name,) for name in clients},
            "share": "organisation",
            "num_rounds": num_rounds,
            "training": {"num_tokens": 20_000, "rank": 8, "learning_rate": 2e-3},
            "timeout": 600,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="a whole deployment on this machine")
    parser.add_argument("--out", type=Path, default=Path("runs/loopback"))
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    from fedgraft.pocket.weights import folder

    texts = departments(given.out / "company")
    begin = time.monotonic()
    with Loopback(given.out, folder / "instruct", texts, nginx=shutil.which("nginx")) as here:
        print(f"up after {time.monotonic() - begin:.0f} s: {', '.join(here.processes)}")  # noqa: T201
        rounds = given.out.absolute() / "federation"
        run = here.submit(plan_for(texts, given.rounds), rounds)
        history = here.finished(run, rounds, 1800)
    for done in history.rounds:
        for part in done.parts:
            print(  # noqa: T201
                f"round {done.number}  {part.client:16} {part.fault or 'trained'}  "
                f"{part.scores.get('client', float('nan')):.3f} nats a token  "
                f"{part.seconds_training:5.1f} s training, {part.seconds:5.1f} s in all  "
                f"{part.bytes_down / 1e6:.2f} MB down, {part.bytes_up / 1e6:.2f} MB up"
            )
    print(f"adapters are in {rounds / 'adapters'}; everything was taken down")  # noqa: T201


if __name__ == "__main__":
    try:
        main()
    except FedgraftError as error:
        sys.exit(f"error: {error}")
