"""The processes that train one model together, as `torchrun` or `accelerate launch` start them.

Each reads the same rows and takes its share of every step; the first one alone writes and speaks.
What tells a process its place are the variables RANK and WORLD_SIZE; without them it is alone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed

from fedgraft.provenance import new_artefact


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return os.environ.get("RANK", "0") == "0"


def wait_for_all() -> None:
    """Go on when every process has come this far."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


@contextmanager
def artefact_of_the_first(out: Path, *, overwrite: bool) -> Iterator[Path | None]:
    """`new_artefact` in the first process; the others get None and wait until it is there."""
    if is_first():
        with new_artefact(out, overwrite=overwrite) as partial:
            yield partial
    else:
        yield None
    wait_for_all()
