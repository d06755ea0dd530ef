"""What every verb prints at its end: where the result is, a few facts, the next step."""

from collections.abc import Iterable
from pathlib import Path

import typer

from fedgraft.progress import is_first

WIDTH = 12


def say(label: str, text: str, *, bold: bool = False, fg: str | None = None) -> None:
    """One line: a label in its column, and text that is never wrapped, so that it can be copied."""
    if is_first():
        typer.echo(f"{label:<{WIDTH}}{typer.style(text, bold=bold, fg=fg)}")


def finish(
    result: str, place: Path, *, facts: Iterable[str] = (), steps: Iterable[str] = ()
) -> None:
    """Say where a result is, what it is like, and what to do next."""
    say(result, str(place), bold=True)
    for fact in facts:
        say("", fact)
    for number, step in enumerate(steps):
        say("" if number else "next", step, fg="cyan")


def show_table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Print rows under their columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=True).print(table)
