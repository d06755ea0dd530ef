"""Progress with rate and time left: a bar on a terminal, a line now and then elsewhere.

Of several processes that work together (`torchrun`) the first one speaks.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

SECONDS_BETWEEN_LINES = 10.0
_silent = ContextVar("silent", default=False)


class Advance(Protocol):
    """Call it with how much was done; `note` stands behind the rate, e.g. the loss."""

    def __call__(self, amount: float, note: str = "") -> None: ...


@contextmanager
def progress(label: str, total: float | None, unit: str) -> Iterator[Advance]:
    """Show how far `label` has come towards `total` units; goes to standard error.

    Where nobody knows the total (None), how many units are done.
    """
    if _silent.get() or not is_first():
        yield lambda *_, **__: None
    else:
        yield from _bar(label, total, unit) if sys.stderr.isatty() else _lines(label, total, unit)


@contextmanager
def silenced() -> Iterator[None]:
    """Show no progress of what is done inside: whoever calls shows its own."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def is_first() -> bool:
    """Whether this process is alone, or the one of several that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def _bar(label: str, total: float | None, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f} %" if total is not None else "{task.completed:,.0f}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    start = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, rate="", note="")

        def advance(amount: float, note: str = "") -> None:
            done = bar.tasks[task].completed + amount
            rate = f"{_figure(done / max(time.monotonic() - start, 1e-9))} {unit}/s"
            bar.update(task, advance=amount, rate=rate, note=note)

        yield advance


def _figure(rate: float) -> str:
    """`1,234`, or `0.12` for what is slower than one a second."""
    return f"{rate:,.0f}" if rate >= 1 else f"{rate:.2g}"


def _lines(label: str, total: float | None, unit: str) -> Iterator[Advance]:
    start = last = time.monotonic()
    done = 0.0

    def advance(amount: float, note: str = "") -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            rate = done / (now - start)
            parts = [f"{done:,.0f} {unit}", f"{_figure(rate)} {unit}/s", note]
            if total is not None:
                left = max(0.0, total - done) / rate if rate else 0.0
                parts = [f"{done / total:.0%}", parts[1], f"{left:.0f} s left", note]
            print(f"{label}: " + ", ".join(filter(None, parts)), file=sys.stderr, flush=True)  # noqa: T201

    yield advance
