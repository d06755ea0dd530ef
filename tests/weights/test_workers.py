"""Several processes do what one does; what goes wrong in one is told by the parent.

A process with threads, such as this one, does not fork: each test asks another.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.weights.checkpoints import DTYPES, nudged, random_tensors, save

from fedgraft.provenance import Record
from fedgraft.weights import workers
from fedgraft.weights.checkpoint import Checkpoint

FORKING = """
    import os, sys, json, time, signal
    from pathlib import Path
    from fedgraft.errors import FedgraftError, NonFiniteError
    from fedgraft.weights import workers
    workers.MANY_FROM = 0
    os.sched_getaffinity = lambda _: {0, 1}
    from fedgraft.weights.workers import each_tensor
"""


def python(code: str, folder: Path, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(FORKING) + textwrap.dedent(code)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **environment},
    )


def told(code: str, folder: Path) -> Any:
    """What the code prints, as JSON."""
    out, errors = python(code, folder).communicate(timeout=60)
    assert out, errors
    return json.loads(out)


def test_every_tensor_is_done_once_by_several_processes(tmp_path: Path) -> None:
    found = told(
        """
        def work(name):
            time.sleep(0.01)
            return os.getpid()
        done = each_tensor("work", {f"t{n}": n for n in range(40)}, work)
        print(json.dumps([list(done), len(set(done.values())), os.getpid() in done.values()]))
        """,
        tmp_path,
    )
    assert found == [sorted(f"t{n}" for n in range(40)), 2, False]


def test_effects_in_memory_stay_in_this_process(tmp_path: Path) -> None:
    found = told(
        """
        seen = []
        each_tensor("work", {"a": 1, "b": 2}, seen.append, in_memory=True)
        print(json.dumps(seen))
        """,
        tmp_path,
    )
    assert found == ["b", "a"]


def test_a_process_with_threads_does_not_fork(tmp_path: Path) -> None:
    found = told(
        """
        import threading
        threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
        done = each_tensor("work", {"a": 1, "b": 2}, lambda _: os.getpid())
        print(json.dumps(set(done.values()) == {os.getpid()}))
        """,
        tmp_path,
    )
    assert found is True


def test_an_error_in_a_worker_is_raised_by_the_parent_and_ends_the_others(tmp_path: Path) -> None:
    found = told(
        """
        def work(name):
            if name == "t3":
                raise NonFiniteError("NaN in 't3'")
            time.sleep(0 if name < "t3" else 30)
        start = time.monotonic()
        try:
            each_tensor("work", {f"t{n}": 9 - n for n in range(9)}, work)
        except FedgraftError as error:
            print(json.dumps([type(error).__name__, str(error), time.monotonic() - start < 20]))
        """,
        tmp_path,
    )
    assert found == ["NonFiniteError", "NaN in 't3'", True]


def test_a_worker_that_is_killed_is_told_and_not_waited_for(tmp_path: Path) -> None:
    found = told(
        """
        def work(name):
            os.kill(os.getpid(), signal.SIGKILL) if name == "t1" else time.sleep(0.1)
        try:
            each_tensor("work", {f"t{n}": 9 - n for n in range(9)}, work)
        except FedgraftError as error:
            print(json.dumps(str(error)))
        """,
        tmp_path,
    )
    assert found.startswith("expected every worker to end by itself, found one that ended with -9")
    assert found.endswith("Then run the same command again")


def test_extracting_and_grafting_in_several_processes_gives_the_same_bytes(tmp_path: Path) -> None:
    base = random_tensors()
    instruct = nudged(base)
    base["model.layers.0.norm.weight"][0] = 1.0
    instruct["model.layers.0.norm.weight"][0] = 1e-9  # an exception, carried home by a worker
    save(tmp_path / "base", base)
    save(tmp_path / "instruct", instruct)
    code = """
        if {forks}: pass
        else: workers.MANY_FROM = 1 << 60
        from fedgraft.weights.family import Family
        from fedgraft.weights.graft import graft
        from fedgraft.weights.residual import extract, verify
        family = Family.open("base", "instruct")
        out = Path("{out}")
        out.mkdir()
        for form in ("float32", "bfloat16", "auto", "packed"):
            residual = extract(family, out / form, form=form)
            graft("base", residual, out / ("graft-" + form))
            assert verify(residual, family).sound
        print(json.dumps(family.base.content_hash))
        """
    hashes = [
        told(code.format(forks=forks, out=out), tmp_path)
        for forks, out in ((True, "several"), (False, "one"))
    ]
    assert hashes[0] == hashes[1] == Checkpoint.open(tmp_path / "base").content_hash
    files = [
        {f.relative_to(tmp_path / out): f.read_bytes() for f in (tmp_path / out).rglob("*.*")}
        for out in ("several", "one")
    ]
    assert len(files[0]) > 20
    assert files[0] == files[1]
    record = Record.read(tmp_path / "several" / "auto")
    assert record
    assert record.figures["not_restored"] == {"model.layers.0.norm.weight": 1}


def test_what_a_worker_has_hashed_need_not_be_read_again(tmp_path: Path) -> None:
    save(tmp_path / "base", random_tensors())
    found = told(
        """
        from fedgraft.weights import checkpoint
        base = checkpoint.Checkpoint.open("base")
        each_tensor("read", {n: i.num_bytes for n, i in base.tensors.items()}, base._exhaust)
        checkpoint.TensorFiles.blocks = None
        print(json.dumps(base.content_hash))
        """,
        tmp_path,
    )
    assert found == Checkpoint.open(tmp_path / "base").content_hash


def test_kill_9_of_the_parent_leaves_no_worker_and_no_output(tmp_path: Path) -> None:
    wide = np.zeros((512, 512), DTYPES["BF16"])
    tensors = random_tensors() | {f"model.layers.{n}.mlp.x.weight": wide for n in range(2, 60)}
    save(tmp_path / "base", tensors)
    save(tmp_path / "instruct", tensors)
    process = python(
        """
        from fedgraft.weights import residual
        subtract = residual.subtract
        def slow(*arguments):
            os.write(1, b"%d\\n" % os.getpid())
            time.sleep(0.5)  # the workers would have 15 s to do
            return subtract(*arguments)
        residual.subtract = slow
        residual.extract(residual.Family.open("base", "instruct"), Path("residual"))
        """,
        tmp_path,
    )
    assert process.stdout
    workers_seen = {int(process.stdout.readline()) for _ in range(4)}
    assert process.pid not in workers_seen
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left_after(5, workers_seen) == []
    assert not (tmp_path / "residual").exists()


def test_kill_9_of_the_parent_leaves_no_worker_that_waits_for_a_full_pipe(tmp_path: Path) -> None:
    process = python(
        """
        def work(name):
            os.write(1, b"%d\\n" % os.getpid())
            time.sleep(0.5)
            return bytes(1 << 20)
        each_tensor("work", {f"t{n}": n for n in range(60)}, work)
        """,
        tmp_path,
    )
    assert process.stdout
    workers_seen = {int(process.stdout.readline()) for _ in range(4)}
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left_after(5, workers_seen) == []


def left_after(seconds: float, pids: set[int]) -> list[int]:
    """The processes that have not ended by themselves in that time; they are ended here."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(is_running, pids)):
        time.sleep(0.1)
    left = sorted(filter(is_running, pids))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


def is_running(pid: int) -> bool:
    """Whether it has not ended; one that has may wait for process 1 to take note of it."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_where_the_system_does_not_tell_the_cores_the_work_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert workers.each_tensor("work", {"a": 2, "b": 1}, str.upper) == {"a": "A", "b": "B"}


def test_without_forking_the_work_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MANY_FROM", 0)
    monkeypatch.setattr(workers, "_may_fork", lambda: False)
    assert workers.each_tensor("work", {"a": 2, "b": 1}, str.upper) == {"a": "A", "b": "B"}


def test_a_process_with_torch_does_not_fork(tmp_path: Path) -> None:
    found = told(
        """
        import torch
        done = each_tensor("work", {"a": 1, "b": 2}, lambda _: os.getpid())
        print(json.dumps(set(done.values()) == {os.getpid()}))
        """,
        tmp_path,
    )
    assert found is True
