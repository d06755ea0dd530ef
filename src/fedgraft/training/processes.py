"""The processes that train one model together, as `torchrun`, `accelerate launch` or a study
start them.

Each reads the same rows and takes its share of every step; the first one alone writes and speaks.
What tells a process its place are the variables RANK and WORLD_SIZE; without them it is alone.
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import torch.distributed
from accelerate import PartialState
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import ProcessException, spawn

from fedgraft.errors import FedgraftError, TrainingError
from fedgraft.progress import is_first
from fedgraft.provenance import new_artefact

SECONDS_BETWEEN_LOOKS = 1.0


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_all() -> None:
    """Go on when every process has come this far."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Let the first process do what is inside, then the others, which find it done."""
    if num_processes() == 1:
        yield
    else:
        with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
            yield


@contextmanager
def artefact_of_the_first(out: Path, *, overwrite: bool) -> Iterator[Path | None]:
    """`new_artefact` in the first process; the others get None and wait until it is there."""
    if is_first():
        with new_artefact(out, overwrite=overwrite) as partial:
            yield partial
    else:
        yield None
    wait_for_all()


def run_together(num: int, work: Callable[[], object]) -> None:
    """Do some work in so many new processes of this machine, each with its place among them.

    Args:
        work: Is pickled to each of them; where one fails or is lost, the others are ended.

    Raises what fedgraft has to say in one of them, and TrainingError where one ended otherwise.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the first of them shares this process's device
    told = get_context("spawn").SimpleQueue()
    try:
        given = (num, _free_port(), os.getpid(), told, work)
        spawn(_one, given, num)  # type: ignore[no-untyped-call]
    except ProcessException as lost:
        if not told.empty():
            raise told.get() from None
        raise TrainingError(
            f"expected {num} processes to train together, found that process {lost.error_index} "
            f"ended: {str(lost).strip().splitlines()[-1]}; run the same command again, it goes on "
            "from the last whole state"
        ) from lost


def _one(
    place: int, num: int, port: int, parent: int, told: Any, work: Callable[[], object]
) -> None:
    Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ |= {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(place)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(max(1, torch.get_num_threads() // num))
    try:
        work()
    except FedgraftError as error:
        told.put(error)
        sys.exit(1)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _end_with(parent: int) -> None:
    """End this process soon after its parent; what torch sets for that is ignored in the background
    of a shell script."""
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
