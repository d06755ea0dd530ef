"""Laws of answers: greedy and nothing else, the same however they are batched."""

import copy
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.evaluation.lessons import LESSONS, Taught, dialogue
from transformers import GenerationConfig

from fedgraft.errors import EvaluationError, NonFiniteError
from fedgraft.evaluation.answers import answer
from fedgraft.testing import ARCHITECTURES, Architecture, tiny_model, tiny_tokenizer
from fedgraft.text.dialogues import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_NEW = 8
PROMPTS = [[(7 * n + 3 * i) % 300 + 5 for i in range(n)] for n in (5, 1, 9, 5, 2, 30, 7)]

tokenizer = cache(tiny_tokenizer)


@cache
def random_model(architecture: Architecture = "qwen2") -> "PreTrainedModel":
    """Random weights; the rows are spread so that no two tokens are likely alike."""
    model = tiny_model(architecture, tied=False)
    with torch.no_grad():
        model.lm_head.weight *= 50
    return model


def one_by_one(model: "PreTrainedModel", prompt: list[int]) -> str:
    """The definition: append the most likely token, read everything afresh, until an end token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + NUM_NEW:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token == tokenizer().eos_token_id:
            break
        ids.append(token)
    text: str = tokenizer().decode(ids[len(prompt) :], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_equal_reading_everything_afresh_for_each_token(
    architecture: Architecture,
) -> None:
    model = random_model(architecture)
    expected = [one_by_one(model, prompt) for prompt in PROMPTS]
    assert len(set(expected)) > 1
    assert answer(model, tokenizer(), PROMPTS, max_new_tokens=NUM_NEW) == expected


@settings(max_examples=8)
@given(st.permutations(range(len(PROMPTS))), st.integers(1, 400))
def test_neither_batches_nor_order_change_an_answer(order: list[int], batch_tokens: int) -> None:
    model = random_model()
    expected = answer(model, tokenizer(), PROMPTS, max_new_tokens=NUM_NEW)
    found = answer(
        model,
        tokenizer(),
        [PROMPTS[place] for place in order],
        max_new_tokens=NUM_NEW,
        batch_tokens=batch_tokens,
    )
    assert found == [expected[place] for place in order]


def test_answers_equal_transformers_greedy_generation() -> None:
    model = random_model()
    config = GenerationConfig(do_sample=False, max_new_tokens=NUM_NEW, eos_token_id=0)
    for prompt, found in zip(
        PROMPTS, answer(model, tokenizer(), PROMPTS, max_new_tokens=NUM_NEW), strict=True
    ):
        ids = torch.tensor([prompt])
        written = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
        )
        expected = tokenizer().decode(written[0, len(prompt) :], skip_special_tokens=True)
        assert found == expected


def test_a_generation_config_changes_nothing_but_where_answers_end() -> None:
    plain = random_model()
    model = copy.deepcopy(plain)
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.num_beams = 4
    model.generation_config.do_sample = True
    found = answer(model, tokenizer(), PROMPTS, max_new_tokens=NUM_NEW)
    assert found == answer(plain, tokenizer(), PROMPTS, max_new_tokens=NUM_NEW)


def test_an_answer_ends_before_any_end_token_even_an_ordinary_one(taught: Taught) -> None:
    model = copy.deepcopy(taught.model)
    model.generation_config.eos_token_id = taught.tokenizer.encode(".")
    prompts = [prompt_ids(taught.tokenizer, dialogue(asked).messages) for asked, _ in LESSONS[:2]]
    found = answer(model, taught.tokenizer, prompts, max_new_tokens=40)
    assert found == ["BY THE RIVER", "ANNA BAKES"]


def test_an_answer_ends_with_its_turn_and_long_ones_do_not_cut_short_ones(taught: Taught) -> None:
    prompts = [prompt_ids(taught.tokenizer, dialogue(asked).messages) for asked, _ in LESSONS]
    found = answer(taught.model, taught.tokenizer, prompts, max_new_tokens=40)
    assert found == [answered for _, answered in LESSONS]


def test_no_prompts_have_no_answers() -> None:
    assert answer(random_model(), tokenizer(), [], max_new_tokens=NUM_NEW) == []


def test_an_empty_prompt_is_refused_by_number() -> None:
    with pytest.raises(EvaluationError, match="prompt 1: expected at least one token, found none"):
        answer(random_model(), tokenizer(), [[5], []], max_new_tokens=NUM_NEW)


def test_a_prompt_without_room_for_its_answer_is_refused_with_both_numbers() -> None:
    assert answer(random_model(), tokenizer(), [[5] * 248], max_new_tokens=8)
    with pytest.raises(
        EvaluationError, match=r"prompt 0: .* 8 new tokens .* window of 256, found 249 .*shorten"
    ):
        answer(random_model(), tokenizer(), [[5] * 249], max_new_tokens=8)


def test_a_model_without_any_end_token_is_refused() -> None:
    endless = tiny_tokenizer()
    endless.eos_token = None
    model = copy.deepcopy(random_model())
    model.generation_config.eos_token_id = None
    with pytest.raises(EvaluationError, match=r"set eos_token_id in generation_config\.json"):
        answer(model, endless, [[5]], max_new_tokens=NUM_NEW)


def test_a_broken_model_is_an_error_and_not_a_wrong_answer() -> None:
    model = copy.deepcopy(random_model())
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(NonFiniteError, match="expected finite logits"):
        answer(model, tokenizer(), PROMPTS, max_new_tokens=NUM_NEW)
