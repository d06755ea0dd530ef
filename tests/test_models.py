"""Models are opened from safetensors alone, and saved with the same bytes each time."""

import json
from pathlib import Path

import pytest
import torch

from fedgraft.errors import ArtefactError, CheckpointError
from fedgraft.models import open_model, open_tokenizer, save_model, saving
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


def test_weights_are_opened_in_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    assert {p.dtype for p in open_model(source).parameters()} == {torch.float32}


def test_a_place_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    for opening in (open_model, open_tokenizer):
        with pytest.raises(CheckpointError, match="found no such directory; name one that holds"):
            opening(tmp_path / "none")


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "pickle")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="expected a causal language model in safetensors"):
        open_model(folder)


def test_code_that_ships_with_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(CheckpointError):
        open_model(folder)
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
