"""base + adapter reads as the checkpoint that peft merges."""

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from fedgraft.errors import CheckpointError, FedgraftError, ResidualError
from fedgraft.models import open_model
from fedgraft.provenance import Record
from fedgraft.testing import save_tiny, tiny_tokenizer
from fedgraft.weights.adapted import Adapted
from fedgraft.weights.checkpoint import Checkpoint
from fedgraft.weights.family import Family
from fedgraft.weights.graft import graft
from fedgraft.weights.residual import extract

Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def adapt(
    base: Path,
    folder: Path,
    *,
    merged: Path | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Path:
    """Write a random adapter, and what peft merges it into."""
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], **options}
    model = get_peft_model(
        open_model(base, dtype=dtype), LoraConfig(task_type="CAUSAL_LM", **config)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    if merged:
        model.merge_and_unload().save_pretrained(merged)
        tiny_tokenizer().save_pretrained(merged)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny(tmp_path_factory.mktemp("base") / "base", tied=False)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    return adapt(base, folder / "adapter", merged=folder / "merged")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="two modules"),
        pytest.param({"target_modules": "all-linear"}, id="all linear"),
        pytest.param({"use_rslora": True, "layers_to_transform": [1]}, id="rank-stabilised"),
        pytest.param(
            {
                "target_modules": "all-linear",
                "rank_pattern": {"q_proj": 2, r".*0\.mlp\.up_proj": 7},
                "alpha_pattern": {"layers.1.mlp.down_proj": 3.5},
            },
            id="patterns",
        ),
        pytest.param({"modules_to_save": ["lm_head", "norm"]}, id="modules to save"),
        pytest.param({"bias": "all"}, id="all biases"),
        pytest.param({"bias": "lora_only"}, id="biases of the modules"),
        pytest.param({"target_modules": ["q_proj"], "lora_bias": True}, id="bias in B"),
        pytest.param({"target_modules": ["v_proj", "embed_tokens", "lm_head"]}, id="embeddings"),
    ],
)
def test_every_tensor_is_what_peft_merges(
    tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    base = save_tiny(tmp_path / "base", tied=False, dtype=dtype)
    adapter = adapt(base, tmp_path / "a", merged=tmp_path / "merged", dtype=dtype, **options)
    adapted, merged = Adapted(base, adapter), Checkpoint.open(tmp_path / "merged")
    assert _largest_difference(adapted, merged) <= 2 * torch.finfo(dtype).eps
    if dtype == torch.bfloat16 and "embed_tokens" not in options.get("target_modules", ""):
        assert adapted.content_hash == merged.content_hash
    assert adapted.content_hash != Checkpoint.open(base).content_hash


def test_layers_that_hold_inputs_by_outputs_are_what_peft_merges(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    adapter = adapt(
        tmp_path / "base",
        tmp_path / "a",
        merged=tmp_path / "merged",
        target_modules=["c_attn"],
        fan_in_fan_out=True,
    )
    adapted, merged = Adapted(tmp_path / "base", adapter), Checkpoint.open(tmp_path / "merged")
    assert _largest_difference(adapted, merged) <= 2**-22
    assert _largest_difference(adapted, adapted.base) > 0.01


@given(num_elements=st.integers(1, 4000), data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_numbers_do_not_depend_on_how_they_are_read(
    base: Path, adapter: Path, num_elements: int, data: st.DataObject
) -> None:
    adapted = Adapted(base, adapter)
    whole = adapted.read(f"{UP}.weight")
    blocks = [block.copy() for block in adapted.blocks(f"{UP}.weight", num_elements)]
    assert np.concatenate(blocks).tobytes() == whole.tobytes()
    picks = np.array(data.draw(st.lists(st.integers(-1, len(whole) - 1), min_size=1)))
    rows = [b.copy() for b in adapted.rows(f"{UP}.weight", picks, num_elements)]
    expected = np.where(picks[:, None] < 0, np.float32(0), whole[picks])
    assert np.concatenate(rows).tobytes() == expected.tobytes()


def test_a_row_that_is_missing_right_before_the_first_one_takes_nothing_from_it(
    base: Path, adapter: Path
) -> None:
    """-1 and 0 follow each other as numbers do, and are no run."""
    adapted = Adapted(base, adapter)
    whole = adapted.read(f"{UP}.weight")
    (rows,) = adapted.rows(f"{UP}.weight", np.array([-1, 0, 1, -1]), whole.size)
    assert np.array_equal(rows.reshape(4, -1), [0 * whole[0], whole[0], whole[1], 0 * whole[0]])


def test_a_large_layer_is_merged_group_of_rows_by_group(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(700, 300)).astype(ml_dtypes.bfloat16)
    low, high = (generator.normal(size=shape).astype("f4") for shape in ((3, 300), (700, 3)))
    base, adapter = _by_hand(tmp_path, weight, low, high)
    exact = weight.astype("f8") + 2.0 * (high.astype("f8") @ low.astype("f8"))
    found = Adapted(base, adapter).read(f"{Q}.weight").astype("f8")
    assert np.abs(found / exact - 1).max() <= 2**-8
    assert Adapted(base, adapter).content_hash == Adapted(base, adapter).content_hash


def test_a_weight_that_lies_beside_the_factors_stands_in_the_place_of_the_base(
    tmp_path: Path,
) -> None:
    low, high, weight = np.ones((3, 4), "f4"), np.ones((2, 3), "f4"), np.full((2, 4), 5, "f4")
    base, adapter = _by_hand(tmp_path, np.zeros_like(weight), low, high)
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.{Q}.base_layer.weight": weight}, file)
    assert np.array_equal(Adapted(base, adapter).read(f"{Q}.weight"), weight + 2.0 * high @ low)


def test_an_adapter_that_was_not_trained_changes_nothing(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(open_model(base), LoraConfig(r=2, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter")
    assert Adapted(base, tmp_path / "adapter").content_hash == Checkpoint.open(base).content_hash


def test_base_plus_adapter_is_the_instruct_side_of_a_family(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    adapted = Adapted(base, adapter)
    residual = extract(Family.open(base, adapted), tmp_path / "residual", form="packed")
    assert not np.any(residual.read("lm_head.weight"))
    grafted = Checkpoint.open(graft(base, residual, tmp_path / "grafted"))
    assert grafted.content_hash == adapted.content_hash
    newer = Adapted(base, adapter)
    assert extract(Family.open(newer, base), tmp_path / "back").base_hash == newer.content_hash


def test_a_base_with_an_adapter_is_a_newer_base_to_graft_onto(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    instruct = Adapted(base, adapt(base, tmp_path / "other", target_modules=["v_proj"]))
    newer = Adapted(base, adapter)
    graft(newer, extract(Family.open(base, instruct), tmp_path / "r"), tmp_path / "grafted")
    record = Record.read(tmp_path / "grafted")
    assert record
    assert record.ancestors == (Checkpoint.open(base).content_hash, newer.content_hash)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
        ({"a_setting_of_tomorrow": {"on": 1}}, "a_setting_of_tomorrow"),
        ({"r": None}, "TypeError"),
        ({"r": 5}, "expected factors of rank 5"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(
    base: Path, adapter: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_bytes()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        Adapted(base, folder)


@pytest.mark.parametrize(
    ("taken", "put", "error", "said"),
    [
        ("lora_B.weight", None, CheckpointError, f"'{Q}', found .*lora_A.* alone"),
        ("lora_A.weight", "lora_magnitude_vector", CheckpointError, "lora_magnitude_vector"),
        (
            "lora_A.weight",
            "lora_A.default.weight",
            CheckpointError,
            f"'{Q}', found .*lora_B.* alone",
        ),
        (None, "other.weight", ResidualError, r"q_proj.other.weight', which .* does not have"),
        (None, "rotary.inv_freq", CheckpointError, r"q_proj.rotary.inv_freq"),
    ],
)
def test_a_tensor_that_has_no_place_is_refused_by_name(
    base: Path,
    adapter: Path,
    tmp_path: Path,
    taken: str | None,
    put: str | None,
    error: type[FedgraftError],
    said: str,
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    if taken:
        del tensors[f"base_model.model.{Q}.{taken}"]
    if put:
        tensors[f"base_model.model.{Q}.{put}"] = np.zeros((4, 4), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(error, match=said):
        Adapted(base, folder)


def test_an_adapter_of_another_model_is_refused_by_the_tensor(
    adapter: Path, tmp_path: Path
) -> None:
    shallow = save_tiny(tmp_path / "shallow", num_layers=1)
    with pytest.raises(ResidualError, match=rf"'model.layers.1.*' *, which {shallow} does not"):
        Adapted(shallow, adapter)
    wide = save_tiny(tmp_path / "wide", "gemma", rows=400)
    other = adapt(save_tiny(tmp_path / "b", tied=False), tmp_path / "o", modules_to_save=["norm"])
    for folder in (other, adapter):
        tensors = load_file(folder / "adapter_model.safetensors")
        name = f"base_model.model.{Q}.lora_B.weight"
        copy = shutil.copytree(folder, tmp_path / f"copy of {folder.name}")
        save_file(tensors | {name: tensors[name][:-1]}, copy / "adapter_model.safetensors")
        with pytest.raises(ResidualError, match=rf"{Q}.weight' of shape \[32, 32\].*\[31, 32\]"):
            Adapted(wide, copy)


def test_an_adapter_is_bound_to_the_numbers_that_it_was_trained_on(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    known = Checkpoint.open(base).content_hash
    Record.make("adapter", inputs={"model": known}).write(folder)
    assert Adapted(base, folder).base.content_hash == known
    with pytest.raises(ResidualError, match=rf"trained on, {known[:19]}, found"):
        Adapted(save_tiny(tmp_path / "other", tied=False, seed=1), folder)


def test_an_adapter_on_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    tied = save_tiny(tmp_path / "base", tied=True)
    for kind in ("target_modules", "modules_to_save"):
        changes: dict[str, Any] = {kind: ["embed_tokens"]}
        adapter = adapt(tied, tmp_path / "adapter", **changes)
        with pytest.raises(ResidualError, match=r"embed_tokens.weight', which .* shares"):
            Adapted(tied, adapter)


def test_a_pickle_is_refused_and_so_is_what_is_no_adapter(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"found the pickle adapter_model.bin"):
        Adapted(base, tmp_path)
    with pytest.raises(CheckpointError, match=r"expected weights in adapter_model.safetensors"):
        Adapted(base, base)


def test_infinity_in_a_factor_is_refused_by_its_name(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[f"base_model.model.{Q}.lora_A.weight"][0, 0] = np.inf
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(FedgraftError, match=rf"base_model.model.{Q}.lora_A.weight"):
        Adapted(base, folder).read(f"{Q}.weight")


def _largest_difference(one: Checkpoint, other: Checkpoint) -> float:
    """Return the largest difference of two numbers, as a share of the largest of their tensor."""
    assert one.tensors.keys() == other.tensors.keys()
    pairs = [(one.read(n).astype("f8"), other.read(n).astype("f8")) for n in one.tensors]
    return max(float(np.abs(a - b).max() / (np.abs(b).max() or 1.0)) for a, b in pairs)


def _by_hand(folder: Path, weight: Any, low: Any, high: Any) -> tuple[Path, Path]:
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({f"{Q}.weight": weight}, base / "model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    factors = {f"base_model.model.{Q}.lora_{n}.weight": m for n, m in (("A", low), ("B", high))}
    save_file(factors, adapter / "adapter_model.safetensors")
    return base, adapter
