"""Laws of several processes: they train the same model, and a run may go on with other numbers.

Real processes, started by `torchrun` as a user would, on CPUs, with torch's own FSDP2.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.test_main import fedgraft

from fedgraft.errors import CorpusError, TrainingError
from fedgraft.provenance import Record
from fedgraft.testing import TEXT, save_tiny
from fedgraft.text.rows import Rows
from fedgraft.training.processes import run_together
from fedgraft.training.settings import PretrainSettings
from fedgraft.training.trainer import steps_of

ARGUMENTS = [
    *("--tokens", "6000", "--row-length", "64", "--batch-tokens", "512", "--schedule", "constant"),
    *("--learning-rate", "1e-3", "--precision", "float32", "--checkpoint-every", "4"),
]
TOLERANCE = 2e-4
"""Nats per target between loss curves: sums are taken in another order."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    save_tiny(folder / "model")
    lines = [json.dumps({"text": f"{n}. {TEXT[n % 3]}"}) for n in range(60)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    done = fedgraft("pretrain", *files(place, "alone"), *ARGUMENTS)
    assert done.exit_code == 0, done.output
    return place / "alone"


def files(place: Path, out: str) -> list[str]:
    return [str(place / "model"), "--data", str(place / "text.jsonl"), "--out", str(place / out)]


def start(
    place: Path, out: str, *more: str, processes: int = 2, stop_at: int | None = None
) -> "subprocess.Popen[str]":
    """Start `fedgraft pretrain`; the first process kills itself at the step `stop_at`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    module = ["-m", "fedgraft"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if stop_at is not None:
        script = place / f"stop-{stop_at}.py"
        script.write_text(STOPPING.format(step=stop_at))
        module = [str(script)]
    command = [*launcher, "--master-port", str(port()), *module]
    return subprocess.Popen(
        [*command, "pretrain", *files(place, out), *ARGUMENTS, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


STOPPING = """
import os, signal
from transformers import TrainerCallback
from fedgraft.training import trainer
class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == {step} and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
init = trainer._Trainer.__init__
def with_stop(self, *args, **kwargs):
    init(self, *args, **kwargs)
    self.add_callback(Stop())
trainer._Trainer.__init__ = with_stop
from fedgraft.cli.main import main
main()
"""
"""The command line, in a process that is killed at the begin of a step."""


def port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def finish(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def losses(out: Path) -> list[float]:
    record = Record.read(out)
    assert record
    return [loss for _, loss in record.figures["losses"]]


def assert_alike(one: Path, two: Path) -> None:
    assert losses(one) == pytest.approx(losses(two), abs=TOLERANCE)
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=1e-3)


def test_two_processes_with_a_sharded_model_train_what_one_trains(place: Path, alone: Path) -> None:
    said = finish(start(place, "sharded", "--budget", "3000", "--shard"))
    assert said.count("checkpoint  ") == 1, "more than the first process spoke"
    assert_alike(alone, place / "sharded")
    assert losses(alone)[-1] < losses(alone)[0] - 0.3
    assert (place / "sharded-3000" / "model.safetensors").exists()
    assert not list(place.glob(".sharded*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, True), (1, False)), ((1, False), (2, True)), ((2, False), (2, True))],
    ids=["two sharded, then one", "one, then two sharded", "two whole, then two sharded"],
)
def test_a_run_that_was_killed_goes_on_with_another_number_of_processes(
    place: Path, alone: Path, before: tuple[int, bool], after: tuple[int, bool]
) -> None:
    out = f"from-{before[0]}{before[1]}-to-{after[0]}{after[1]}"
    killed = start(place, out, *["--shard"] * before[1], processes=before[0], stop_at=6)
    output, _ = killed.communicate(timeout=300)
    assert killed.returncode, "a run that lost a worker must not end well"
    assert "SIGKILL" in output
    assert not (place / out).exists()
    assert [step.name for step in place.glob(f".{out}.training-*/checkpoint-*")] == ["checkpoint-4"]
    finish(start(place, out, *["--shard"] * after[1], processes=after[0]))
    assert_alike(alone, place / out)


@pytest.mark.slow
def test_a_lost_worker_ends_the_run_and_loses_at_most_the_steps_since_the_last_checkpoint(
    place: Path, alone: Path
) -> None:
    run = start(place, "lost", "--shard")
    deadline = time.monotonic() + 200
    while not list(place.glob(".lost.training-*/checkpoint-4/trainer_state.json")):
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = subprocess.run(
        ["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(workers[1]), signal.SIGKILL)
    run.communicate(timeout=200)
    assert run.returncode
    assert not (place / "lost").exists()
    finish(start(place, "lost", "--shard"))
    assert_alike(alone, place / "lost")


def complain() -> None:
    if os.environ["RANK"] == "1":
        raise CorpusError(f"found {os.environ['WORLD_SIZE']} of us")


def vanish() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


def wait_long() -> None:
    (Path(os.environ["FEDGRAFT_TEST_PLACE"]) / str(os.getpid())).touch()
    time.sleep(600)


@pytest.mark.slow
def test_the_processes_of_a_study_that_is_killed_end_with_it(tmp_path: Path) -> None:
    """In the background of a shell script, where an interrupt is ignored."""
    study = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from fedgraft.training.processes import run_together\n"
        "from tests.training.test_processes import wait_long\n"
        "run_together(2, wait_long)"
    )
    environment = {**os.environ, "FEDGRAFT_TEST_PLACE": str(tmp_path)}
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", study], env=environment, cwd=root)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2:
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    ours = [int(place.name) for place in tmp_path.iterdir()]
    while any(Path(f"/proc/{one}").exists() for one in ours):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "error", "words"),
    [
        (complain, CorpusError, "^found 2 of us$"),
        (vanish, TrainingError, "process 1 ended: .*SIGKILL; run the same command again"),
    ],
)
def test_what_ends_one_of_the_processes_of_a_study_is_told_in_the_study(
    work: Callable[[], None], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        run_together(2, work)


def test_rows_that_do_not_share_out_are_refused(
    rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = PretrainSettings(
        num_tokens=6000, learning_rate=1e-3, batch_tokens=512, micro_batch_rows=8
    )
    words = "the 8 rows of a step, found 8 in each of 2 processes; choose a divisor"
    with pytest.raises(TrainingError, match=words):
        steps_of(6000, rows, settings)
