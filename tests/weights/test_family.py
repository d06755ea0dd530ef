"""Two checkpoints are one family, or the first difference is named with both values."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.weights.checkpoints import TOKENS, Tensors, nudged, random_tensors, save

from fedgraft.errors import CheckpointError, FamilyError
from fedgraft.weights.family import Family

UP = "model.layers.1.mlp.up_proj.weight"


def test_a_base_and_its_instruct_model_are_one_family(tmp_path: Path) -> None:
    tensors = random_tensors()
    family = Family.open(
        save(tmp_path / "base", tensors), save(tmp_path / "instruct", nudged(tensors), num_shards=2)
    )
    assert family.describe() == [
        ("architecture", "LlamaForCausalLM"),
        ("parameters", "528"),
        ("tensors", "6, BF16"),
        ("layers", "2 of 8"),
        ("tokens", "18 in 20 rows"),
        ("embeddings", "not tied"),
    ]


def test_tied_embeddings_are_counted_once(tmp_path: Path) -> None:
    tensors = random_tensors(tied=True)
    folders = [save(tmp_path / x, tensors, tie_word_embeddings=True) for x in ("base", "instruct")]
    family = Family.open(*folders)
    assert family.num_parameters == sum(tensor.size for tensor in tensors.values()) == 368
    assert family.describe()[-1] == ("embeddings", "tied")


def test_padding_rows_are_legal(tmp_path: Path) -> None:
    base = save(tmp_path / "base", random_tensors(rows=18))
    family = Family.open(base, save(tmp_path / "instruct", random_tensors(rows=20)))
    assert (family.num_tokens, family.num_rows) == (18, 20)


def test_settings_that_change_no_tensor_may_differ(tmp_path: Path) -> None:
    base = save(tmp_path / "base", random_tensors(), max_position_embeddings=131072)
    instruct = save(tmp_path / "instruct", random_tensors(), max_position_embeddings=32768)
    assert Family.open(base, instruct)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rope_theta": 1e6}, {"rope_parameters": {"rope_theta": 1_000_000, "rope_type": "x"}}),
        ({"rope_theta": 1e6}, {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}),
        ({"rope_theta": 1e6, "rms_norm_eps": 1e-5, "hidden_act": "gelu"}, {}),
        ({"hidden_act": "silu"}, {"hidden_act": "swish"}),
        ({"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}),
        ({"hidden_act": "relu"}, {"hidden_act": "silu", "hidden_activation": "relu"}),
        ({"rope_parameters": None}, {"rope_theta": None, "rms_norm_eps": None}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e4},
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        ),
        ({"rotary_pct": 0.25, "rotary_emb_base": 1e4}, {"partial_rotary_factor": 0.25}),
    ],
)
def test_settings_that_are_spelled_otherwise_or_left_out_may_differ(
    tmp_path: Path, one: dict[str, Any], other: dict[str, Any]
) -> None:
    folders = [
        save(tmp_path / str(n), random_tensors(), **config) for n, config in enumerate((one, other))
    ]
    assert Family.open(*folders)
    assert Family.open(*reversed(folders))


UNDER: dict[str, Any] = {
    **{"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu", "n_head": 4},
    **{"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_theta": 123.0}, "rope_theta is 10000.0 and 123.0"),
        (
            {"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 1e6}},
            "rope_theta is 10000.0 and 1000000.0",
        ),
        ({"rms_norm_eps": 0.1}, "rms_norm_eps is 1e-06 and 0.1"),
        ({"hidden_act": "relu"}, "hidden_act is silu and relu"),
        ({"hidden_act": None, "activation_function": "relu"}, "hidden_act is silu and relu"),
        ({"n_head": 8}, "n_head is 4 and 8"),
        ({"partial_rotary_factor": 1.0}, "partial_rotary_factor is 0.5 and 1.0"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type is linear and yarn",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope factor is 2.0 and 4.0"),
    ],
)
def test_settings_under_which_the_weights_were_trained_must_be_the_same(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    base = save(tmp_path / "base", random_tensors(), **UNDER)
    other = save(tmp_path / "other", random_tensors(), **UNDER | config)
    with pytest.raises(
        FamilyError, match=f"{base} and {other} are not one family: {message}. Take the base"
    ):
        Family.open(base, other)


def renamed(tensors: Tensors) -> Tensors:
    return {name.replace(UP, UP + "_a"): tensor for name, tensor in tensors.items()}


PLAIN = random_tensors()
DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "an architecture": (
        {"architectures": ["Qwen2ForCausalLM"]},
        "the architecture is LlamaForCausalLM and Qwen2ForCausalLM",
    ),
    "a size": ({"hidden_size": 16}, "hidden_size is 8 and 16"),
    "the heads, which no shape shows": (
        {"num_attention_heads": 4},
        "num_attention_heads is 2 and 4",
    ),
    "tying": (
        {"tensors": random_tensors(tied=True), "tie_word_embeddings": True},
        "the embeddings are not tied and tied",
    ),
    "a renamed tensor": ({"tensors": renamed(PLAIN)}, f"tensor '{UP}' is missing in the second"),
    "one more tensor": (
        {"tensors": PLAIN | {"extra": np.zeros(1, np.float32)}},
        "tensor 'extra' is missing in the first",
    ),
    "a shape": (
        {"tensors": PLAIN | {UP: PLAIN[UP].reshape(8, 12)}},
        rf"tensor '{UP}' has shape \[12, 8\] and \[8, 12\]",
    ),
    "tokens": (
        {"tokens": (*TOKENS[:5], "x", "y", "z", *TOKENS[8:])},
        "only 15 of 18 tokens are the same, the first other one is 't5' with id 5, where the "
        "second has 'x'",
    ),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_what_is_no_family_is_refused_by_the_first_difference(
    tmp_path: Path, difference: str
) -> None:
    options, message = DIFFERENCES[difference]
    base = save(tmp_path / "base", PLAIN)
    other = save(tmp_path / "other", **({"tensors": PLAIN} | options))
    with pytest.raises(
        FamilyError, match=f"{base} and {other} are not one family: {message}. Take the base"
    ):
        Family.open(base, other)


def test_quantised_weights_are_refused_by_name(tmp_path: Path) -> None:
    base = save(tmp_path / "base", PLAIN)
    other = save(tmp_path / "other", PLAIN | {UP: np.zeros((12, 8), np.int8)})
    with pytest.raises(CheckpointError, match=rf"found tensor '{UP}' of I8; take the model before"):
        Family.open(base, other)


def test_a_model_without_rows_for_tokens_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "vision", {"patches.weight": np.zeros((3, 3), np.float32)})
    with pytest.raises(CheckpointError, match="is this a causal language model"):
        Family.open(folder, folder)


def test_an_output_layer_that_is_neither_tied_nor_there_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "headless", random_tensors(tied=True), tie_word_embeddings=False)
    with pytest.raises(
        CheckpointError,
        match=f"{folder}: expected an output layer 'lm_head.weight'.*found none; .* Fetch the",
    ):
        Family.open(folder, folder)
