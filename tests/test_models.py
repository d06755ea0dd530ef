"""Models are opened from safetensors alone, and saved with the same bytes each time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, T5Config, T5Model, ViTConfig, ViTModel

from fedgraft.errors import ArtefactError, CheckpointError
from fedgraft.models import (
    fresh_model,
    open_encoder,
    open_model,
    open_tokenizer,
    save_model,
    saving,
)
from fedgraft.testing import ARCHITECTURES, Architecture, save_tiny, tiny_tokenizer


def test_a_model_saved_and_opened_is_the_same(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    for name in ("one", "two"):
        save_model(
            open_model(source, dtype=torch.bfloat16), open_tokenizer(source), tmp_path / name
        )
    again = open_model(tmp_path / "one", dtype=torch.bfloat16)
    for one, two in zip(
        again.parameters(), open_model(source, dtype=torch.bfloat16).parameters(), strict=True
    ):
        assert torch.equal(one, two)
    assert not again.training
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert open_tokenizer(tmp_path / "one").chat_template == tiny_tokenizer().chat_template
    assert again.generation_config.eos_token_id == [0, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="tells Linux's C library")
def test_a_process_that_opened_a_model_takes_the_same_memory_again_without_page_faults(
    tmp_path: Path,
) -> None:
    batches = """
import resource, sys, torch
from fedgraft.models import open_model

open_model(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.zeros(16 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    source = save_tiny(tmp_path / "source")
    asked = subprocess.run(
        [sys.executable, "-c", batches, str(source)], capture_output=True, text=True, check=True
    )
    once = 16 * 2**20 * 4 // 4096
    assert int(asked.stdout) < 2 * once  # given back each time, 20 times as many


def test_weights_are_opened_in_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    assert {p.dtype for p in open_model(source).parameters()} == {torch.float32}


def test_a_place_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    for opening in (open_model, open_encoder, open_tokenizer):
        with pytest.raises(CheckpointError, match="found no such directory; name one that holds"):
            opening(tmp_path / "none")


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "pickle")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="expected a causal language model in safetensors"):
        open_model(folder)
    with pytest.raises(CheckpointError, match="or a sentence encoder in safetensors that transf"):
        open_encoder(folder)


def with_other_tensors(source: Path, how: str) -> Path:
    """A checkpoint whose weights are not those of its config, in one way."""
    file, settings = source / "model.safetensors", source / "config.json"
    tensors, config = load_file(file), json.loads(settings.read_text())
    one = "model.layers.0.mlp.up_proj.weight"
    match how:
        case "missing":
            del tensors[one]
        case "output layer missing":
            config["tie_word_embeddings"] = False
        case "left over":
            config["num_hidden_layers"] -= 1
            config["layer_types"] = config.get("layer_types", [])[:-1] or None
        case "of another shape":
            tensors[one] = tensors[one][:3].clone()
        case "cut":
            file.write_bytes(file.read_bytes()[:-100])
            return source
    save_file(tensors, file, metadata={"format": "pt"})
    settings.write_text(json.dumps(config))
    return source


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "expected model.layers.0.mlp.up_proj.weight among the weights, .* found it mi"),
        ("output layer missing", "expected lm_head.weight among the weights"),
        ("left over", r"found model.layers.1.\S+ too, and \d+ others; take config.json and weigh"),
        ("of another shape", r"up_proj.weight of shape \[\d+, \d+\], .* found \[3, \d+\]; take"),
        ("cut", "in safetensors that transformers can open, found: .*incomplete"),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused_not_filled_with_random_ones(
    how: str, message: str, tmp_path: Path
) -> None:
    source = with_other_tensors(save_tiny(tmp_path / "source", num_layers=2), how)
    with pytest.raises(CheckpointError, match=message):
        open_model(source)
    if how == "output layer missing":
        open_encoder(source)  # which has no use for it
    else:
        with pytest.raises(CheckpointError, match=message.replace("model.layers", ".*layers")):
            open_encoder(source)


def test_what_older_checkpoints_hold_besides_is_no_fault(tmp_path: Path) -> None:
    """Rotary frequencies of each layer, and a tied output layer, written out."""
    source = save_tiny(tmp_path / "source", "llama")
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    assert open_model(source).num_parameters() > 0
    open_encoder(source)


def test_code_that_ships_with_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for opening in (open_model, open_encoder):
        with pytest.raises(CheckpointError):
            opening(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_without_its_tokenizer_is_refused_with_the_remedy(
    tmp_path: Path, architecture: Architecture
) -> None:
    folder = save_tiny(tmp_path / "model", architecture)
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="copy the tokenizer's files of the original model"):
        open_tokenizer(folder)


def test_a_failed_write_is_one_message_with_its_remedy(tmp_path: Path) -> None:
    expected = pytest.raises(ArtefactError, match=r"could not write .*: cut off\. Is the disk full")
    with expected, saving(tmp_path):
        raise RuntimeError("cut off\nat frame 17")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_encoder_is_the_model_without_its_output_layer(
    tmp_path: Path, architecture: Architecture
) -> None:
    folder = save_tiny(tmp_path / "model", architecture, tied=False)
    encoder, model = open_encoder(folder), open_model(folder)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        expected = model(ids, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(encoder(ids).last_hidden_state, expected)
    assert not any("lm_head" in name for name, _ in encoder.named_parameters())
    assert not encoder.training


def tiny_bert(folder: Path) -> Path:
    BertModel(
        BertConfig(
            vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_a_sentence_encoder_is_opened_as_it_was_saved(tmp_path: Path) -> None:
    encoder = open_encoder(tiny_bert(tmp_path / "bert"))
    assert type(encoder).__name__ == "BertModel"
    assert not encoder.training
    named = load_file(tmp_path / "bert" / "model.safetensors")
    assert all(torch.equal(value, named[name]) for name, value in encoder.named_parameters())


def test_what_reads_and_writes_or_looks_at_pictures_is_no_encoder(tmp_path: Path) -> None:
    T5Model(
        T5Config(vocab_size=320, d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4)
    ).save_pretrained(tmp_path / "t5")
    with pytest.raises(CheckpointError, match="found T5Model, which reads and writes"):
        open_encoder(tmp_path / "t5")
    ViTModel(
        ViTConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            image_size=32,
        )
    ).save_pretrained(tmp_path / "vit")  # fmt: skip
    with pytest.raises(CheckpointError, match="found ViTModel, which does not read text alone"):
        open_encoder(tmp_path / "vit")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_model_has_the_build_of_another_and_none_of_its_numbers(
    tmp_path: Path, architecture: Architecture
) -> None:
    folder = save_tiny(tmp_path / "model", architecture, dtype=torch.bfloat16)
    old = open_model(folder, dtype=torch.bfloat16).state_dict()
    new = fresh_model(folder, {}, seed=1).state_dict()
    assert {n: (t.shape, t.dtype) for n, t in new.items()} == {
        n: (t.shape, t.dtype) for n, t in old.items()
    }
    embedding = next(name for name in old if name.endswith("embed_tokens.weight"))
    assert not torch.equal(new[embedding], old[embedding])
    assert torch.equal(fresh_model(folder, {}, seed=1).state_dict()[embedding], new[embedding])
    assert not torch.equal(fresh_model(folder, {}, seed=2).state_dict()[embedding], new[embedding])


def test_a_fresh_model_of_other_sizes_ends_its_answers_as_the_first_one_does(
    tmp_path: Path,
) -> None:
    folder = save_tiny(tmp_path / "model")
    model = fresh_model(folder, {"num_hidden_layers": 3, "intermediate_size": 48}, seed=1)
    assert model.config.num_hidden_layers == 3
    assert model.generation_config.eos_token_id == [0, 2]
    assert sum("mlp.up_proj" in name for name in model.state_dict()) == 3
    save_model(model, open_tokenizer(folder), tmp_path / "fresh")
    assert open_model(tmp_path / "fresh").config.num_hidden_layers == 3


def test_a_fresh_model_leaves_the_dice_of_others_alone(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    fresh_model(folder, {}, seed=1)
    assert torch.equal(torch.rand(1), expected)


def test_sizes_of_a_fresh_model_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    with pytest.raises(CheckpointError, match="found: 33 numbers for 4 heads alike; correct the"):
        fresh_model(folder, {"hidden_size": 33}, seed=1)
    with pytest.raises(CheckpointError, match="found no such directory"):
        fresh_model(tmp_path / "nowhere", {}, seed=1)
