"""A shape knows every tensor of a model from its sizes alone."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedgraft.errors import StudyError
from fedgraft.study.shape import Shape
from fedgraft.testing import ARCHITECTURES, Architecture, save_tiny, tiny_model
from fedgraft.weights.checkpoint import Checkpoint

QWEN2 = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131_072,
}
LLAMA3 = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("sizes", "parameters", "tensors"),
    [(QWEN2, 494_032_768, 290), (LLAMA3, 8_030_261_248, 291)],
    ids=["Qwen2 0.5B", "Llama 3 8B"],
)
def test_known_models_have_the_parameters_that_they_are_known_for(
    sizes: dict[str, Any], parameters: int, tensors: int
) -> None:
    shape = Shape.model_validate(sizes)
    assert shape.num_parameters == parameters
    assert len(shape.tensors) == tensors


def test_lora_of_rank_8_on_qwen2_has_4_4_million_parameters() -> None:
    assert Shape.model_validate(QWEN2).adapter_parameters(8) == 4_399_104


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_tensors_of_a_shape_are_those_that_transformers_makes(
    architecture: Architecture, tied: bool, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(save_tiny(tmp_path / "model", architecture, tied=tied))
    shape = Shape.of(checkpoint)
    assert shape.tensors == {name: info.shape for name, info in checkpoint.tensors.items()}
    assert shape.num_parameters == tiny_model(architecture, tied=tied).num_parameters()


def test_another_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_tiny(tmp_path / "model"))
    checkpoint.config["model_type"] = "mamba"
    with pytest.raises(StudyError, match=r"planned for \(qwen2, llama, mistral, gemma\), found mo"):
        Shape.of(checkpoint)


def test_a_tensor_that_the_config_does_not_lead_to_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_tiny(tmp_path / "model"))
    checkpoint.config["num_hidden_layers"] = 3
    message = (
        r"expected tensor 'model.layers.2.input_layernorm.weight' with shape \[32\], found none"
    )
    with pytest.raises(StudyError, match=message):
        Shape.of(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads to divide num_attention_heads, found 3 "),
        ({"hidden_size": 900}, "num_attention_heads to divide hidden_size, found 14 and 900"),
        ({"hiden_size": 1}, "Extra inputs are not permitted"),
        ({"num_hidden_layers": 0}, "greater than 0"),
    ],
)
def test_sizes_that_no_model_has_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Shape.model_validate(QWEN2 | change)
