"""`graft --scale`: a number as people write it, or chosen without labels and said why."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import Result
from tests.study.small import write_material
from typer.testing import CliRunner

from fedgraft.cli.main import app


def fedgraft(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny family, its `residual`, a `newer` base, and two `prompts.txt`."""
    folder = write_material(tmp_path_factory.mktemp("scale"))
    base, text = folder / "base", folder / "hr.jsonl"
    budget = ("--tokens", "12k", "--row-length", 64, "--learning-rate", 2e-3)
    for command in (
        ("residual", "extract", base, folder / "instruct", "--out", folder / "residual"),
        ("pretrain", base, "--data", text, "--out", folder / "newer", *budget),
    ):
        done = fedgraft(*command)
        assert done.exit_code == 0, done.output
    (folder / "prompts.txt").write_text("Who bakes?\nWhere is the mill?\n")
    return folder


def test_auto_shows_the_curve_the_choice_and_why(place: Path, tmp_path: Path) -> None:
    done = fedgraft(
        *("graft", place / "newer", place / "residual", "--out", tmp_path / "graft"),
        *("--scale", "auto", "--base", place / "base", "--data", place / "hr.jsonl"),
        *("--prompts", place / "prompts.txt"),
    )
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "graft" / "fedgraft.json").read_text())
    chosen = f"{record['settings']['scale']:g}"
    assert f"{chosen} <" in done.output
    assert f"scale {chosen} stays closest to the instruct model's answers" in done.output
    assert f"+ {chosen} x {place / 'residual'}" in done.output


def test_auto_says_what_it_lacks(place: Path, tmp_path: Path) -> None:
    command = ("graft", place / "newer", place / "residual", "--out", tmp_path / "graft")
    done = fedgraft(*command, "--scale", "auto", "--base", place / "base")
    assert done.exit_code == 1
    assert "for --scale auto, found no --data; name them, or a scale" in done.stderr
    done = fedgraft(*command, "--scale", "auto")
    assert "found no --base and --data" in done.stderr
    assert not (tmp_path / "graft").exists()


def test_a_scale_that_is_no_number_is_a_usage_error(place: Path, tmp_path: Path) -> None:
    command = ("graft", place / "newer", place / "residual", "--out", tmp_path / "graft")
    done = fedgraft(*command, "--scale", "automatic")
    assert done.exit_code == 2
    assert "expected a number or auto" in done.stderr
