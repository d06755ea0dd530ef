"""A side of a family can be a model with an adapter on it."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import save_file
from tests.weights.checkpoints import random_tensors, save
from typer.testing import CliRunner

from fedgraft.cli.main import app
from fedgraft.weights.adapted import Adapted
from fedgraft.weights.checkpoint import Checkpoint
from fedgraft.weights.residual import Residual

UP = "model.layers.1.mlp.up_proj"


def fedgraft(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tmp_path / "base", random_tensors())


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    generator = np.random.default_rng(0)
    factors = {
        f"base_model.model.{UP}.lora_{name}.weight": generator.normal(0, 0.1, shape).astype("f4")
        for name, shape in (("A", (2, 8)), ("B", (12, 2)))
    }
    save_file(factors, folder / "adapter_model.safetensors")
    return folder


def test_the_difference_that_an_adapter_makes_is_extracted(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    out, back = tmp_path / "residual", tmp_path / "back"
    done = fedgraft("residual", "extract", base, base, "--instruct-adapter", adapter, "--out", out)
    assert done.exit_code == 0, done.output
    residual = Residual.open(out)
    assert residual.instruct_hash == Adapted(base, adapter).content_hash
    changed = [name for name in residual.tensors if np.any(residual.read(name))]
    assert changed == [f"{UP}.weight"]
    done = fedgraft("residual", "extract", base, base, "--base-adapter", adapter, "--out", back)
    assert done.exit_code == 0, done.output
    name = changed[0]
    assert np.array_equal(Residual.open(back).read(name), -residual.read(name))


def test_it_is_grafted_in_one_pass(tmp_path: Path, base: Path, adapter: Path) -> None:
    sides = ("--base", base, "--instruct", base, "--instruct-adapter", adapter)
    done = fedgraft("graft", base, *sides, "--out", tmp_path / "grafted")
    assert done.exit_code == 0, done.output
    assert f"1 x (({base} + {adapter}) - {base})" in done.output.replace("\n", "")
    found = Checkpoint.open(tmp_path / "grafted").content_hash
    assert found == Adapted(base, adapter).content_hash


@pytest.mark.parametrize("option", ["--base-adapter", "--instruct-adapter"])
def test_an_adapter_without_its_side_is_refused(
    tmp_path: Path, base: Path, adapter: Path, option: str
) -> None:
    out = tmp_path / "residual"
    fedgraft("residual", "extract", base, base, "--instruct-adapter", adapter, "--out", out)
    done = fedgraft("graft", base, out, option, adapter, "--out", tmp_path / "grafted")
    assert done.exit_code == 2
    assert "without RESIDUAL" in done.stderr
    sides = ("--base", base, "--instruct", base)
    done = fedgraft(
        "graft", base, *sides, option, adapter, "--scale", "auto", "--out", tmp_path / "grafted"
    )
    assert done.exit_code == 2
    assert "extract a RESIDUAL" in done.stderr.replace("\n", "")
