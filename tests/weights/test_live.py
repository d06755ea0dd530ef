"""A model in memory is its checkpoint; a residual goes on as `graft` adds it, and off again."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fedgraft.errors import CheckpointError, NonFiniteError, ResidualError
from fedgraft.models import open_model
from fedgraft.testing import (
    ARCHITECTURES,
    Architecture,
    save_tiny,
    save_tiny_instruct,
    tiny_model,
    tiny_tokenizer,
)
from fedgraft.weights.checkpoint import Checkpoint
from fedgraft.weights.family import Family
from fedgraft.weights.graft import graft
from fedgraft.weights.live import Live, applied, apply
from fedgraft.weights.residual import Residual, extract

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
Bits = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=DTYPES, ids=lambda dtype: str(dtype).split(".")[1])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `instruct`, their `residual`, and `target`, another child."""
    folder = tmp_path_factory.mktemp("live")
    base = save_tiny(folder / "base", dtype=request.param)
    save_tiny_instruct(base, folder / "instruct", seed=1)
    save_tiny_instruct(base, folder / "target", seed=2)
    extract(Family.open(base, folder / "instruct"), folder / "residual")
    return folder


def opened(folder: Path) -> "PreTrainedModel":
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def bits(model: "PreTrainedModel") -> Bits:
    """A copy of every number, byte for byte."""
    return {name: t.view(torch.uint8).clone() for name, t in model.state_dict().items()}


def same(a: Bits, b: Bits) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextmanager
def left_alone(model: "PreTrainedModel") -> Iterator[None]:
    before = bits(model)
    yield
    assert same(before, bits(model))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_live_model_has_the_content_hash_and_the_anatomy_of_its_files(
    tmp_path: Path, architecture: Architecture, tied: bool, dtype: torch.dtype
) -> None:
    model = tiny_model(architecture, tied=tied, dtype=dtype)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    live, stored = Live(model, tmp_path), Checkpoint.open(tmp_path)
    assert live.content_hash == stored.content_hash
    assert live.num_parameters == stored.num_parameters
    assert live.tied is tied
    assert Family.open(live, stored).num_parameters == stored.num_parameters


def test_a_family_of_live_models_has_the_residual_of_their_directories(
    place: Path, tmp_path: Path
) -> None:
    sides = [Live(opened(place / side), place / side) for side in ("base", "instruct")]
    extract(Family.open(*sides), tmp_path / "residual")
    for file in ("residual.safetensors", "fedgraft.json", "instruct/config.json"):
        assert (tmp_path / "residual" / file).read_bytes() == (
            place / "residual" / file
        ).read_bytes()


def test_a_residual_that_is_put_on_the_base_makes_the_instruct_model(place: Path) -> None:
    model = opened(place / "base")
    with applied(Live(model, place / "base"), Residual.open(place / "residual")):
        assert same(bits(model), bits(opened(place / "instruct")))
    assert same(bits(model), bits(opened(place / "base")))


@settings(max_examples=8)
@given(scale=st.floats(-3, 3))
def test_a_live_sum_is_the_graft_and_comes_off_without_trace(
    place: Path, tmp_path_factory: pytest.TempPathFactory, scale: float
) -> None:
    model, residual = opened(place / "target"), Residual.open(place / "residual")
    out = tmp_path_factory.mktemp("graft") / "graft"
    graft(place / "target", residual, out, scale=scale, any_parent=True)
    with left_alone(model), applied(Live(model, place / "target"), residual, scale):
        assert same(bits(model), bits(opened(out)))


@settings(max_examples=20)
@given(scale=st.floats(-100, 100), seed=st.integers(0, 99), size=st.floats(-12, 2))
def test_any_finite_numbers_come_back_bit_for_bit(
    place: Path, scale: float, seed: int, size: float
) -> None:
    """Huge ratios between weights and residual either way, subnormals, and both zeros."""
    model = opened(place / "base")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            numbers = torch.randn(parameter.shape, generator=generator) * 10**size
            numbers.view(-1)[::7] = -0.0
            numbers.view(-1)[3::11] = torch.finfo(parameter.dtype).tiny / 4
            parameter.copy_(numbers)
    with left_alone(model):
        on = apply(Live(model, place / "base"), Residual.open(place / "residual"), scale)
        on.remove()
        on.remove()


def test_little_is_remembered_where_the_residual_is_small(place: Path) -> None:
    model = opened(place / "target")
    with applied(Live(model, place / "target"), Residual.open(place / "residual"), 0.9) as on:
        assert on.num_kept < 0.1 * on.live.num_parameters


def test_residuals_come_off_in_the_opposite_order_only(place: Path, tmp_path: Path) -> None:
    model, first = opened(place / "base"), Residual.open(place / "residual")
    second = extract(Family.open(place / "base", place / "target"), tmp_path / "second")
    with left_alone(model):
        inner = apply(Live(model, place / "base"), first, 0.5)
        outer = apply(Live(model, place / "base"), second, 0.5)
        with left_alone(model), pytest.raises(ResidualError, match="was put on top"):
            inner.remove()
        outer.remove()
        inner.remove()
        apply(Live(model, place / "base"), first).remove()


def test_a_residual_goes_on_once(place: Path, tmp_path: Path) -> None:
    model, residual = opened(place / "base"), Residual.open(place / "residual")
    with applied(Live(model, place / "base"), residual):
        for carrier in (model, copy.deepcopy(model)):
            with pytest.raises(ResidualError, match="found one that has it; a residual is added"):
                apply(Live(carrier, place / "base"), residual)
        with pytest.raises(ResidualError, match="a residual is added once"):
            graft(Live(model, place / "base"), residual, tmp_path / "twice", any_parent=True)
    out = graft(place / "base", residual, tmp_path / "graft")
    with pytest.raises(ResidualError, match="found one that has it"):
        apply(Live(opened(out), out), residual)


def test_it_comes_off_after_an_error_in_the_block(place: Path) -> None:
    model = opened(place / "base")
    with (
        left_alone(model),
        pytest.raises(KeyError),
        applied(Live(model, place / "base"), Residual.open(place / "residual")),
    ):
        raise KeyError("in the block")


def test_numbers_that_changed_in_between_are_not_subtracted_from(place: Path) -> None:
    model = opened(place / "base")
    on = apply(Live(model, place / "base"), Residual.open(place / "residual"))
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    with left_alone(model), pytest.raises(ResidualError, match="it was trained or converted"):
        on.remove()


def test_a_residual_whose_files_changed_in_between_is_told(place: Path, tmp_path: Path) -> None:
    family = Family.open(place / "base", place / "instruct")
    model, residual = opened(place / "base"), extract(family, tmp_path / "residual")
    on = apply(Live(model, place / "base"), residual)
    extract(Family.open(place / "base", place / "target"), residual.path, overwrite=True)
    with pytest.raises(ResidualError, match=r"files changed in between.*Open the model again"):
        on.remove()


def test_nan_in_the_last_tensor_leaves_the_model_as_it_was(place: Path) -> None:
    model = opened(place / "base")
    with torch.no_grad():
        model.model.norm.weight[5] = math.nan
    with left_alone(model), pytest.raises(NonFiniteError, match=r"tensor 'model\.norm\.weight'"):
        apply(Live(model, place / "base"), Residual.open(place / "residual"))
    assert Live(model, place / "base").record is None


def test_a_sum_beyond_the_dtype_is_refused_and_taken_back(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", dtype=torch.float16)
    instruct = save_tiny_instruct(base, tmp_path / "instruct")
    residual = extract(Family.open(base, instruct), tmp_path / "residual")
    model = opened(base)
    with left_alone(model), pytest.raises(NonFiniteError, match=r"within float16.*smaller scale"):
        apply(Live(model, base), residual, 1e9)


def test_a_scale_must_be_finite(place: Path) -> None:
    live = Live(opened(place / "base"), place / "base")
    with pytest.raises(ResidualError, match="expected a finite scale, found nan"):
        apply(live, Residual.open(place / "residual"), math.nan)


def test_another_architecture_or_shape_is_refused_by_name(place: Path) -> None:
    residual = Residual.open(place / "residual")
    for other, words in (
        (tiny_model("llama"), "the architecture is LlamaForCausalLM and Qwen2ForCausalLM"),
        (tiny_model(num_layers=3), "num_hidden_layers is 3 and 2"),
    ):
        with left_alone(other), pytest.raises(ResidualError, match=words):
            apply(Live(other, place / "base"), residual)
    other = tiny_model()
    other.model.norm.weight = torch.nn.Parameter(torch.ones(31))
    with pytest.raises(
        ResidualError, match=r"tensor 'model\.norm\.weight' has shape \[31\] and \[32\]"
    ):
        apply(Live(other, place / "base"), residual)


def test_padding_rows_beyond_the_residuals_stay(place: Path, tmp_path: Path) -> None:
    dtype = opened(place / "base").dtype
    target = save_tiny(tmp_path / "target", rows=333, dtype=dtype, seed=3)
    residual = Residual.open(place / "residual")
    out = graft(target, residual, tmp_path / "graft", scale=0.8, any_parent=True)
    model = opened(target)
    with left_alone(model), applied(Live(model, target), residual, 0.8):
        assert same(bits(model), bits(opened(out)))


def test_tokens_in_other_rows_are_left_to_graft(place: Path, tmp_path: Path) -> None:
    tokenizer = (place / "base" / "tokenizer.json").read_text()
    target = save_tiny(tmp_path / "target")
    swapped = (
        tokenizer.replace('"!":', '"?swap":').replace('"#":', '"!":').replace('"?swap":', '"#":')
    )
    (target / "tokenizer.json").write_text(swapped)
    model = opened(target)
    with left_alone(model), pytest.raises(ResidualError, match="graft the checkpoint on disk"):
        apply(Live(model, target), Residual.open(place / "residual"))


def test_a_live_target_is_grafted_like_its_files(place: Path, tmp_path: Path) -> None:
    live = Live(opened(place / "base"), place / "base")
    graft(live, place / "residual", tmp_path / "from memory", scale=0.7)
    graft(place / "base", place / "residual", tmp_path / "from disk", scale=0.7)
    for file in ("model.safetensors", "fedgraft.json", "config.json"):
        memory, disk = (tmp_path / f"from {side}" / file for side in ("memory", "disk"))
        assert memory.read_bytes() == disk.read_bytes()


def test_what_cannot_be_computed_with_is_refused_by_name(tmp_path: Path) -> None:
    quantised, absent, strided = tiny_model(), tiny_model(), tiny_model()
    quantised.model.norm.weight = torch.nn.Parameter(
        torch.ones(32, dtype=torch.int8), requires_grad=False
    )
    absent.model.norm.to("meta")
    strided.model.norm.weight = torch.nn.Parameter(torch.ones(64)[::2])
    for model, found in (
        (quantised, "torch.int8"),
        (absent, "none"),
        (strided, "strided torch.float32"),
    ):
        with pytest.raises(CheckpointError, match=rf"'model\.norm\.weight'.*found {found}"):
            Live(model, tmp_path)


def test_a_module_that_is_not_tied_as_its_config_says_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tied=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with pytest.raises(
        CheckpointError, match=r"\(tie_word_embeddings: True\), found that it is no"
    ):
        Live(model, tmp_path)
    model = tiny_model(tied=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(
        CheckpointError, match=r"\(tie_word_embeddings: False\), found that it is t"
    ):
        Live(model, tmp_path)


def test_a_model_in_another_precision_than_its_files_takes_the_residual(place: Path) -> None:
    model = open_model(place / "base", dtype=torch.float32)
    with left_alone(model), applied(Live(model, place / "base"), Residual.open(place / "residual")):
        wanted = open_model(place / "instruct", dtype=torch.float32)
        for name, found in model.state_dict().items():
            torch.testing.assert_close(found, wanted.state_dict()[name], rtol=0, atol=1e-7)
