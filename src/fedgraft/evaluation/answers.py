"""Greedy answers to many prompts, the same (but for rounding) however they are batched.

Greedy means the most likely token each time and nothing else. `generate` of transformers would fill
in what a checkpoint's generation config says besides (Qwen2's instruct side: a repetition penalty
of 1.1), so that arms with different configs would be read differently; hence a loop of our own.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedgraft.errors import EvaluationError, NonFiniteError
from fedgraft.evaluation.batches import by_length
from fedgraft.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 16_384


def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_tokens: int = BATCH_TOKENS,
    label: str = "answers",
) -> list[str]:
    """The texts of `continuations`; end and other special tokens are left out.

    Raises as `continuations` does.
    """
    written = continuations(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
        label=label,
    )
    stop = _stop_tokens(model, tokenizer)
    said = [tokens[:-1] if tokens[-1] in stop else tokens for tokens in written]
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said]


def continuations(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_tokens: int = BATCH_TOKENS,
    label: str = "answers",
) -> list[list[int]]:
    """The model's most likely tokens after each prompt, its end-of-turn or end token included.

    Prompts of like length share a batch of at most `batch_tokens` tokens, answers included.

    Raises EvaluationError for an empty prompt, or one that leaves no room in the model's window;
    NonFiniteError where the model's logits are NaN or infinite.
    """
    _check_fit(model, prompts, max_new_tokens)
    stop = _stop_tokens(model, tokenizer)
    found: list[list[int]] = [[] for _ in prompts]
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    with torch.inference_mode(), progress(label, len(prompts), "answers") as advance:
        for places in by_length(lengths, batch_tokens):
            written = _continue(model, [prompts[place] for place in places], stop, max_new_tokens)
            for place, tokens in zip(places, written.tolist(), strict=True):
                end = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
                found[place] = tokens[: end + 1]
            advance(len(places))
    return found


def _continue(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], stop: list[int], max_new_tokens: int
) -> Tensor:
    """Up to `max_new_tokens` tokens for each of b prompts, [b, t]; padded on the left, masked."""
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    rows = [[stop[0]] * pad + [*prompt] for pad, prompt in zip(padding, prompts, strict=True)]
    ids = torch.tensor(rows, device=model.device)
    mask = (torch.arange(width) >= torch.tensor(padding)[:, None]).long().to(model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    stops = torch.tensor(stop, device=model.device)
    done = torch.zeros(len(rows), dtype=torch.bool, device=model.device)
    written: list[Tensor] = []
    cache = None
    while len(written) < max_new_tokens and not done.all():
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        best, ids = output.logits[:, -1:].max(-1)
        if not best.isfinite().all():
            raise NonFiniteError(
                "expected finite logits, found NaN or infinity while the model answered; check the "
                "checkpoint's weights, or open it in float32"
            )
        written.append(ids)
        done |= torch.isin(ids[:, 0], stops)
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
        cache = output.past_key_values
    return torch.cat(written, 1)


def _check_fit(
    model: "PreTrainedModel", prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    window = getattr(model.config, "max_position_embeddings", None)
    for place, prompt in enumerate(prompts):
        if not prompt:
            raise EvaluationError(f"prompt {place}: expected at least one token, found none")
        if window and len(prompt) + max_new_tokens > window:
            raise EvaluationError(
                f"prompt {place}: expected a prompt that leaves room for {max_new_tokens} new "
                f"tokens in the model's window of {window}, found {len(prompt)} tokens; shorten "
                "the prompt or ask for shorter answers"
            )


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
