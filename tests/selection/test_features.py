"""Laws of features: those of the example alone, whatever stands beside it in a batch."""

import multiprocessing
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from tests.selection.readers import CAUSAL, KINDS, LOOKING_BOTH_WAYS, ROWS, fresh, model_of
from tokenizers.processors import TemplateProcessing

from fedgraft.errors import ArtefactError, NonFiniteError, ResidualError, SelectionError
from fedgraft.selection.features import (
    CACHED,
    Encoding,
    Features,
    cached_features,
    encoder_ids,
    feature_batches,
    features,
    window,
)
from fedgraft.testing import tiny_model, tiny_tokenizer
from fedgraft.training.adapter import add_factors
from fedgraft.training.settings import Lora

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pooling = Literal["last", "mean"]
ALL = Encoding()
HASH = "sha256:of the weights"
examples_of_any_length = st.lists(
    st.lists(st.integers(2, ROWS - 1), min_size=1, max_size=24), min_size=1, max_size=7
)
EXAMPLES = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [5, 6, 7, 8, 9, 10, 11, 12], [200, 2]]


def alone(model: "PreTrainedModel", example: list[int], pooling: Pooling) -> NDArray[np.float32]:
    """What transformers gives for one example by itself, logits and all, as the paper's code."""
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([example]), output_hidden_states=True)
    states = torch.stack([state[0] for state in output.hidden_states])
    found: NDArray[np.float32] = (states[:, -1] if pooling == "last" else states.mean(1)).numpy()
    return found


def assert_close(found: Features, expected: Features) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_example_read_alone(kind: str, pooling: Pooling) -> None:
    found = features(model_of(kind), EXAMPLES, Encoding(pooling=pooling), batch_tokens=32)
    assert found.shape == (5, 3, 32)
    assert found.dtype == np.float32
    for row, example in zip(found, EXAMPLES, strict=True):
        assert_close(row, alone(model_of(kind), example, pooling))


@settings(max_examples=12)
@given(examples_of_any_length, st.integers(1, 200), st.sampled_from(["last", "mean"]), st.data())
def test_neither_batches_nor_order_nor_neighbours_change_a_feature(
    examples: list[list[int]], batch_tokens: int, pooling: Pooling, data: st.DataObject
) -> None:
    encoding = Encoding(pooling=pooling)
    order = data.draw(st.permutations(range(len(examples))))
    for kind in ("qwen2", "roberta"):
        found = features(
            model_of(kind), [examples[i] for i in order], encoding, batch_tokens=batch_tokens
        )
        for row, place in zip(found, order, strict=True):
            assert_close(row, features(model_of(kind), [examples[place]], encoding)[0])


def test_equal_examples_have_equal_features_to_the_bit_in_one_batch() -> None:
    found = features(model_of("qwen2"), [[5, 6, 7]] * 4, ALL)
    assert (found == found[0]).all()


def test_every_example_comes_once_short_ones_first() -> None:
    batches = list(feature_batches(model_of("qwen2"), EXAMPLES, ALL, batch_tokens=6))
    assert [places.tolist() for places, _ in batches] == [[1, 4], [2], [0], [3]]
    assert {places.dtype for places, _ in batches} == {np.dtype(np.int64)}
    whole = features(model_of("qwen2"), EXAMPLES, ALL)
    for places, values in batches:
        assert_close(values, whole[places])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_the_first_layer_is_the_embedding_and_the_last_is_after_the_final_norm(kind: str) -> None:
    model = model_of(kind)
    found = features(model, [[5, 6, 7]], ALL)[0]
    before: list[Any] = []
    norm = {"gpt2": "transformer.ln_f"}.get(kind, "model.norm")
    with torch.inference_mode():
        hook = model.get_submodule(norm).register_forward_pre_hook(
            lambda _, inputs: before.append(inputs[0])
        )
        after = model.base_model(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state[0, -1]
        hook.remove()
    assert_close(found[-1], after.numpy())
    assert np.abs(found[-1] - before[0][0, -1].numpy()).max() > 0.1
    if kind != "gpt2":  # which adds positions to its embedding
        assert_close(found[0], model.get_input_embeddings().weight[7].detach().numpy())


def test_chosen_layers_are_slices_of_all_of_them() -> None:
    whole = features(model_of("qwen2"), EXAMPLES, ALL)
    for layers, expected in [((2, 0), whole[:, [2, 0]]), ("last", whole[:, [2]])]:
        found = features(model_of("qwen2"), EXAMPLES, Encoding(layers=layers))  # type: ignore[arg-type]
        assert np.array_equal(found, expected)


def test_nobody_pays_for_logits() -> None:
    model = fresh("qwen2", tied=False)

    def refuse(*_: Any) -> None:
        raise AssertionError("the output layer ran")

    model.lm_head.register_forward_pre_hook(refuse)
    assert len(features(model, EXAMPLES, ALL)) == 5


def test_a_model_that_looks_both_ways_is_masked_and_one_that_does_not_is_not() -> None:
    for kind in KINDS:
        seen: list[Any] = []
        model = fresh(kind)
        model.base_model.register_forward_pre_hook(
            lambda _, __, given, seen=seen: seen.append(given.get("attention_mask")),
            with_kwargs=True,
        )
        features(model, EXAMPLES, ALL)
        assert (seen[0] is None) == (kind in CAUSAL)
        if kind in LOOKING_BOTH_WAYS:
            assert seen[0].sum(1).tolist() == [1, 2, 3, 5, 8]


def adapted() -> Any:
    found = add_factors(tiny_model(seed=3), Lora(rank=4, alpha=8), 0)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return found


def state(model: torch.nn.Module) -> tuple[Any, ...]:
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [getattr(module, "disable_adapters", None) for module in model.modules()],
    )


def test_an_adapter_is_passed_over_and_left_as_it_was() -> None:
    model = adapted()
    plain = features(tiny_model(seed=3), EXAMPLES, ALL)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)  # A frozen, as in FFA-LoRA
    for training in (False, True):
        model.train(training)
        before = state(model)
        batches = feature_batches(model, EXAMPLES, ALL, batch_tokens=8)
        for places, values in batches:
            assert_close(values, plain[places])
            assert state(model) == before  # between batches too
            assert not torch.is_inference_mode_enabled()
    logits = model(torch.tensor([EXAMPLES[0]])).logits
    assert logits.requires_grad
    with model.disable_adapter():
        before = state(model)
        assert_close(features(model, EXAMPLES, ALL), plain)
        assert state(model) == before


def test_dropout_is_off_and_on_again() -> None:
    model = fresh("bert", hidden_dropout_prob=0.5)
    expected = features(model, EXAMPLES, ALL)
    model.train()
    assert_close(features(model, EXAMPLES, ALL), expected)
    assert all(module.training for module in model.modules())


def test_a_merged_adapter_is_refused() -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ResidualError, match="expected an adapter that is attached"):
        features(model, EXAMPLES, ALL)
    model.unmerge_adapter()
    assert features(model, EXAMPLES, ALL).shape == (5, 3, 32)


def test_weights_in_half_precision_give_features_in_single() -> None:
    exact = features(tiny_model(seed=3), EXAMPLES, Encoding(pooling="mean"))
    half = features(tiny_model(seed=3, dtype=torch.bfloat16), EXAMPLES, Encoding(pooling="mean"))
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, exact, atol=0.05 * np.abs(exact).max())


def test_features_that_are_no_numbers_are_refused_by_example_and_layer() -> None:
    model = fresh("qwen2")
    with torch.no_grad():
        model.get_input_embeddings().weight[200] = torch.nan
    with pytest.raises(NonFiniteError, match=r"ours, example 4: .*infinity in layer 1; check"):
        features(model, EXAMPLES, ALL, label="ours")
    assert np.isfinite(features(model, EXAMPLES[:4], ALL)).all()
    found = features(model, [[200, 7]], Encoding(layers=(0,)))  # read, but not in what is kept
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([[5], []], "example 1: expected tokens to read, found none; leave it out"),
        ([[5], [5] * 257], "example 1: expected at most 256 tokens, the model's window, found 257"),
        (
            [[5], [5, 320]],
            "example 1: expected token ids from 0 to 319, the model's voc.*found 320",
        ),
        ([[5, -1]], "example 0: expected token ids from 0 to 319.*found -1; encode it with this"),
    ],
)
def test_an_example_that_cannot_be_read_is_refused_before_any_is(
    examples: list[list[int]], message: str
) -> None:
    with pytest.raises(SelectionError, match=message):
        feature_batches(model_of("qwen2"), examples, ALL)  # not even asked for its first batch


def test_a_layer_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"from 0 \(the embedding\) to 2 .*found 3; name"):
        feature_batches(model_of("qwen2"), EXAMPLES, Encoding(layers=(1, 3)))


@pytest.mark.parametrize("layers", [(), (-1,), (1, 1), "first"])
def test_layers_that_are_none_are_no_setting(layers: Any) -> None:
    with pytest.raises(ValidationError):
        Encoding(layers=layers)


def test_a_model_that_does_not_keep_to_its_config_is_refused() -> None:
    model = fresh("qwen2")
    model.config.num_hidden_layers = 3
    with pytest.raises(
        SelectionError, match="Qwen2ForCausalLM: expected 4 hidden states of 32 num"
    ):
        features(model, EXAMPLES, ALL)


@pytest.mark.parametrize("kept", [False, True])
def test_of_no_example_there_are_no_features_of_the_right_shape(tmp_path: Path, kept: bool) -> None:
    found = features(model_of("qwen2"), [], ALL, file=tmp_path / "f.npy" if kept else None)
    assert found.shape == (0, 3, 32)
    assert found.dtype == np.float32


def test_features_in_a_file_equal_those_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "below" / "f.npy"
    found = features(model_of("qwen2"), EXAMPLES, ALL, batch_tokens=6, file=file)
    assert np.array_equal(found, features(model_of("qwen2"), EXAMPLES, ALL, batch_tokens=6))
    assert np.array_equal(found, np.load(file, allow_pickle=False))
    assert not found.flags.writeable
    assert [path.name for path in file.parent.iterdir()] == ["f.npy"]
    with pytest.raises(ArtefactError, match="exists already; remove it or choose another place"):
        features(model_of("qwen2"), EXAMPLES, ALL, file=file)


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    model = fresh("qwen2")
    with torch.no_grad():
        model.get_input_embeddings().weight[200] = torch.inf
    with pytest.raises(NonFiniteError):
        features(model, EXAMPLES, ALL, batch_tokens=1, file=tmp_path / "f.npy")
    with pytest.raises(NonFiniteError):
        cached_features(model, EXAMPLES, ALL, content_hash=HASH, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_writing_takes_the_memory_of_a_batch_whatever_the_number_of_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches(*_: Any, **__: Any) -> Iterator[tuple[NDArray[np.int64], Features]]:
        for start in range(100):
            yield np.arange(start, 4000, 100), np.full((40, 3, 32), start, np.float32)

    monkeypatch.setattr("fedgraft.selection.features.feature_batches", batches)
    tracemalloc.start()
    found = features(model_of("qwen2"), [[5]] * 4000, ALL, file=tmp_path / "f.npy")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found[3199, 2, 5] == 99
    assert peak < found.nbytes / 5


def test_settings_are_read_without_torch() -> None:
    code = "import sys, fedgraft.selection.features, fedgraft.selection.quality as q; " + (
        "print([m for m in ('torch', 'transformers', 'peft', 'sklearn') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def cache_of(folder: Path, model: "PreTrainedModel", **changes: Any) -> Features:
    given: dict[str, Any] = {"examples": EXAMPLES, "encoding": ALL, "content_hash": HASH}
    given |= changes
    return cached_features(model, folder=folder, **given)


def test_features_are_computed_once_for_model_examples_and_encoding(tmp_path: Path) -> None:
    model, passes = fresh("qwen2"), []
    model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    first = cache_of(tmp_path, model)
    assert len(passes) == 1
    again = [
        cache_of(tmp_path, model),
        cache_of(tmp_path, model, batch_tokens=6),
        cache_of(tmp_path, model, encoding=Encoding(layers=(0, 1, 2), encoder="anywhere")),
        cache_of(tmp_path, model, examples=[np.array(example) for example in EXAMPLES]),
    ]
    assert len(passes) == 1
    assert all(np.array_equal(found, first) for found in again)
    assert np.array_equal(first, features(model_of("qwen2"), EXAMPLES, ALL))
    (kept,) = tmp_path.iterdir()
    assert sorted(path.name for path in kept.iterdir()) == ["features.npy", "fedgraft.json"]


def test_whatever_changes_a_feature_is_another_entry_of_the_cache(tmp_path: Path) -> None:
    model = fresh("qwen2")
    others: list[Callable[[], Any]] = [
        lambda: cache_of(tmp_path, model),
        lambda: cache_of(tmp_path, model, content_hash="sha256:of other weights"),
        lambda: cache_of(tmp_path, model, encoding=Encoding(pooling="mean")),
        lambda: cache_of(tmp_path, model, encoding=Encoding(layers="last")),
        lambda: cache_of(tmp_path, model, examples=EXAMPLES[:4]),
        lambda: cache_of(tmp_path, model, examples=EXAMPLES[::-1]),
        lambda: cache_of(tmp_path, model, examples=[[5, 6, 7, 8, 10], *EXAMPLES[1:]]),
        lambda: cache_of(tmp_path, model, examples=[[5, 6, 7, 8], [9, 10], *EXAMPLES[2:]]),
        lambda: cache_of(tmp_path, tiny_model(seed=3, dtype=torch.bfloat16)),
    ]
    for number, other in enumerate(others, 1):
        other()
        assert len(list(tmp_path.iterdir())) == number


@pytest.mark.parametrize("damage", ["cut", "header", "pickle", "objects", "gone"])
def test_a_damaged_entry_is_refused_with_its_remedy(tmp_path: Path, damage: str) -> None:
    cache_of(tmp_path, model_of("qwen2"))
    (file,) = tmp_path.glob(f"*/{CACHED}")
    match damage:
        case "cut":
            file.write_bytes(file.read_bytes()[:-1])
        case "header":
            np.save(file, np.zeros((5, 3, 31), np.float32))
        case "pickle":
            file.write_bytes(pickle.dumps(np.zeros((5, 3, 32), np.float32)))
        case "objects":
            np.save(file, np.array([print], object), allow_pickle=True)
        case _:
            file.unlink()
    with pytest.raises(
        ArtefactError, match=rf"expected features, float32 of \[5, 3, 32\].*{tmp_path}"
    ):
        cache_of(tmp_path, model_of("qwen2"))


def test_a_cache_that_cannot_be_written_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Iterator[Any]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.lib.format.write_array_header_1_0", full)
    with pytest.raises(
        ArtefactError, match=r"could not write .*: No space left on device; nothing"
    ):
        cache_of(tmp_path, model_of("qwen2"))
    assert list(tmp_path.iterdir()) == []


def test_two_processes_that_compute_one_entry_at_once_both_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is later takes the entry of the other, not its own; children touch no tensor."""
    model, context = fresh("qwen2"), multiprocessing.get_context("fork")
    meet, found = context.Barrier(2), context.Queue()

    def batches(*_: Any, **__: Any) -> Iterator[tuple[NDArray[np.int64], Features]]:
        meet.wait(30)
        yield np.arange(5), np.full((5, 3, 32), os.getpid(), np.float32)

    monkeypatch.setattr("fedgraft.selection.features.feature_batches", batches)

    def compute() -> None:
        try:
            found.put(int(cache_of(tmp_path, model).max()))
        except (ArtefactError, OSError) as error:
            found.put(repr(error))

    both: list[Any] = [context.Process(target=compute) for _ in range(2)]
    for one in both:
        one.start()
    first, second = (found.get(timeout=60) for _ in both)
    for one in both:
        one.join(30)
    assert first == second
    assert first in {one.pid for one in both}
    (kept,) = tmp_path.iterdir()
    assert sorted(path.name for path in kept.iterdir()) == ["features.npy", "fedgraft.json"]


def encoder_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    return tokenizer


def test_texts_are_cut_to_the_encoders_window_and_the_cut_ones_counted() -> None:
    tokenizer = encoder_tokenizer()
    short, long = "At noon.", "The heron stands in the river. " * 9
    whole = tokenizer(long)["input_ids"]
    found, num_cut = encoder_ids(tokenizer, [short, long, short, long], 20)
    assert num_cut == 2
    assert [len(ids) for ids in found[1::2]] == [20, 20]
    assert found[1] == [*whole[:19], 2]
    assert found[0] == found[2] == tokenizer(short)["input_ids"]
    assert encoder_ids(tokenizer, [long], None) == ([whole], 0)
    assert encoder_ids(tokenizer, [short, long], 20)[0] == found[:2]  # no setting is left behind
    assert encoder_ids(tokenizer, [], 20) == ([], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_is_as_many_tokens_as_the_model_has_positions_for(kind: str) -> None:
    model = model_of(kind)
    longest = window(model)
    assert longest == (256 if kind in ("llama", "qwen2", "mistral", "gemma") else 64)
    assert features(model, [[5] * longest], ALL).shape == (1, 3, 32)
    with pytest.raises(SelectionError, match=f"expected at most {longest} tokens"):
        features(model, [[5] * (longest + 1)], ALL)
