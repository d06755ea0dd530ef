"""`federate`, `federate serve`: departments train adapters together.

fedgraft federate PLAN --out DIR                     all clients in this process
fedgraft federate PLAN --out DIR --superlink NAME    clients on other machines, over Flower
fedgraft federate serve CLIENT --socket PATH         one of those, beside its SuperNode
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from fedgraft.cli.console import finish, say
from fedgraft.cli.places import places_of

if TYPE_CHECKING:
    from rich.table import Table

    from fedgraft.federation.asking import Event, Watch
    from fedgraft.federation.history import Part, Round
    from fedgraft.study.federation import FederationFile

Out = Annotated[
    Path, typer.Option("--out", help="For rounds, adapters, ledger and report; goes on there.")
]
RUN = "run"
SECONDS_BETWEEN_LOOKS = 5.0


class Federate(TyperGroup):
    """`federate PLAN` is `federate run PLAN`."""

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = [RUN, *args]
        return super().resolve_command(ctx, args)


def run(
    file: Annotated[Path, typer.Argument(metavar="PLAN", help="A federation file (YAML).")],
    out: Out,
    superlink: Annotated[
        str | None,
        typer.Option(
            "--superlink",
            metavar="NAME",
            help="A connection in Flower's config.toml: clients are on other machines.",
        ),
    ] = None,
) -> None:
    r"""Departments train adapters together; their text stays with them.

    PLAN names the model, the departments with their text and their number of
    clients, and how they train:

        name: handbooks
        model: runs/grafted      # or pocket:instruct, or org/name on the hub
        departments:
          hr: { corpus: \[hr.jsonl], num_clients: 3 }
          finance: { corpus: \[finance/], num_clients: 2 }
        num_rounds: 4
        training: { num_tokens: 20_000, learning_rate: 1.0e-3, rank: 8 }
        rule: fedavg             # ffa, fedsa, flora, flexlora, fedex

    In place of corpus all of them may have dialogues: \[hr.jsonl], or Dolly's or
    Alpaca's instructions; then answers are learned.

    More: docs/federation.md. A run that was stopped goes on after its last whole
    round when the same command is run again.
    """
    from fedgraft.report.page import write_report
    from fedgraft.study.federation import FederationFile
    from fedgraft.study.federation import run as run_federation

    plan = FederationFile.load(file, places_of(file, out), dry=superlink is not None)
    if superlink is None:
        with watching(plan) as watch:
            result = run_federation(plan, out, watch=watch)
    else:
        result = _over_flower(plan, out, superlink)
    page = write_report(out)
    typer.echo(f"\n{result.verdict}\n")
    say("report", str(page), bold=True)
    groups = sorted(place.name for place in (out / "adapters").iterdir())
    prompt = " --prompt alpaca" if plan.prompt == "alpaca" else ""
    finish(
        "adapters",
        out / "adapters",
        facts=[", ".join(groups)],
        steps=[
            f"fedgraft chat {plan.as_written['model']} --adapter {out / 'adapters' / groups[0]}"
            f"{prompt}"
        ],
    )


def serve(
    file: Annotated[
        Path, typer.Argument(metavar="CLIENT", help="A client's file (YAML), on its own machine.")
    ],
    socket: Annotated[Path, typer.Option("--socket", help="Where its SuperNode finds it.")],
) -> None:
    r"""Keep a client's model and text loaded, and answer its SuperNode.

    CLIENT names what this machine has:

        name: hr-1
        model: /models/grafted       # the very checkpoint of the federation
        corpus: \[hr.jsonl]          # or dialogues: \[hr.jsonl]
        state: state/hr-1            # what it keeps from round to round

    Runs until it is stopped. Only counts, scores and adapters go through the socket.
    """
    from fedgraft.federation import resident
    from fedgraft.study.federation import ClientFile

    client = ClientFile.load(file, places_of(file, file.parent)).client()
    say("client", client.name, bold=True)
    say("socket", str(socket))
    resident.serve(client, socket)


def _over_flower(plan: "FederationFile", out: Path, superlink: str) -> Any:
    """Start the rounds on a SuperLink, wait for their end, and read what they left."""
    from fedgraft.errors import FederationError
    from fedgraft.study.federation import finished
    from fedgraft.weights.checkpoint import resolve

    try:
        from fedgraft.federation import flower
    except ModuleNotFoundError as error:
        raise FederationError(
            f"expected Flower for --superlink, found no {error.name}; pip install "
            "'fedgraft[flower]'"
        ) from error

    out.mkdir(parents=True, exist_ok=True)
    written = out / "plan.json"
    written.write_text(plan.plan.model_dump_json(indent=1) + "\n", encoding="utf-8")
    started = time.monotonic()
    number = flower.submit(written, resolve(plan.model), out, superlink=superlink)
    say("run", str(number), bold=True)
    while (status := flower.status(number, superlink=superlink)).startswith(
        ("pending", "starting", "running")
    ):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if status != "finished:completed":
        raise FederationError(
            f"expected run {number} to complete, found it {status}; `flwr log {number}` says why, "
            "and the same command goes on after its last whole round"
        )
    return finished(plan, out, time.monotonic() - started)


@contextmanager
def watching(plan: "FederationFile") -> "Iterator[Watch]":
    """Show what happens: a live table on a terminal, a line for each answer elsewhere."""
    if sys.stderr.isatty():
        yield from _live(Board(plan))
    else:
        yield _print


def _live(board: "Board") -> "Iterator[Watch]":
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), refresh_per_second=4, get_renderable=board.table):
        yield board.told


def _print(event: "Event") -> None:
    from fedgraft.federation.asking import Answered, Asked

    match event:
        case Asked():
            name = f"round {event.round}" if event.phase == "train" else event.phase
            _line(f"{name}: {len(event.clients)} clients are asked")
        case Answered():
            _line("    " + "  ".join(f"{cell:{side}}" for cell, side in _cells(event.part)))
        case _:
            _line(_of_round(event))


def _line(text: str) -> None:
    typer.echo(text, err=True)


def _cells(part: "Part") -> list[tuple[str, str]]:
    """What a client did, each cell with its side and width: name, loss, scores, bytes, time."""
    from fedgraft.report.words import size

    if not part.counted:
        return [(part.client, "<14"), (part.fault or f"refused: {part.refused}", "<1")]
    scores = [f"{model} {nats:.3f}" for model, nats in part.scores.items()]
    if part.num_left_out:
        scores.append(f"{part.num_left_out} too long for a row")
    return [
        (part.client, "<14"),
        ("" if part.loss is None else f"loss {part.loss:.3f}", ">10"),
        (", ".join(scores), ">32"),
        (f"up {size(part.bytes_up)}", ">11"),
        (f"down {size(part.bytes_down)}", ">13"),
        (f"{part.seconds:.1f} s", ">7"),
    ]


def _of_round(done: "Round") -> str:
    from fedgraft.study.result import ALL

    means = [
        f"{department} {model} {mean.weighted:.3f}"
        for department, models in done.means.items()
        if department != ALL
        for model, mean in models.items()
        if model != "client"
    ]
    kept = "".join(f"; {group} keeps its last adapter: {why}" for group, why in done.kept.items())
    seconds = sum(done.seconds.values())
    scored = f"; began with {', '.join(means)} nats per token" if means else ""
    return f"round {done.number}: {seconds:.1f} s{scored}{kept}"


class Board:
    """What the live table shows: every client's last answer, and the rounds so far."""

    def __init__(self, plan: "FederationFile") -> None:
        self._plan = plan.plan
        self._title = "getting ready"
        self._asked: set[str] = set()
        self._parts: dict[str, Part] = {}
        self._bytes = [0, 0]
        self._rounds: list[str] = []

    def told(self, event: "Event") -> None:
        from fedgraft.federation.asking import Answered, Asked

        match event:
            case Asked():
                self._asked = set(event.clients)
                of = f"round {event.round} of {self._plan.num_rounds}"
                self._title = of if event.phase == "train" else event.phase
            case Answered():
                self._asked.discard(event.part.client)
                self._parts[event.part.client] = event.part
                self._bytes[0] += event.part.bytes_up
                self._bytes[1] += event.part.bytes_down
            case _:
                self._rounds.append(_of_round(event))

    def table(self) -> "Table":
        """A row a client, and the last rounds below."""
        from rich import box
        from rich.table import Table

        from fedgraft.report.words import size

        up, down = map(size, self._bytes)
        table = Table(
            title=f"{self._plan.name}: {self._title}, {up} up, {down} down",
            caption="\n".join(self._rounds[-4:]),
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for column in ("department", "client", "loss", "nats per token", "up", "down", "time"):
            table.add_column(column, justify="left" if column in LEFT else "right")
        for department, names in self._plan.departments.items():
            for name in names:
                table.add_row(department, *self._row(name))
        return table

    def _row(self, name: str) -> list[str]:
        part = self._parts.get(name)
        waiting = " …" if name in self._asked else ""
        if part is None:
            return [name + waiting, *[""] * 5]
        cells = [cell for cell, _ in _cells(part)][1:]
        return [name + waiting, *cells, *[""] * (5 - len(cells))]


LEFT = ("department", "client")
