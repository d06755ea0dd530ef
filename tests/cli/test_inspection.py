"""`residual inspect`: the table, the forecast and the page, without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from tests.weights.checkpoints import nudged, random_tensors, save
from typer.testing import CliRunner

from fedgraft.cli.main import app
from fedgraft.weights.family import Family
from fedgraft.weights.residual import extract


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A base, what became of it by a little and by a lot of reading, and a residual."""
    base = random_tensors()
    for name, size in (("instruct", 2e-3), ("newer", 1e-4), ("newest", 2e-2)):
        save(tmp_path / name, nudged(base, seed=len(name), size=size))
    found = Family.open(save(tmp_path / "base", base), tmp_path / "instruct")
    extract(found, tmp_path / "residual")
    return tmp_path


def inspect(family: Path, *arguments: str) -> Result:
    places = [str(family / name) for name in ("residual", "base")]
    out = ["--out", str(family / "inspection")]
    return CliRunner().invoke(app, ["residual", "inspect", *places, *arguments, *out])


def test_the_forecast_comes_with_its_page_and_the_next_step(family: Path) -> None:
    done = inspect(family, "--newer-base", str(family / "newer"))
    assert done.exit_code == 0, done.output
    assert "expect the graft to hold" in done.stdout
    assert "\n all " in done.stdout
    assert f"inspection  {family / 'inspection' / 'inspection.html'}" in done.stdout
    assert f"fedgraft graft {family / 'newer'} {family / 'residual'}" in done.stdout
    figures = json.loads((family / "inspection" / "inspection.json").read_text())
    assert figures["forecast"]["outcome"] == "holds"


def test_where_the_graft_will_break_no_graft_is_proposed(family: Path) -> None:
    done = inspect(family, "--newer-base", str(family / "newest"))
    assert "expect the graft to lose instructions" in done.stdout
    assert "fedgraft graft" not in done.stdout


def test_without_a_newer_base_the_limit_is_told(family: Path) -> None:
    done = inspect(family)
    assert done.exit_code == 0, done.output
    assert "Name a newer base" in done.stdout


def test_another_base_is_one_message_and_leaves_nothing(family: Path) -> None:
    (family / "base").rename(family / "old")
    (family / "newer").rename(family / "base")
    done = inspect(family)
    assert done.exit_code == 1
    assert "expected the base" in done.stderr
    assert not (family / "inspection").exists()


def test_inspecting_and_drawing_load_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, fedgraft.report.inspection, fedgraft.weights.inspection\n"
        "print({'torch', 'transformers', 'matplotlib'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
