"""base + PEFT adapter = base + low-rank residual, on a newer base too, as peft computes it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedgraft.testing import ARCHITECTURES, Architecture, save_tiny, save_tiny_instruct
from fedgraft.training.adapter import open_adapted
from fedgraft.weights.compression import compress, write_adapter
from fedgraft.weights.family import Family
from fedgraft.weights.residual import extract


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_on_a_newer_base_is_the_low_rank_residual_of_its_linear_layers(
    tmp_path: Path, architecture: Architecture
) -> None:
    torch.set_num_threads(1)
    base = save_tiny(tmp_path / "base", architecture)
    instruct = save_tiny_instruct(base, tmp_path / "instruct", seed=1)
    newer = save_tiny_instruct(base, tmp_path / "newer", seed=2)
    residual = extract(Family.open(base, instruct), tmp_path / "residual")
    small = compress(residual, tmp_path / "lowrank", "lowrank", rank=4)
    write_adapter(residual, tmp_path / "adapter", rank=4)

    plain = AutoModelForCausalLM.from_pretrained(newer)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    logits = adapted(torch.tensor([[1, 2, 3]])).logits
    merged = adapted.merge_and_unload()
    for name, found in merged.state_dict().items():
        expected = before[name]
        if name.endswith("_proj.weight"):
            expected = expected + torch.from_numpy(small.read(name))
            assert not torch.equal(found, before[name])
        assert torch.allclose(found, expected, atol=1e-7), name
    assert torch.allclose(merged(torch.tensor([[1, 2, 3]])).logits, logits, atol=1e-5)


def test_it_opens_where_adapters_of_departments_open(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    base = save_tiny(tmp_path / "base")
    instruct = save_tiny_instruct(base, tmp_path / "instruct", seed=1)
    newer = save_tiny_instruct(base, tmp_path / "newer", seed=2)
    residual = extract(Family.open(base, instruct), tmp_path / "residual")
    write_adapter(residual, tmp_path / "adapter", rank=4)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        logits = open_adapted(newer, tmp_path / "adapter")(ids).logits.numpy()
        alone = AutoModelForCausalLM.from_pretrained(newer)(ids).logits.numpy()
    assert np.abs(logits - alone).max() > 1e-4
