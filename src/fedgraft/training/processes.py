"""The processes that train one model together, as `torchrun` or `accelerate launch` start them.

Each reads the same rows and takes its share of every step; the first one alone writes and speaks.
What tells a process its place are the variables RANK and WORLD_SIZE; without them it is alone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed
from accelerate import PartialState

from fedgraft.progress import is_first
from fedgraft.provenance import new_artefact


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
