"""How well a model predicts held-out text: nats per token, and bits per byte.

Nats per token compare models with one tokenizer; bits per byte compare any. Means are weighted by
tokens: every token counts once, long documents count for more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from fedgraft.errors import EvaluationError
from fedgraft.progress import progress
from fedgraft.text.corpus import Document
from fedgraft.text.dialogues import Dialogue, encode
from fedgraft.text.packing import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Perplexity:
    """The loss on some texts."""

    nats: float
    """Sum of the negative log-likelihoods of the scored tokens."""
    num_tokens: int
    """Tokens scored."""
    num_bytes: int
    """UTF-8 bytes of the texts."""
    per_text: tuple[tuple[float, int], ...]
    """Nats and scored tokens of each text, in order."""

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.num_tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token)


def document_perplexity(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    documents: Sequence[Document],
    *,
    window: int = 512,
    label: str = "perplexity",
) -> Perplexity:
    """Score each document from an end-of-text token (the context of its first token) to its end.

    A document longer than the window is read in windows that overlap by half; each token is scored
    once, in the first window that holds it. No end-of-text token is scored.

    Raises EvaluationError where there is no document.
    """
    start = tokenizer.eos_token_id
    texts = [document.text for document in documents]
    if not texts:
        raise EvaluationError("expected held-out documents to score, found none")
    pieces: list[tuple[int, list[int], list[int]]] = []
    for place, ids in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"]):
        whole = [start, *ids]
        first_new = 1
        for begin in range(0, len(whole), window // 2):
            piece = whole[begin : begin + window]
            labels = [
                token if begin + offset >= first_new else IGNORED
                for offset, token in enumerate(piece)
            ]
            pieces.append((place, piece, labels))
            first_new = begin + len(piece)
            if first_new == len(whole):
                break
    return _score(model, pieces, [len(text.encode()) for text in texts], label)


def response_perplexity(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    dialogues: Sequence[Dialogue],
    *,
    label: str = "responses",
) -> Perplexity:
    """Score the answers of dialogues, end-of-turn tokens included; prompts are context only.

    Raises EvaluationError where there is no dialogue, DialogueError for one without an answer.
    """
    if not dialogues:
        raise EvaluationError("expected dialogues with answers to score, found none")
    pieces = [(place, *encode(tokenizer, dialogue)) for place, dialogue in enumerate(dialogues)]
    num_bytes = [
        sum(len(m.content.encode()) for m in dialogue.messages if m.role == "assistant")
        for dialogue in dialogues
    ]
    return _score(model, pieces, num_bytes, label)


def _score(
    model: "PreTrainedModel",
    pieces: Sequence[tuple[int, list[int], list[int]]],
    num_bytes: Sequence[int],
    label: str,
) -> Perplexity:
    """Sum the losses of the labelled tokens of (text, ids, labels), batched by length."""
    nats = [0.0] * len(num_bytes)
    tokens = [0] * len(num_bytes)
    order = sorted(range(len(pieces)), key=lambda number: len(pieces[number][1]))
    total = sum(len(ids) for _, ids, _ in pieces)
    with torch.inference_mode(), progress(label, total, "tokens") as advance:
        for batch in _batches(order, [len(ids) for _, ids, _ in pieces]):
            width = len(pieces[batch[-1]][1])
            ids = torch.zeros((len(batch), width), dtype=torch.long)
            labels = torch.full((len(batch), width), IGNORED)
            for row, number in enumerate(batch):
                _, piece, targets = pieces[number]
                ids[row, : len(piece)] = torch.tensor(piece)
                labels[row, : len(piece)] = torch.tensor(targets)
            # Padding stands on the right, where causal attention never looks: no mask is needed.
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits
            losses = functional.cross_entropy(
                logits[:, :-1].float().transpose(1, 2),
                labels[:, 1:].to(model.device),
                ignore_index=IGNORED,
                reduction="none",
            )
            for row, number in enumerate(batch):
                text = pieces[number][0]
                nats[text] += float(losses[row].double().sum())
                tokens[text] += int((labels[row, 1:] != IGNORED).sum())
            advance(sum(len(pieces[number][1]) for number in batch))
    return Perplexity(
        nats=sum(nats),
        num_tokens=sum(tokens),
        num_bytes=sum(num_bytes),
        per_text=tuple(zip(nats, tokens, strict=True)),
    )


def _batches(order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Runs of the order (short to long) whose padded size stays within the budget of a batch."""
    batches: list[list[int]] = []
    for number in order:
        if batches and (len(batches[-1]) + 1) * lengths[number] <= BATCH_TOKENS:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches
