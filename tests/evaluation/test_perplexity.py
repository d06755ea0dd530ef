"""Laws of perplexity: each token scored once, in the right context, whatever the batch."""

import copy
import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.evaluation.lessons import dialogue
from tokenizers.processors import TemplateProcessing

from fedgraft.errors import DialogueError, EvaluationError, NonFiniteError
from fedgraft.evaluation.perplexity import document_perplexity, response_perplexity
from fedgraft.testing import ARCHITECTURES, Architecture, tiny_model, tiny_tokenizer
from fedgraft.text.corpus import Document
from fedgraft.text.dialogues import encode
from fedgraft.text.packing import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

tokenizer = cache(tiny_tokenizer)
model_of = cache(tiny_model)
texts = st.lists(st.text("abc dé€.\n", min_size=1, max_size=60), min_size=1, max_size=6)
TEXTS = ["The heron stands in the river.", "At noon.", "Nobody at the mill is awake " * 5]


def documents(texts: Sequence[str]) -> list[Document]:
    return [Document(id=str(n), text=text, source="test") for n, text in enumerate(texts)]


def tokens_of(text: str) -> list[int]:
    ids: list[int] = tokenizer().encode(text)
    return ids


def token_nats(model: "PreTrainedModel", ids: list[int]) -> list[float]:
    """Negative log-likelihood of each token but the first, read alone and whole."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    nats = -logits.double().log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    found: list[float] = nats.tolist()
    return found


@given(texts.filter(lambda texts: any(len(tokens_of(t)) > 1 for t in texts)), st.integers(2, 40))
@settings(max_examples=15)
def test_each_token_is_scored_once_in_the_first_window_that_holds_it(
    texts: list[str], window: int
) -> None:
    found = document_perplexity(model_of(), tokenizer(), documents(texts), window=window)
    for text, loss in zip(texts, found.per_text, strict=True):
        ids = tokens_of(text)
        expected = 0.0
        for place in range(1, len(ids)):
            begin = 0
            while begin + window <= place:
                begin += window // 2
            expected += token_nats(model_of(), ids[begin : place + 1])[-1]
        assert loss.num_tokens == len(ids) - 1
        assert loss.nats == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_document_within_the_window_equals_transformers_own_loss(
    architecture: Architecture,
) -> None:
    model = model_of(architecture)
    ids = torch.tensor([tokens_of(TEXTS[0])])
    with torch.inference_mode():
        expected = model(input_ids=ids, labels=ids, use_cache=False).loss.item()
    found = document_perplexity(model, tokenizer(), documents(TEXTS[:1]))
    assert found.nats_per_token == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)


@settings(max_examples=15)
@given(st.integers(1, 2000), st.permutations(range(len(TEXTS))))
def test_neither_batches_nor_order_nor_neighbours_change_a_loss(
    batch_tokens: int, order: list[int]
) -> None:
    shuffled = documents([TEXTS[place] for place in order])
    found = document_perplexity(
        model_of(), tokenizer(), shuffled, window=20, batch_tokens=batch_tokens
    )
    for place, loss in zip(order, found.per_text, strict=True):
        alone = document_perplexity(model_of(), tokenizer(), documents([TEXTS[place]]), window=20)
        assert loss.nats == pytest.approx(alone.nats, rel=1e-5)
        assert (loss.num_tokens, loss.num_bytes) == (alone.num_tokens, alone.num_bytes)


def test_a_uniform_model_scores_the_logarithm_of_the_vocabulary() -> None:
    model = tiny_model(tied=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = document_perplexity(model, tokenizer(), documents(TEXTS), window=16)
    assert found.nats_per_token == pytest.approx(math.log(320), rel=1e-6)
    assert found.perplexity == pytest.approx(320, rel=1e-5)


def test_the_mean_is_weighted_by_tokens() -> None:
    found = document_perplexity(model_of(), tokenizer(), documents(TEXTS))
    losses = [token_nats(model_of(), tokens_of(text)) for text in TEXTS]
    every = [nats for loss in losses for nats in loss]
    assert found.num_tokens == len(every)
    assert found.nats_per_token == pytest.approx(sum(every) / len(every), rel=1e-5)


def test_bits_per_byte_counts_the_utf8_bytes_that_the_scored_tokens_spell() -> None:
    text = "zé€ costs"
    found = document_perplexity(model_of(), tokenizer(), documents([text]))
    assert tokenizer().decode(tokens_of(text)[:1]) == "z"
    assert found.num_bytes == len(text.encode()) - 1 == 11
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / 11)


def test_a_start_of_text_token_that_the_tokenizer_sets_is_context_for_the_first_token() -> None:
    starting = tiny_tokenizer()
    starting.bos_token = "<|im_start|>"
    starting.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    found = document_perplexity(model_of(), starting, documents(["At noon."]))
    assert found.num_tokens == len(tokens_of("At noon."))
    assert found.num_bytes == len("At noon.")
    assert found.nats == pytest.approx(sum(token_nats(model_of(), [1, *tokens_of("At noon.")])))


def test_no_window_is_longer_than_the_models_own() -> None:
    long = documents(["river " * 300])
    assert len(tokens_of(long[0].text)) > 256
    whole = document_perplexity(model_of(), tokenizer(), long, window=100_000)
    assert whole == document_perplexity(model_of(), tokenizer(), long, window=256)


def test_only_answers_and_their_ends_of_turn_are_scored_in_dialogues() -> None:
    dialogues = [dialogue("Where is the mill?", "By the river."), dialogue("When?", "At noon.")]
    found = response_perplexity(model_of(), tokenizer(), dialogues)
    for one, loss in zip(dialogues, found.per_text, strict=True):
        ids, labels = encode(tokenizer(), one)
        targets = [label != IGNORED for label in labels[1:]]
        nats = token_nats(model_of(), ids)
        expected = sum(n for n, is_target in zip(nats, targets, strict=True) if is_target)
        assert loss.nats == pytest.approx(expected, rel=1e-5)
        assert loss.num_tokens == sum(targets)
        assert loss.num_bytes == len(one.messages[-1].content)


def test_nothing_to_score_is_said_with_the_label() -> None:
    with pytest.raises(EvaluationError, match="hr: expected held-out documents to score"):
        document_perplexity(model_of(), tokenizer(), [], label="hr")
    with pytest.raises(EvaluationError, match="hr: expected text of two tokens or more"):
        document_perplexity(model_of(), tokenizer(), documents(["z"]), label="hr")
    with pytest.raises(EvaluationError, match="responses: expected text of two tokens or more"):
        response_perplexity(model_of(), tokenizer(), [])


def test_a_dialogue_without_an_answer_is_refused() -> None:
    with pytest.raises(DialogueError, match="expected an answer by the assistant"):
        response_perplexity(model_of(), tokenizer(), [dialogue("Where?")])


def test_a_window_in_which_nothing_has_context_is_refused() -> None:
    with pytest.raises(EvaluationError, match="expected a window of at least 2 tokens, found 1"):
        document_perplexity(model_of(), tokenizer(), documents(TEXTS), window=1)


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_text() -> None:
    model = copy.deepcopy(model_of())
    broken = tokens_of("z")[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[broken] = torch.nan
    with pytest.raises(NonFiniteError, match="text 0: expected a finite loss, found nan"):
        document_perplexity(model, tokenizer(), documents(["At noon z."]))


def test_scores_do_not_depend_on_what_the_tokenizer_did_before() -> None:
    used: PreTrainedTokenizerBase = tiny_tokenizer()
    used("a", padding="max_length", max_length=5, truncation=True)
    found = document_perplexity(model_of(), used, documents(TEXTS))
    assert found == document_perplexity(model_of(), tokenizer(), documents(TEXTS))
