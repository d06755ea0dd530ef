"""What every verb prints at its end: where the result is, a few facts, the next step."""

from collections.abc import Iterable
from pathlib import Path

import typer

WIDTH = 10


def finish(result: str, place: Path, *, facts: Iterable[str] = (), steps: Iterable[str]) -> None:
    """Say where a result is, in lines that can be copied: paths and commands are never wrapped."""
    _line(result, str(place), bold=True)
    for fact in facts:
        _line("", fact)
    for number, step in enumerate(steps):
        _line("" if number else "next", step, fg="cyan")


def _line(label: str, text: str, *, bold: bool = False, fg: str | None = None) -> None:
    typer.echo(f"{label:<{WIDTH}}{typer.style(text, bold=bold, fg=fg)}")


def show_table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Print rows under their columns; every column but the first is right-aligned where numeric."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=True).print(table)
