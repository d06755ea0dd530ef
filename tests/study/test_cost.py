"""What training costs, by the paper's formula and by the finer count."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from fedgraft.study.cost import (
    Estimate,
    Prices,
    Tuning,
    operations,
    training_flops,
    tuning_ratio,
)
from fedgraft.study.shape import Shape


def test_the_papers_example_gives_its_ratio_of_2048() -> None:
    tuning = Tuning(num_tokens=25_000_000 * 8192, epochs=5)
    assert tuning_ratio(tuning, num_pretraining_tokens=100_000_000, epochs=5) == 2048


def test_the_ratio_is_that_of_the_flops() -> None:
    tuning = Tuning(num_tokens=7_000, epochs=3)
    spent = training_flops(1_000, 500, epochs=2), training_flops(1_000, 7_000, epochs=3)
    assert tuning_ratio(tuning, 500, epochs=2) == pytest.approx(spent[1] / spent[0])
    assert spent[0] == 6 * 1_000 * 500 * 2


def sized(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 256,
    } | changes


def counted(
    sizes: dict[str, Any], row_length: int, *, checkpointing: bool = False, rank: int | None = None
) -> int:
    """Operations of a forward and a backward pass over two rows, as torch counts them."""
    config = {"qwen2": Qwen2Config, "llama": LlamaConfig}[sizes["model_type"]]
    model = AutoModelForCausalLM.from_config(
        config(**{key: value for key, value in sizes.items() if key != "model_type"}),
        attn_implementation="eager",  # the counter knows no flash attention on CPUs
    ).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if rank:
        model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"))
    ids = torch.zeros(2, row_length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
@pytest.mark.parametrize("row_length", [32, 256])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [None, 8])
def test_the_finer_count_is_what_torch_counts_within_a_hundredth(
    model_type: str, row_length: int, checkpointing: bool, rank: int | None
) -> None:
    sizes = sized(model_type=model_type)
    work = operations(
        Shape.model_validate(sizes),
        2 * row_length,
        row_length,
        gradient_checkpointing=checkpointing,
        rank=rank,
    )
    found = counted(sizes, row_length, checkpointing=checkpointing, rank=rank)
    assert work.total == pytest.approx(found, rel=0.01)


def test_the_counts_of_one_run_differ_by_attention_and_by_what_is_not_multiplied() -> None:
    """6 N T, less the embedding and the vectors, and the attention of whole rows on top."""
    shape, tokens = Shape.model_validate(sized()), 1024
    work = operations(shape, tokens, 256)
    looked_up = shape.num_parameters - shape.output_weights - 3 * shape.layer_weights
    paper = training_flops(shape.num_parameters, tokens)
    assert work.matrices + work.output == paper - 6 * looked_up * tokens
    assert work.attention == 12 * 3 * 64 * 256 * tokens


def test_energy_and_money_follow_from_time_and_what_the_file_states() -> None:
    rented = Prices(currency="EUR", per_hour=2.5)
    assert rented.money(7200, num_devices=8) == pytest.approx(40)
    assert rented.kwh(7200) is None
    own = Prices(currency="EUR", watts=700, per_kwh=0.3)
    assert own.kwh(3600) == pytest.approx(0.7)
    assert own.money(3600, num_devices=2) == pytest.approx(0.42)
    both = Prices(currency="EUR", per_hour=1.0, watts=500, per_kwh=0.2)
    assert both.money(3600) == pytest.approx(1.1)


def test_without_a_price_there_is_energy_and_no_money() -> None:
    told = Prices(currency="EUR", watts=700)
    assert told.kwh(3600) == pytest.approx(0.7)
    assert told.money(3600) is None


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"per_kwh": 0.3}, "per_kwh needs `watts`"),
        ({}, "give `per_hour`, or `watts` and `per_kwh`"),
        ({"per_hour": 1.0, "per_month": 3.0}, "per_month"),
        ({"per_hour": -1.0}, "greater than or equal to 0"),
        ({"watts": 0.0}, "greater than 0"),
    ],
)
def test_prices_that_say_nothing_or_too_much_are_refused(told: dict[str, float], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        Prices.model_validate({"currency": "EUR", **told})


def test_the_share_of_the_rate_is_what_the_clock_says() -> None:
    estimate = Estimate(
        work="training",
        machine="a machine",
        rate=1e9,
        num_runs=2,
        paper_flops=3e9,
        operations=4e9,
        seconds=4 / 0.45,
    )
    assert estimate.share_reached(8.0) == pytest.approx(0.5)
    assert estimate.share_reached(estimate.seconds) == pytest.approx(0.45)
