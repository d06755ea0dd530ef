"""What an exact rule gives clients = the mean of their merged models, as peft merges them."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from fedgraft.federation.aggregate import Rule, adapter, aggregate
from fedgraft.federation.update import Size, Template, Update, check, layers_of
from fedgraft.testing import tiny_model
from fedgraft.training.adapter import add_factors, merged_tensors
from fedgraft.training.settings import Lora

SIZES = (Size(4, 8.0), Size(2, 6.0), Size(4, 8.0))
COUNTS = (3, 20, 50)
Weights = dict[str, NDArray[np.float64]]


def adapted(size: Size, seed: int) -> PeftModel:
    """The tiny model with a random adapter on every linear layer."""
    model = add_factors(tiny_model(), Lora(rank=size.rank, alpha=size.alpha), 0)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name or (seed > 99 and ".lora_A." in name):
                parameter.normal_()
    return model


def weights_of(model: PeftModel) -> Weights:
    return {k: v.detach().double().numpy() for k, v in merged_tensors(model).items()}


@pytest.mark.parametrize("rule", ["ffa", "flora", "fedex"])
def test_exact_rules_give_the_mean_of_the_merged_models(rule: Rule) -> None:
    torch.set_num_threads(1)
    sizes = SIZES if rule == "flora" else (SIZES[0],) * 3
    seeds = range(3) if rule == "ffa" else range(100, 103)  # one A, or each its own
    models = [adapted(size, seed) for size, seed in zip(sizes, seeds, strict=True)]
    updates = []
    for n, (model, size) in enumerate(zip(models, sizes, strict=True)):
        tensors = {k: v.numpy() for k, v in get_peft_model_state_dict(model).items()}
        update = Update(
            client=f"client-{n}",
            num_examples=COUNTS[n],
            tensors=tensors,
            rank=size.rank,
            alpha=size.alpha,
            base="sha256:tiny",
            round=1,
        )
        shapes = layers_of(tensors)
        asked = Template(base=update.base, round=1, layers=shapes, sizes=sizes, max_norm=1e3)
        check(update, asked)
        updates.append(update)
    merged = [weights_of(model) for model in models]
    expected = {
        name: np.average([one[name] for one in merged], axis=0, weights=COUNTS)
        for name in merged[0]
    }

    layers = list(aggregate(updates, rule))
    result = add_factors(tiny_model(), Lora(rank=4, alpha=8.0), 0)  # B is zero: changes nothing
    if rule != "flora":
        following = {k: torch.from_numpy(v) for k, v in adapter(layers, SIZES[0]).items()}
        assert not set_peft_model_state_dict(result, following).unexpected_keys
    found = weights_of(result)
    for layer in layers:
        if layer.change:
            name = f"{layer.module.removeprefix('base_model.model.')}.weight"
            found[name] = found[name] + layer.change.left.astype(np.float64) @ layer.change.right
    assert found.keys() == expected.keys()
    assert len(layers) == len(updates[0].tensors) // 2 > 0
    for name, wanted in expected.items():
        assert found[name] == pytest.approx(wanted, rel=1e-5, abs=1e-5), name
