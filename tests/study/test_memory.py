"""What memory is said to hold is what torch is seen to hold."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from fedgraft.models import Precision
from fedgraft.study.memory import FLOAT32, Memory, training_memory
from fedgraft.study.shape import Shape

CONFIGS: dict[str, Callable[..., Any]] = {"qwen2": Qwen2Config, "llama": LlamaConfig}
ROWS, ROW_LENGTH = 2, 64

sizes = st.fixed_dictionaries(
    {
        "model_type": st.sampled_from(sorted(CONFIGS)),
        "hidden_size": st.sampled_from([32, 64]),
        "num_hidden_layers": st.integers(1, 3),
        "intermediate_size": st.sampled_from([48, 96, 160]),
        "num_attention_heads": st.just(4),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "vocab_size": st.sampled_from([64, 320, 1000]),
        "tie_word_embeddings": st.booleans(),
        "max_position_embeddings": st.just(256),
    }
)
SIZES: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "tie_word_embeddings": False,
    "max_position_embeddings": 256,
}


def made(sizes: dict[str, Any], *, checkpointing: bool = False) -> Any:
    config = CONFIGS[sizes["model_type"]](**{k: v for k, v in sizes.items() if k != "model_type"})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def loss_of(model: Any, precision: Precision) -> Any:
    """A forward pass on rows of two documents each, as training calls it."""
    half = torch.arange(ROW_LENGTH // 2)
    ids = torch.randint(0, model.config.vocab_size, (ROWS, ROW_LENGTH))
    positions = torch.cat([half, half]).repeat(ROWS, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        return model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False)


def planned(sizes: dict[str, Any], precision: Precision, **options: Any) -> Memory:
    shape = Shape.model_validate(sizes)
    return training_memory(
        shape, micro_batch_rows=ROWS, row_length=ROW_LENGTH, precision=precision, **options
    )


def storages(tensors: Any) -> dict[int, int]:
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


class Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes of tensors that stood at once, of those made while it watches."""

    def __init__(self, before: dict[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.before, self.live, self.most = before, dict[int, int](), 0

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.before and key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
        self.most = max(self.most, sum(self.live.values()))
        return out


@settings(max_examples=10, deadline=None)
@given(sizes=sizes, precision=st.sampled_from(["float32", "bfloat16"]))
def test_activations_are_byte_for_byte_what_torch_saves(
    sizes: dict[str, Any], precision: Precision
) -> None:
    model, saved = made(sizes), list[torch.Tensor]()
    weights = storages(model.parameters())

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(model, precision)
    found = sum(size for key, size in storages(saved).items() if key not in weights)
    memory = planned(sizes, precision)
    log_probabilities = ROWS * ROW_LENGTH * sizes["vocab_size"] * FLOAT32
    assert found - FLOAT32 == memory.activations + memory.copies + log_probabilities


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_a_step_is_the_sum_and_with_checkpointing_not_above(
    precision: Precision, checkpointing: bool
) -> None:
    model = made(SIZES, checkpointing=checkpointing)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in model.parameters()]
    with Peak(storages([*model.parameters(), *gradients, *model.buffers()])) as peak:
        loss_of(model, precision).loss.backward()
    memory = planned(SIZES, precision, gradient_checkpointing=checkpointing)
    expected = memory.activations + memory.logits + memory.copies
    assert peak.most <= 1.01 * expected
    assert peak.most >= (0.6 if checkpointing else 0.98) * expected


@pytest.mark.parametrize("rank", [None, 4])
@settings(max_examples=6, deadline=None)
@given(sizes=sizes)
def test_weights_gradients_and_moments_are_byte_for_byte_those_of_a_step(
    rank: int | None, sizes: dict[str, Any]
) -> None:
    model = made(sizes)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    loss_of(model, "float32").loss.backward()
    optimizer.step()
    memory = planned(sizes, "float32", rank=rank)
    assert sum(storages(model.parameters()).values()) == memory.weights
    assert sum(storages(p.grad for p in trained).values()) == memory.gradients
    moments = [t for state in optimizer.state.values() for t in state.values()]
    counters = FLOAT32 * len(trained)
    assert sum(storages(moments).values()) == memory.optimizer + counters


def test_a_parameter_takes_16_bytes_in_float32_and_a_matrix_2_more_under_autocast() -> None:
    shape = Shape.model_validate(SIZES)
    plain, cast = planned(SIZES, "float32"), planned(SIZES, "bfloat16")
    assert plain.weights + plain.gradients + plain.optimizer == 16 * shape.num_parameters
    matrices = shape.num_hidden_layers * shape.layer_weights + shape.output_weights
    assert (plain.copies, cast.copies) == (0, 2 * matrices)


@settings(deadline=None)
@given(sizes=sizes, processes=st.integers(2, 64))
def test_processes_share_weights_gradients_and_moments_and_nothing_else(
    sizes: dict[str, Any], processes: int
) -> None:
    one, many = planned(sizes, "bfloat16"), planned(sizes, "bfloat16", num_processes=processes)
    for part in ("weights", "gradients", "optimizer"):
        whole = getattr(one, part)
        assert 0 <= getattr(many, part) * processes - whole < processes
    assert (many.activations, many.logits) == (one.activations, one.logits)
    assert many.gathered > one.gathered == 0


def test_with_lora_every_process_holds_the_whole_model() -> None:
    """The trainer refuses to shard LoRA."""
    one, many = (planned(SIZES, "bfloat16", rank=4, num_processes=n) for n in (1, 8))
    assert one == many


def test_a_total_is_the_sum_of_its_parts() -> None:
    memory = planned(SIZES, "bfloat16", num_processes=2)
    parts = [getattr(memory, name) for name in Memory.__slots__]
    assert memory.total == sum(parts)
    assert min(parts) > 0
