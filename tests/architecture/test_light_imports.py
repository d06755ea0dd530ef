"""A command answers at once: nothing heavy is loaded before it is needed."""

import json
import resource
import statistics
import subprocess
import sys

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
    """Counted in processor time, which does not depend on what else the machine is doing."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "fedgraft.cli.main", "--help"], capture_output=True, check=True
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert statistics.median(seconds) < 0.5, seconds
