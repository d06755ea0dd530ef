"""`residual compress` says how small a residual became and what that cost."""

from pathlib import Path

import pytest
from click.testing import Result
from tests.weights.checkpoints import nudged, random_tensors, save
from typer.testing import CliRunner

from fedgraft.cli.main import app
from fedgraft.provenance import Record
from fedgraft.weights.family import Family
from fedgraft.weights.residual import Residual, extract


@pytest.fixture
def residual(tmp_path: Path) -> Path:
    base = random_tensors()
    family = Family.open(save(tmp_path / "base", base), save(tmp_path / "instruct", nudged(base)))
    return extract(family, tmp_path / "residual").path


def compress(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["residual", "compress", *map(str, arguments)])


def test_packed_is_what_it_does_unless_told(tmp_path: Path, residual: Path) -> None:
    result = compress(residual, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert Residual.open(tmp_path / "out").form == "packed"
    assert "times smaller than plain bfloat16" in result.output
    assert "nothing is lost" in result.output
    assert f"fedgraft graft NEWER_BASE {tmp_path / 'out'}" in result.output


def test_a_lossy_form_says_what_is_lost(tmp_path: Path, residual: Path) -> None:
    result = compress(residual, "--form", "lowrank", "--rank", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    lost = Residual.open(tmp_path / "out").record.figures["relative_error"]
    assert f"{lost:.1%} of the norm is lost" in result.output


def test_an_adapter_says_what_it_leaves_out(tmp_path: Path, residual: Path) -> None:
    result = compress(residual, "--form", "adapter", "--rank", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    record = Record.read(tmp_path / "out")
    assert record
    share = record.figures["share_left_out"]
    assert f"left out are embeddings, norms and biases: {share:.1%} of" in result.output
    assert f"fedgraft chat NEWER_BASE --adapter {tmp_path / 'out'}" in result.output


def test_an_impossible_rank_is_one_message(tmp_path: Path, residual: Path) -> None:
    result = compress(residual, "--form", "lowrank", "--rank", 99, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: expected a rank of 1 to 8")
    assert "Traceback" not in result.stderr
