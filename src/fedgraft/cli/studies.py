"""`quickstart`, `report`, and the verbs of `study`: a question, its arms, and their page."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedgraft.cli.arguments import Out
from fedgraft.cli.console import finish, say, show_table
from fedgraft.cli.places import places_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fedgraft.study.memory import Memory
    from fedgraft.study.plan import Plan, Training


def quickstart(out: Out = Path("runs/quickstart")) -> None:
    """The whole story on embedded models, in minutes on two CPU cores.

    Two small real models ship with fedgraft, and a fictional company with text of
    two years. The base and the instruct model continue to pre-train on year 2; the
    residual is grafted on; every arm answers the same held-out questions; the report
    says in words what came out.
    """
    from fedgraft.pocket.weights import folder

    _run(folder.with_name("quickstart.yaml"), out)


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A study file (YAML).")],
    out: Out,
    processes: Annotated[
        int,
        typer.Option("--processes", min=1, help="Devices that train each model together (FSDP)."),
    ] = 1,
) -> None:
    """Run a study; stages that are finished are not run again.

    Paths in the file may start with pocket: (the embedded checkpoints), company:
    (the fictional company, written to OUT/company) or data: (the folder that
    FEDGRAFT_DATA names).
    """
    _run(file, out, processes)


def plan(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A study file (YAML).")],
    hardware: Annotated[
        Literal["a100", "h100", "h200", "this"],
        typer.Option("--hardware", help="What trains; this: the machine at hand, measured."),
    ] = "a100",
    processes: Annotated[
        int, typer.Option("--processes", min=1, help="Devices that train together (FSDP).")
    ] = 1,
    share: Annotated[
        float, typer.Option("--share", help="Of the device's matrix rate that is reached.")
    ] = 0.45,
) -> None:
    """Say what a study would take; nothing is trained or written.

    Parameters, steps, memory, FLOPs, hours and disk, from the file, config.json and
    the headers of the weights. Where a model is not fetched yet, its sizes come from
    `family.shape` in the file; text may be missing.
    """
    from fedgraft.study import kinds
    from fedgraft.study.machine import machine

    with TemporaryDirectory() as scratch:
        study = kinds.load(file, places_of(file, Path(scratch), dry=True), dry=True)
        planned = kinds.plan(study, machine(hardware), num_processes=processes, share=share)
    _show(planned)


def tables(
    out: Out,
    column: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            metavar="NAME=SCORECARD",
            help="A model of ours by the paper's name (L3b+1B+3Lr); again for more, or seeds.",
        ),
    ] = None,
    study: Annotated[
        Path | None,
        typer.Option(
            "--study",
            metavar="DIR",
            help="The --out of a study that asked benchmarks: its arms, with figure 2.",
        ),
    ] = None,
    beside: Annotated[
        Literal["forgetting", "portability", "derived"] | None,
        typer.Option("--beside", help="The paper's table 2, 3 or 4; else the nearest."),
    ] = None,
) -> None:
    """Write the tables and figures of arXiv 2410.10739: CSV, Markdown, LaTeX, HTML.

    Without columns they are the paper's own, every average taken again from its
    rows. Ours stand beside those that are called alike, with the difference.
    A scorecard is what `fedgraft evaluate MODEL --suite paper --out FILE` writes.
    """
    from fedgraft.report.tables import write_tables
    from fedgraft.study.tables import (
        NAMES,
        NUMBERS,
        deviations,
        load_asked,
        load_columns,
        nearest,
        paper,
        shared_columns,
        table,
    )

    asked = load_asked(study) if study else None
    columns = {**(asked.columns if asked else {}), **load_columns(column or [])}
    ours = table(columns) if columns else None
    name = beside or nearest(tuple(columns))
    page = write_tables(out, ours, name, asked.flops if asked else {})
    if columns and not shared_columns(tuple(columns), paper(name)):
        say(
            "beside",
            f"no column is called as in table {NUMBERS[name]} ({', '.join(paper(name).columns)}),",
        )
        say("", "so that no difference is taken; the paper's table stands below ours")
    for note in ours.notes if ours else ():
        say("asked", f"{note}; no difference is taken")
    for number, one in enumerate(one for name in NAMES for one in deviations(name)):
        say("" if number else "averages", one.words)
    finish("tables", page, steps=["open it in a browser; CSV, Markdown and LaTeX stand beside it"])


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The --out of a study.")],
) -> None:
    """Write the report of a study: one HTML file, no links.

    The same result gives the same page.
    """
    from fedgraft.report.page import write_report

    finish("report", write_report(folder), steps=["open it in a browser; it needs no network"])


def _run(file: Path, out: Path, processes: int = 1) -> None:
    from fedgraft.report.page import write_report
    from fedgraft.study import kinds

    study = kinds.load(file, places_of(file, out))
    result = kinds.run(
        study, out, say=lambda line: typer.echo(line, err=True), num_processes=processes
    )
    page = write_report(out)
    typer.echo(f"\n{result.verdict}\n")
    model = out / f"seed-{study.seeds[0]}" / "graft" / "model"
    chat = [f"fedgraft chat {model}"] if model.exists() else []
    finish("report", page, steps=["open it in a browser", *chat])


def _show(plan: "Plan") -> None:
    """Print a plan: the model, what is trained, what it holds, what is left, what to know."""
    from fedgraft.study.memory import GRAFT_BYTES
    from fedgraft.study.plan import in_words, memory_choices

    shape, machine = plan.shape, plan.machine
    source = "its config and headers" if plan.at_hand else "its `shape` in the file, not fetched"
    trained = plan.trainings[0].precision if plan.trainings else machine.precision
    rate = machine.flops(trained) / 1e12
    say("study", plan.study, bold=True)
    say(
        "model", f"{plan.base}: {shape.num_parameters:,} parameters in {len(shape.tensors)} tensors"
    )
    say("", f"(from {source})")
    say(
        "machine",
        f"{plan.num_processes} x {machine.name}, {plan.share:.0%} of {rate:.3g} TFLOP/s each",
    )
    columns = _columns(plan.trainings)
    for first in range(0, len(columns), COLUMNS):
        some = columns[first : first + COLUMNS]
        show_table(
            ("a run", *(names for names, _ in some)),
            [(label, *(facts[label] for _, facts in some)) for label in some[0][1]],
        )
    alike: dict[Memory, list[Training]] = {}
    for training in plan.trainings:
        alike.setdefault(training.memory, []).append(training)
    for training, *others in alike.values():
        choices = memory_choices(plan, training)
        asked = in_words(training.rank, training.gradient_checkpointing)
        unit, size = ("GB", 1e9) if training.memory.total >= 1e9 else ("MB", 1e6)
        names = ", ".join(one.stage for one in (training, *others))
        say("memory", f"of {names}, {unit} a process; recompute is with gradient")
        say("", "checkpointing, * is what the file asks for")
        show_table(
            ("", *(f"{name} *" if name == asked else name for name in choices)),
            [
                (words, *(f"{getattr(one, part) / size:,.2f}" for one in choices.values()))
                for part, words in MEMORY.items()
            ],
        )
    for number, (what, num_bytes) in enumerate(plan.disk.items()):
        say("" if number else "disk", f"{_in_bytes(num_bytes)}  {what}")
    if plan.num_grafts:
        say(
            "grafting", f"{plan.num_grafts} grafts, {plan.graft_flops:.3g} FLOPs in all, each holds"
        )
        say("", f"about {GRAFT_BYTES / 1e6:.0f} MB whatever the size of the model")
    if reading := plan.reading:
        times = f", {reading.num_times} times" if reading.num_times > 1 else ""
        say(
            "features",
            f"of {reading.num_examples:,} examples, {reading.num_tokens:,} tokens{times}:",
        )
        say("", f"{reading.flops:.3g} FLOPs, {_time(reading.seconds)}")
    if plan.tuning_ratio:
        say("tuning", f"repeated without a residual: {plan.tuning_ratio:,.0f} times a run's cost")
    for number, note in enumerate(plan.notes):
        say("" if number else "note", note, fg="yellow")
    for number, name in enumerate(plan.not_there):
        say("" if number else "not there", f"{name} yet", fg="yellow")
    if plan.not_there:
        say("", "make text with `fedgraft corpus`; models are fetched when the study runs")
    say(
        "in all", f"{plan.flops:.3g} FLOPs, {_time(plan.seconds)} of training; scoring comes on top"
    )
    if plan.kwh is not None:
        say("energy", f"{plan.kwh:,.3g} kWh of training")
    if plan.prices and plan.money is not None:
        say("money", f"{plan.money:,.2f} {plan.prices.currency} of training")


COLUMNS = 4
"""Kinds of runs beside each other in a table."""
MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "AdamW",
    "copies": "bfloat16 copies",
    "gathered": "gathered (FSDP)",
    "activations": "activations",
    "logits": "logits",
    "total": "total",
}
"""The parts of `study.memory.Memory`, in words."""


def _columns(trainings: "Sequence[Training]") -> "list[tuple[str, dict[str, str]]]":
    """Names and facts, those of which every fact is the same in one column, their runs together."""
    alike: dict[tuple[str, ...], list[Training]] = {}
    for training in trainings:
        alike.setdefault(tuple(_facts(training).values()), []).append(training)
    return [
        (
            ", ".join(one.stage for one in some),
            _facts(replace(some[0], num_runs=sum(one.num_runs for one in some))),
        )
        for some in alike.values()
    ]


def _facts(training: "Training") -> dict[str, str]:
    from fedgraft.study.plan import in_words

    work = training.operations
    return {
        "runs": f"{training.num_runs:,}",
        "trained": in_words(training.rank, training.gradient_checkpointing),
        "parameters trained": f"{training.num_trained:,}",
        "precision": training.precision,
        "tokens": f"{training.num_tokens:,}",
        "rows x tokens a row": f"{training.num_rows:,} x {training.row_length:,}",
        "steps": f"{training.num_steps:,}",
        "rows a forward pass": f"{training.micro_batch_rows}",
        "checkpoints left at": ", ".join(_short(tokens) for tokens in training.checkpoints),
        "FLOPs, 6 N T (the paper)": f"{training.paper_flops:.3g}",
        "FLOPs, counted": f"{work.total:.3g}",
        "    layers' matrices": f"{work.matrices:.3g}",
        "    attention": f"{work.attention:.3g}",
        "    logits": f"{work.output:.3g}",
        "    computed again": f"{work.recomputed:.3g}",
        "time": _time(training.seconds),
        "time, all runs": _time(training.num_runs * training.seconds),
    }


def _time(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _short(tokens: int) -> str:
    for letter, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if tokens >= size:
            return f"{tokens / size:.3g}{letter}"
    return str(tokens)


def _in_bytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 10**8 else f"{num_bytes / 1e6:,.1f} MB"
