"""Synthetic checkpoints have the shapes of the real ones, and pass for a family."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from benchmarks.synthetic import SHAPES, Shape, write_base, write_update
from tokenizers import Tokenizer

from fedgraft.weights.checkpoint import Checkpoint
from fedgraft.weights.family import Family

SMALL = dataclasses.replace(
    SHAPES["8b"],
    config={
        **SHAPES["8b"].config,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "vocab_size": 400,
    },
    num_spelled=300,
    num_special=6,
)


@pytest.mark.parametrize(
    ("name", "num_parameters", "num_tensors"),
    [("0.5b", 494_032_768, 290), ("1.5b", 1_543_714_304, 338), ("8b", 8_030_261_248, 291)],
)
def test_a_shape_has_as_many_numbers_as_the_real_model(
    name: str, num_parameters: int, num_tensors: int
) -> None:
    layout = SHAPES[name].layout()
    assert sum(math.prod(shape) for _, shape in layout.values()) == num_parameters
    assert len(layout) == num_tensors


def test_the_tokenizer_is_one(tmp_path: Path) -> None:
    write_base(SMALL, tmp_path / "base")
    tokenizer = Tokenizer.from_file(str(tmp_path / "base" / "tokenizer.json"))
    text = "Hello, <|special_5|> there"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert 305 in ids
    assert tokenizer.get_vocab_size() == 306


def test_an_update_is_of_the_size_asked_for_and_makes_a_family(tmp_path: Path) -> None:
    family = _family(SMALL, tmp_path, relative=0.1)
    old, new = (
        checkpoint.read("model.embed_tokens.weight").astype(np.float32)
        for checkpoint in (family.base, family.instruct)
    )
    assert np.linalg.norm(new - old) / np.linalg.norm(old) == pytest.approx(0.1, rel=0.05)
    assert family.num_tokens == 306


def test_a_newer_base_is_recorded_as_a_descendant(tmp_path: Path) -> None:
    write_base(SMALL, tmp_path / "base")
    write_update(SMALL, tmp_path / "base", tmp_path / "newer", recorded=True)
    record = Checkpoint.open(tmp_path / "newer").record
    assert record
    assert record.ancestors == (Checkpoint.open(tmp_path / "base").content_hash,)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for run in ("first", "again"):
        _family(SMALL, tmp_path / run)
    for name in ("base", "instruct"):
        first, again = ((tmp_path / run / name).rglob("*.*") for run in ("first", "again"))
        assert {f.name: f.read_bytes() for f in first} == {f.name: f.read_bytes() for f in again}


def _family(shape: Shape, folder: Path, *, relative: float = 1e-3) -> Family:
    write_base(shape, folder / "base")
    write_update(shape, folder / "base", folder / "instruct", relative=relative)
    return Family.open(folder / "base", folder / "instruct")
