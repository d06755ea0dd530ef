"""Greedy answers to many prompts, the same for any batch size."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig

from fedgraft.errors import EvaluationError
from fedgraft.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 128


def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = BATCH_SIZE,
    label: str = "answers",
) -> list[str]:
    """The model's most likely continuation of each prompt, up to its end-of-turn or end token.

    Prompts of like length share a batch, padded on the left and masked; special tokens are left
    out of the text.

    Raises EvaluationError for an empty prompt, or one that leaves no room in the model's window.
    """
    window = getattr(model.config, "max_position_embeddings", None)
    for place, prompt in enumerate(prompts):
        if not prompt or (window and len(prompt) + max_new_tokens > window):
            raise EvaluationError(
                f"prompt {place}: expected 1 to {(window or 0) - max_new_tokens} tokens, so that "
                f"{max_new_tokens} new ones fit the model's window of {window}, found {len(prompt)}"
            )
    stop = _stop_tokens(model, tokenizer)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=stop[0],
        use_cache=True,
    )
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    texts = [""] * len(prompts)
    with torch.inference_mode(), progress(label, len(prompts), "answers") as advance:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            width = len(prompts[places[-1]])
            ids = torch.full((len(places), width), stop[0])
            mask = torch.zeros_like(ids)
            for row, place in enumerate(places):
                begin = width - len(prompts[place])
                ids[row, begin:] = torch.tensor(prompts[place])
                mask[row, begin:] = 1
            written = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
            )
            for place, tokens in zip(places, written[:, width:].tolist(), strict=True):
                texts[place] = tokenizer.decode(tokens, skip_special_tokens=True)
            advance(len(places))
    return texts


def _stop_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The end tokens of the generation config, and the tokenizer's own."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    stop = [named] if isinstance(named, int) else list(named or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stop:
        stop.append(tokenizer.eos_token_id)
    if not stop:
        raise EvaluationError(
            "expected an end-of-text token in the generation config or the tokenizer, found none; "
            "set eos_token_id in generation_config.json"
        )
    return stop
