"""Laws of an artefact with several writers: it is a whole one, and nothing is left beside it."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedgraft.errors import ArtefactError
from fedgraft.provenance import HOST, RECORD, check_free, new_artefact

FORK = multiprocessing.get_context("fork")
NUM_WRITERS = 2


def write(out: Path, number: int, meet: Any, told: Any, overwrite: bool) -> None:
    """Write an artefact, at the same time as the others."""
    try:
        with new_artefact(out, overwrite=overwrite) as partial:
            (partial / "one").write_text(str(number))
            meet.wait(30)
            (partial / "two").write_text(str(number))
            (partial / RECORD).touch()
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
        (out / RECORD).write_text("of before")
    assert at_once(out, True) == ["written", "written"]
    assert_whole(out)


def assert_whole(out: Path) -> None:
    assert sorted(file.name for file in out.iterdir()) == [RECORD, "one", "two"]
    assert (out / "one").read_text() == (out / "two").read_text()
    assert list(out.parent.iterdir()) == [out]


def test_what_a_killed_process_left_is_removed_also_one_of_the_same_number(tmp_path: Path) -> None:
    """In a container every run has the same number."""
    gone = FORK.Process(target=int)
    gone.start()
    gone.join()
    for owner in (gone.pid, os.getpid()):
        for kind in ("partial", "old"):
            (tmp_path / f".out.{kind}-{HOST}-123-{owner}").mkdir()
    alive = f".out.partial-{HOST}-123-{os.getppid()}"
    elsewhere = f".out.partial-another0-123-{gone.pid}"
    for name in (alive, elsewhere):
        (tmp_path / name).mkdir()
    with new_artefact(tmp_path / "out"):
        pass
    assert {file.name for file in tmp_path.iterdir()} == {"out", alive, elsewhere}


def test_a_directory_that_is_no_artefact_is_never_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    out.mkdir()
    (out / "mine").touch()
    for ask in (check_free, lambda *a, **k: new_artefact(*a, **k).__enter__()):
        with pytest.raises(ArtefactError, match=f"found a directory without {RECORD}; remove it"):
            ask(out, overwrite=True)
    assert (out / "mine").exists()


def test_an_artefact_goes_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with new_artefact(tmp_path / "out") as partial:
        (partial / "one").touch()
    assert (tmp_path / "out").is_symlink()
    assert [file.name for file in (tmp_path / "disk").iterdir()] == ["one"]


def test_a_place_below_a_file_or_that_cannot_be_replaced_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArtefactError, match=r"file: expected a directory to write, found a file"):
        check_free(tmp_path / "file" / "sub" / "out")
    monkeypatch.setattr(os.path, "ismount", lambda place: Path(place).name == "volume")
    (tmp_path / "volume").mkdir()
    with pytest.raises(ArtefactError, match=r"found a mount point, .* such as \S+volume/result"):
        check_free(tmp_path / "volume")
    check_free(tmp_path / "volume" / "result")


def test_a_failure_leaves_the_artefact_of_before(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / RECORD).write_text("of before")

    def fail() -> None:
        with new_artefact(out, overwrite=True) as partial:
            (partial / "new").write_text("half")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert [file.name for file in tmp_path.rglob("*")] == ["out", RECORD]
