"""`graft` and `residual verify`: several residuals, one pass, methods and factors."""

from pathlib import Path

import pytest
from click.testing import Result
from tests.weights.checkpoints import nudged, random_tensors, save
from typer.testing import CliRunner

from fedgraft.cli.main import app
from fedgraft.provenance import Record
from fedgraft.weights.checkpoint import Checkpoint

BASE = random_tensors()


def fedgraft(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """`base` with two models tuned from it, `first` and `second`, and the residual of each."""
    base = save(tmp_path / "base", BASE)
    for seed, name in enumerate(("first", "second"), 1):
        tuned = save(tmp_path / name, nudged(BASE, seed=seed))
        done = fedgraft("residual", "extract", base, tuned, "--out", tmp_path / f"r-{name}")
        assert done.exit_code == 0, done.output
    return tmp_path


def settings(path: Path) -> dict[str, object]:
    record = Record.read(path)
    assert record
    return record.settings


def test_two_residuals_with_a_scale_each_by_a_method(place: Path) -> None:
    residuals = (place / "r-first", place / "r-second")
    ways = ("--method", "ties", "--density", 0.5, "--factor", "embedding=0", "--factor", "0-1=2")
    scales = ("--scale", 0.5, "--scale", 2)
    done = fedgraft("graft", place / "base", *residuals, "--out", place / "g", *scales, *ways)
    assert done.exit_code == 0, done.output
    assert f"{place / 'base'} + 0.5 x {residuals[0]} + 2 x {residuals[1]}" in done.output
    found = settings(place / "g")
    assert found["scale"] == [0.5, 2.0]
    assert found["method"] == {"name": "ties", "density": 0.5, "gamma": 0.01, "seed": 0}
    assert found["factors"] == {
        "kinds": {"embedding": 0.0},
        "layers": [{"first": 0, "last": 1, "factor": 2.0}],
    }


def test_one_pass_without_a_residual_is_read_back(place: Path) -> None:
    parents = ("--base", place / "base", "--instruct", place / "first")
    done = fedgraft("graft", place / "base", *parents, "--out", place / "g", "--verify")
    assert done.exit_code == 0, done.output
    assert f"+ 1 x ({place / 'first'} - {place / 'base'})" in done.output
    assert "read back as it was written" in done.output
    hashes = [Checkpoint.open(place / name).content_hash for name in ("g", "first")]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "expected RESIDUAL, or both --base and --instruct"),
        (("--base", "base"), "expected RESIDUAL, or both --base and --instruct"),
        (("r-first", "--scale", "much"), "expected a number or auto for --scale, found 'much'"),
        (("r-first", "r-second", "--scale", "auto"), "expected one RESIDUAL for --scale auto"),
    ],
)
def test_what_does_not_go_together_is_a_wrong_use(
    place: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(place)
    done = fedgraft("graft", "base", *options, "--out", "g")
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
    assert not (place / "g").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "ties", "--density", "2"), "above 0 and at most 1, found 2.0"),
        (("--factor", "embedding=much"), "found 'embedding=much'"),
        (("--factor", "9=0"), "expected layers from 0 to 1, found 9 to 9"),
    ],
)
def test_what_cannot_be_is_one_message(place: Path, options: tuple[str, ...], message: str) -> None:
    command = ("graft", place / "base", place / "r-first", "--out", place / "g", *options)
    done = fedgraft(*command)
    assert (done.exit_code, done.exception.__class__) == (1, SystemExit), done.output
    assert message in done.output
    assert not (place / "g").exists()


def test_verification_says_sound_or_ends_with_1(place: Path) -> None:
    parents = (place / "base", place / "first")
    done = fedgraft("residual", "verify", place / "r-first", *parents)
    assert done.exit_code == 0, done.output
    assert "base + residual restores 528 of 528" in done.output
    assert "sound" in done.output
    file = place / "r-first" / "residual.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 64
    file.write_bytes(data)
    done = fedgraft("residual", "verify", place / "r-first", *parents)
    assert done.exit_code == 1
    assert "ANOTHER" in done.output
    assert "restores 527 of 528" in done.output
    assert "1 not restored in model.layers.1.norm.weight" in done.output
    assert "extract it again from its parents" in done.output
