"""Laws of an artefact with several writers: it is a whole one, and nothing is left beside it."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedgraft.errors import ArtefactError
from fedgraft.provenance import new_artefact

FORK = multiprocessing.get_context("fork")
NUM_WRITERS = 2


def write(out: Path, number: int, meet: Any, told: Any, overwrite: bool) -> None:
    """Write an artefact, at the same time as the others."""
    try:
        with new_artefact(out, overwrite=overwrite) as partial:
            (partial / "one").write_text(str(number))
            meet.wait(30)
            (partial / "two").write_text(str(number))
        told.put("written")
    except (ArtefactError, OSError) as error:
        told.put(str(error))


def in_processes(out: Path, overwrite: bool) -> list[str]:
    meet, told = FORK.Barrier(NUM_WRITERS), FORK.Queue()
    writers: list[Any] = [
        FORK.Process(target=write, args=(out, number, meet, told, overwrite))
        for number in range(NUM_WRITERS)
    ]
    return ended(writers, told)


def in_threads(out: Path, overwrite: bool) -> list[str]:
    meet, told = threading.Barrier(NUM_WRITERS), FORK.Queue()
    writers = [
        threading.Thread(target=write, args=(out, number, meet, told, overwrite))
        for number in range(NUM_WRITERS)
    ]
    return ended(writers, told)


def ended(writers: list[Any], told: Any) -> list[str]:
    for writer in writers:
        writer.start()
    found = sorted(told.get(timeout=30) for _ in writers)
    for writer in writers:
        writer.join(30)
    return found


@pytest.mark.parametrize("at_once", [in_processes, in_threads])
def test_of_two_writers_the_first_stays_and_the_other_is_told(
    at_once: Callable[[Path, bool], list[str]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    exists, written = at_once(out, False)
    assert written == "written"
    assert exists == f"{out} exists already; remove it or choose another --out"
    assert_whole(out)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("at_once", [in_processes, in_threads])
def test_of_two_writers_that_overwrite_both_succeed_and_one_stays(
    at_once: Callable[[Path, bool], list[str]], there: bool, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if there:
        out.mkdir()
        (out / "old").write_text("of before")
    assert at_once(out, True) == ["written", "written"]
    assert_whole(out)


def assert_whole(out: Path) -> None:
    assert sorted(file.name for file in out.iterdir()) == ["one", "two"]
    assert (out / "one").read_text() == (out / "two").read_text()
    assert list(out.parent.iterdir()) == [out]


def test_what_a_killed_process_left_is_removed_also_one_of_the_same_number(tmp_path: Path) -> None:
    """In a container every run has the same number."""
    gone = FORK.Process(target=int)
    gone.start()
    gone.join()
    for owner in (gone.pid, os.getpid()):
        for kind in ("partial", "old"):
            (tmp_path / f".out.{kind}-{owner}").mkdir()
            (tmp_path / f".out.{kind}-123-{owner}").mkdir()
    (tmp_path / f".out.partial-123-{os.getppid()}").mkdir()
    with new_artefact(tmp_path / "out"):
        pass
    assert {file.name for file in tmp_path.iterdir()} == {
        "out",
        f".out.partial-123-{os.getppid()}",
    }


def test_a_failure_leaves_the_artefact_of_before(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("of before")

    def fail() -> None:
        with new_artefact(out, overwrite=True) as partial:
            (partial / "new").write_text("half")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "old"]
