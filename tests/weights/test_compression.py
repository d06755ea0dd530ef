"""A residual in few bytes says what it lost, and grafts like any other."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.weights.checkpoints import Tensors, nudged, random_tensors, save

from fedgraft.errors import ArtefactError, ResidualError
from fedgraft.provenance import Record
from fedgraft.weights.compression import SmallForm, compress, write_adapter
from fedgraft.weights.family import Family
from fedgraft.weights.graft import graft
from fedgraft.weights.residual import Form, Residual, extract

EMBEDDING = "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.norm.weight"
LOSSY: tuple[SmallForm, ...] = ("lowrank", "sign", "int8", "sparse")


@pytest.fixture
def base() -> Tensors:
    return random_tensors()


@pytest.fixture
def residual(tmp_path: Path, base: Tensors) -> Residual:
    return extracted(tmp_path, base, nudged(base))


def extracted(folder: Path, base: Tensors, instruct: Tensors, form: Form = "float32") -> Residual:
    family = Family.open(save(folder / "base", base), save(folder / "instruct", instruct))
    return extract(family, folder / "residual", form=form)


def relative_error(small: Residual, whole: Residual) -> float:
    lost = [np.square(small.read(n) - whole.read(n).astype(float)).sum() for n in whole.tensors]
    total = [np.square(whole.read(name).astype(float)).sum() for name in whole.tensors]
    return float(np.sqrt(sum(lost) / sum(total)))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "auto", "packed"])
def test_packed_has_the_same_numbers_whatever_the_form_before(
    tmp_path: Path, base: Tensors, stored: Form
) -> None:
    residual = extracted(tmp_path, base, nudged(base), stored)
    small = compress(residual, tmp_path / "packed", "packed")
    assert small.form == "packed"
    for name in residual.tensors:
        before = residual.read(name).astype(np.float32)
        assert small.read(name).tobytes() == before.tobytes()
    assert small.record.figures["relative_error"] == 0
    assert small.relative_norm == residual.relative_norm
    assert small.record.figures["num_not_restored"] == residual.record.figures["num_not_restored"]


def test_packed_carries_exceptions_along(tmp_path: Path, base: Tensors) -> None:
    instruct = nudged(base)
    base[NORM][0], instruct[NORM][0] = 1.0, 2.0**-30
    residual = extracted(tmp_path, base, instruct, "auto")
    assert residual.exceptions[NORM].index.tolist() == [0]
    small = compress(residual, tmp_path / "packed", "packed")
    assert small.exceptions[NORM].index.tolist() == [0]
    assert not compress(residual, tmp_path / "int8", "int8").exceptions


@pytest.mark.parametrize("form", LOSSY)
def test_the_record_states_bytes_norm_and_error(
    tmp_path: Path, residual: Residual, form: SmallForm
) -> None:
    small = compress(residual, tmp_path / form, form, rank=3, density=0.2)
    figures, settings = small.record.figures, small.record.settings
    assert figures["relative_error"] == pytest.approx(relative_error(small, residual), rel=1e-4)
    assert 0.001 < figures["relative_error"] < 1
    assert figures["num_bytes"] == small.num_bytes
    norms = [
        np.sqrt(sum(np.square(r.read(name).astype(float)).sum() for name in r.tensors))
        for r in (small, residual)
    ]
    expected = residual.relative_norm * norms[0] / norms[1]
    assert small.relative_norm == pytest.approx(expected, rel=1e-4)
    assert (settings["form"], small.form) == (form, form)
    assert settings.get("rank") == (3 if form == "lowrank" else None)
    assert settings.get("density") == (0.2 if form == "sparse" else None)
    assert small.record.inputs["residual"] == residual.content_hash
    assert (small.base_hash, small.instruct_hash) == (residual.base_hash, residual.instruct_hash)


@pytest.mark.parametrize("form", LOSSY)
def test_tensors_of_one_dimension_stay_exact(
    tmp_path: Path, residual: Residual, form: SmallForm
) -> None:
    small = compress(residual, tmp_path / form, form, rank=3)
    assert small.read(NORM).tobytes() == residual.read(NORM).tobytes()
    assert small.read(UP).tobytes() != residual.read(UP).tobytes()


def test_sign_leaves_the_embedding_and_the_output_layer_exact(
    tmp_path: Path, residual: Residual
) -> None:
    small = compress(residual, tmp_path / "sign", "sign")
    for name in (EMBEDDING, "lm_head.weight"):
        assert small.read(name).tobytes() == residual.read(name).tobytes()
    assert len(np.unique(small.read(UP))) == 2


def test_sparse_keeps_exactly_the_largest_numbers(tmp_path: Path, residual: Residual) -> None:
    small = compress(residual, tmp_path / "sparse", "sparse", density=0.3)
    before, after = residual.read(UP).reshape(-1), small.read(UP).reshape(-1)
    order = np.argsort(-np.abs(before), kind="stable")  # equal ones: the first in the tensor
    kept = order[: round(0.3 * before.size)]
    expected = np.zeros_like(before)
    expected[kept] = before[kept]
    assert after.tobytes() == expected.tobytes()


def test_a_density_of_one_keeps_all(tmp_path: Path, residual: Residual) -> None:
    assert compress(residual, tmp_path / "all", "sparse", density=1.0).record.figures[
        "relative_error"
    ] == pytest.approx(0)


def test_the_full_rank_loses_next_to_nothing(tmp_path: Path, residual: Residual) -> None:
    small = compress(residual, tmp_path / "full", "lowrank", rank=8)
    assert small.record.figures["relative_error"] < 1e-5


@pytest.mark.parametrize("form", ["packed", *LOSSY])
def test_the_same_residual_gives_the_same_bytes(
    tmp_path: Path, residual: Residual, form: SmallForm
) -> None:
    written = []
    for name in ("one", "other"):
        compress(residual, tmp_path / name, form, rank=2)
        files = sorted(file for file in (tmp_path / name).rglob("*") if file.is_file())
        written.append([(file.relative_to(tmp_path / name), file.read_bytes()) for file in files])
    assert written[0] == written[1]


@pytest.mark.parametrize("form", ["packed", *LOSSY])
def test_any_form_is_grafted(
    tmp_path: Path, residual: Residual, base: Tensors, form: SmallForm
) -> None:
    small = compress(residual, tmp_path / form, form, rank=2)
    grafted = load_file(graft(tmp_path / "base", small, tmp_path / "out") / "model.safetensors")
    for name, tensor in base.items():
        total = tensor.astype(np.float32) + small.read(name)
        assert grafted[name].tobytes() == total.astype(tensor.dtype).tobytes()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "template of instruct"


def test_an_embedding_with_rows_that_the_base_has_not_stays_exact(tmp_path: Path) -> None:
    residual = extracted(tmp_path, random_tensors(rows=18), random_tensors(seed=1, rows=20))
    assert residual.whole_rows.tolist() == [18, 19]
    small = compress(residual, tmp_path / "int8", "int8")
    assert small.whole_rows.tolist() == residual.whole_rows.tolist()
    assert small.read(EMBEDDING).tobytes() == residual.read(EMBEDDING).tobytes()


@pytest.mark.parametrize("rank", [0, -1, 9])
def test_a_rank_that_no_matrix_has_is_refused_with_the_bound(
    tmp_path: Path, residual: Residual, rank: int
) -> None:
    message = rf"expected a rank of 1 to 8, the smaller side of .* \[\d+, 8\], found {rank}; choose"
    with pytest.raises(ResidualError, match=message):
        compress(residual, tmp_path / "out", "lowrank", rank=rank)
    with pytest.raises(ResidualError, match=message):
        write_adapter(residual, tmp_path / "out", rank=rank)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("density", [0.0, -0.1, 2.0, float("nan")])
def test_a_density_that_is_no_share_is_refused(
    tmp_path: Path, residual: Residual, density: float
) -> None:
    message = f"above 0 and at most 1, the share of numbers that is kept, found {density}; 0.1 keep"
    with pytest.raises(ResidualError, match=message):
        compress(residual, tmp_path / "out", "sparse", density=density)


def test_an_unknown_form_is_refused(tmp_path: Path, residual: Residual) -> None:
    with pytest.raises(ResidualError, match=r"expected a form among packed, .*, found 'int4'"):
        compress(residual, tmp_path / "out", "int4")  # type: ignore[arg-type]


def test_a_damaged_residual_is_not_passed_on(tmp_path: Path, residual: Residual) -> None:
    file = residual.path / "residual.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ResidualError, match="the files were damaged or changed"):
        compress(residual, tmp_path / "out", "packed")
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_kept_unless_told(tmp_path: Path, residual: Residual) -> None:
    compress(residual, tmp_path / "out", "packed")
    with pytest.raises(ArtefactError, match="exists already"):
        compress(residual, tmp_path / "out", "int8")
    assert compress(residual, tmp_path / "out", "int8", overwrite=True).form == "int8"


def test_an_adapter_has_the_factors_of_the_low_rank_form(
    tmp_path: Path, residual: Residual
) -> None:
    write_adapter(residual, tmp_path / "adapter", rank=3)
    small = compress(residual, tmp_path / "lowrank", "lowrank", rank=3)
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(found) == 4
    stem = f"base_model.model.{UP.removesuffix('.weight')}.lora_"
    product = found[f"{stem}B.weight"] @ found[f"{stem}A.weight"]
    assert product == pytest.approx(small.read(UP), rel=1e-4, abs=1e-8)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_bytes())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 3, ["up_proj"])
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "fedgraft.json",
    ]


def test_an_adapters_record_says_what_it_leaves_out(tmp_path: Path, residual: Residual) -> None:
    record = write_adapter(residual, tmp_path / "adapter", rank=8)
    assert Record.read(tmp_path / "adapter") == record
    squares = {n: np.square(residual.read(n).astype(float)).sum() for n in residual.tensors}
    left_out = sum(square for name, square in squares.items() if "_proj" not in name)
    share = left_out / sum(squares.values())
    assert record.figures["share_left_out"] == pytest.approx(share, rel=1e-4)
    assert record.figures["relative_error"] == pytest.approx(np.sqrt(share), rel=1e-4)
    assert record.inputs == {"base": residual.base_hash, "residual": residual.content_hash}


def test_a_model_without_linear_layers_has_no_adapter(tmp_path: Path) -> None:
    base = {name: t for name, t in random_tensors().items() if "_proj" not in name}
    residual = extracted(tmp_path, base, nudged(base))
    with pytest.raises(ResidualError, match=r"expected linear layers, .* found none among 4 tens"):
        write_adapter(residual, tmp_path / "adapter")


def test_a_residual_read_from_elsewhere_is_the_same(tmp_path: Path, residual: Residual) -> None:
    small = compress(residual, tmp_path / "int8", "int8")
    shutil.move(tmp_path / "int8", tmp_path / "moved")
    moved = Residual.open(tmp_path / "moved")
    moved.refuse_damage()
    assert moved.content_hash == small.record.figures["content"]
