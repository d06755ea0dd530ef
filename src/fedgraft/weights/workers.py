"""Work on each tensor, on several cores.

numpy lets go of the interpreter for every block, and blocks that stay in a core's cache take some
ten microseconds. To hand the interpreter from thread to thread takes longer: two threads were
slower than one, two processes nearly twice as fast. So processes are forked, which costs
milliseconds. That is safe only while this process has one thread; where it has more (torch, a
server), it does the work by itself.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from typing import Any, TypeVar, cast

import numpy as np

from fedgraft.errors import ArtefactError
from fedgraft.progress import Advance, progress

MAX_WORKERS = 4
"""Each has buffers of its own, some ten megabytes."""
MANY_FROM = 50_000_000
"""Bytes from which on several cores are worth it."""
SHOWN_FROM = 500_000_000
"""Bytes from which on progress is shown; fewer take less than a second."""

T = TypeVar("T")


def each_tensor(
    label: str, num_bytes: Mapping[str, int], work: Callable[[str], T], *, in_memory: bool = False
) -> dict[str, T]:
    """Return what `work` returns for each tensor, by name.

    Args:
        num_bytes: Of each tensor, for progress, and to begin with the largest.
        in_memory: `work` has effects in this process's memory. Without that it may run in another
            process, and only what it returns and what it writes to files is sure to last.

    Raises what `work` raises, and ArtefactError where a worker was killed.
    """
    names = sorted(num_bytes, key=lambda name: (-num_bytes[name], name))
    total = sum(num_bytes.values())
    num_workers = min(MAX_WORKERS, _num_cores(), len(names))
    results: Generator[tuple[str, T], None, None]
    if total < MANY_FROM or num_workers == 1 or in_memory or not _may_fork():
        results = ((name, work(name)) for name in names)
    else:
        results = _forked(names, work, num_workers)
    found = {}
    silence = nullcontext[Advance](lambda *_, **__: None)
    try:
        with (
            np.errstate(all="ignore"),
            progress(label, total / 1e6, "MB") if total > SHOWN_FROM else silence as advance,
        ):
            for name, result in results:
                found[name] = result
                advance(num_bytes[name] / 1e6)
    finally:
        results.close()
    return dict(sorted(found.items()))  # not in the order in which they came


def _num_cores() -> int:
    """Cores that this process may use; where the system does not tell (macOS), all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _may_fork() -> bool:
    """Whether no thread could hold a lock in a child; numpy's own threads know how to be forked."""
    alone = threading.active_count() == 1 and "torch" not in sys.modules
    return sys.platform == "linux" and alone


def _forked(
    names: Sequence[str], work: Callable[[str], T], num_workers: int
) -> Generator[tuple[str, T], None, None]:
    """Fork now; the results are yielded as they come, and the workers ended with the generator."""
    context = get_context("fork")
    taken = context.Value("i", 0)
    workers: dict[connection.Connection, BaseProcess] = {}
    for _ in range(num_workers):
        reader, writer = context.Pipe(duplex=False)
        readers = [*workers, reader]
        arguments = names, work, taken, writer, readers, os.getpid()
        workers[reader] = context.Process(target=_serve, args=arguments, daemon=True)
        workers[reader].start()
        writer.close()
    results = _received(workers)
    next(results)
    return results


def _received(
    workers: "Mapping[connection.Connection, BaseProcess]",
) -> Generator[tuple[str, Any], None, None]:
    left = dict(workers)
    try:
        yield "", None  # started, so that closing it ends the workers
        while left:
            ready = cast("list[connection.Connection]", connection.wait(list(left)))
            for reader in ready:
                try:
                    name, result, error = reader.recv()
                except EOFError:
                    left.pop(reader).join()
                    _check_end(workers[reader].exitcode)
                    continue
                if error:
                    raise error
                yield name, result
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.join()


def _check_end(code: int | None) -> None:
    if code:
        raise ArtefactError(
            f"expected every worker to end by itself, found one that ended with {code}; if it was "
            "killed for want of memory, free some. Then run the same command again"
        )


def _serve(
    names: Sequence[str],
    work: Callable[[str], T],
    taken: "Synchronized[int]",
    writer: "connection.Connection[object, object]",
    readers: "Sequence[connection.Connection]",
    parent: int,
) -> None:
    """Take the next tensor until none is left; what is returned or raised goes to the parent.

    The fork copied the parent's `readers`. While a copy is open, writing to a parent that was
    killed does not fail, but waits for ever once the pipe is full.
    """
    for reader in readers:
        reader.close()
    np.seterr(all="ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    while os.getppid() == parent:
        with taken.get_lock():
            place = taken.value
            taken.value += 1
        if place >= len(names):
            return
        try:
            writer.send((names[place], work(names[place]), None))
        except BrokenPipeError:  # the parent was killed
            return
        except Exception as error:  # noqa: BLE001 (raised again by the parent)
            writer.send((names[place], None, error))
            return
