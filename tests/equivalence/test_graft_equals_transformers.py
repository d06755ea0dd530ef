"""A streamed graft is what transformers gives by adding state dicts: float32, rounded once."""

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedgraft.provenance import Record
from fedgraft.testing import ARCHITECTURES, Architecture, save_tiny, save_tiny_instruct
from fedgraft.weights.checkpoint import Checkpoint
from fedgraft.weights.family import Family
from fedgraft.weights.graft import graft
from fedgraft.weights.residual import extract
from fedgraft.weights.writer import write_tensors


def weights(path: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return dict(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_graft_equals_the_arithmetic_of_transformers_bit_for_bit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: Architecture,
    tied: bool,
    max_shard_size: str,
    dtype: torch.dtype,
) -> None:
    torch.set_num_threads(1)
    base = save_tiny(
        tmp_path / "base", architecture, tied=tied, dtype=dtype, max_shard_size=max_shard_size
    )
    instruct = save_tiny_instruct(base, tmp_path / "instruct", seed=1)
    target = save_tiny_instruct(base, tmp_path / "target", seed=2)
    Record.make("checkpoint", ancestors=(Checkpoint.open(base).content_hash,)).write(target)

    family = Family.open(base, instruct)
    extract(family, tmp_path / "residual")
    if max_shard_size == "20KB":
        in_shards = partial(write_tensors, max_shard_bytes=20_000)
        monkeypatch.setattr("fedgraft.weights.graft.write_tensors", in_shards)
    out = graft(target, tmp_path / "residual", tmp_path / "graft", scale=0.7)

    assert (out / "model.safetensors").exists() is (max_shard_size == "5GB")
    assert (base / "model.safetensors").exists() is (max_shard_size == "5GB")
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == dtype
    b, i, t = weights(base), weights(instruct), weights(target)
    for name, found in model.state_dict().items():
        expected = (t[name] + 0.7 * (i[name] - b[name])).to(dtype)
        assert torch.equal(found, expected), name
    assert family.num_parameters == sum(p.numel() for p in model.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    chat = [{"role": "user", "content": "the mill"}]
    assert AutoTokenizer.from_pretrained(out).apply_chat_template(chat)
