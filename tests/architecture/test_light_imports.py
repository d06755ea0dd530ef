"""A command answers at once: nothing heavy is loaded before it is needed."""

import json
import statistics
import subprocess
import sys
import time

import pytest

HEAVY = ["torch", "transformers", "peft", "matplotlib", "huggingface_hub", "datasets", "sklearn"]


def loaded_by(code: str) -> set[str]:
    """The heavy libraries in `sys.modules` after some code has run in a new process."""
    report = f"\nimport json, sys; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_fedgraft_loads_nothing_heavy() -> None:
    assert loaded_by("import fedgraft; dir(fedgraft)") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["study", "run", "--help"], ["graft", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom fedgraft.cli.main import app\n"
        f"try: app({arguments})\nexcept SystemExit as end: assert not end.code"
    )
    assert loaded_by(code) == set()


def test_weights_work_without_torch() -> None:
    assert loaded_by("from fedgraft import Checkpoint, Family, Residual, extract, graft") == set()


def test_help_takes_less_than_half_a_second() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "fedgraft.cli.main", "--help"], capture_output=True, check=True
        )
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 0.5, seconds
