"""The scale of a residual, chosen without instruction data: close to the instruct model, and read.

    divergence(s) = mean over tokens of KL(instruct || graft at scale s)
    kept(s)       = (bits(instruct) - bits(graft at s)) / (bits(base) - bits(newer base))

The tokens are the instruct model's own greedy answers to a few dozen plain requests, their end
tokens included. `bits` are bits per byte on held-out text of what the base went on to read. So
kept is 1 where the graft reads that text as much better than the instruct model does as the newer
base reads it better than the base: what instruction tuning itself cost is not held against it.
(Small scales keep more than that, for they take over less of the cost, and of the instructions.)

Chosen is, of the scales that keep at least a stated share, the one with the smallest divergence.
The residual is put on the newer base in memory; no checkpoint is written.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fedgraft.errors import EvaluationError, NonFiniteError, ResidualError
from fedgraft.evaluation.answers import continuations
from fedgraft.evaluation.batches import by_length
from fedgraft.evaluation.perplexity import BATCH_TOKENS, document_perplexity
from fedgraft.models import open_model, open_tokenizer, take_generation_config
from fedgraft.text.corpus import Document
from fedgraft.text.dialogues import Message, prompt_ids
from fedgraft.weights.checkpoint import Checkpoint, resolve
from fedgraft.weights.live import Live, applied
from fedgraft.weights.residual import Difference, Residual

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = Path(__file__).with_name("prompts.txt")
"""Plain requests from an office, one a line, written for fedgraft."""
SCALES = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4)
NUM_REFINEMENTS = 2
"""How often the step between scales is halved, and both neighbours of the best are tried."""
KEEP = 0.8
"""Share of what continued pre-training gained that the graft must keep."""
NUM_NAMED = 1024
"""Tokens of a distribution that are told apart; all others count as one outcome."""


class ScaleTrial(BaseModel):
    """What was measured at one scale."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: float
    divergence: float
    """KL(instruct || graft) on the instruct model's answers, nats per token."""
    bits_per_byte: float
    kept: float
    """Share of what continued pre-training gained."""


class ScaleChoice(BaseModel):
    """The scale that was chosen, and what it rests on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: float
    keep: float
    """The share that had to be kept."""
    trials: tuple[ScaleTrial, ...]
    """In the order of their scales."""
    bits_per_byte: dict[str, float]
    """Of `base`, `instruct` and `newer base` on the held-out text."""
    num_answers: int
    num_tokens: int
    """Tokens of the answers."""

    @property
    def chosen(self) -> ScaleTrial:
        return next(trial for trial in self.trials if trial.scale == self.scale)

    @property
    def why(self) -> str:
        """The reason, in a sentence."""
        best = self.chosen
        found = (
            f"{best.divergence:.3f} nats a token, and keeps {best.kept:.0%} of what continued "
            "pre-training gained"
        )
        if best.kept >= self.keep:
            reason = (
                f"scale {best.scale:g} stays closest to the instruct model's answers ({found}) of "
                f"the scales that keep at least {self.keep:.0%}"
            )
        else:
            reason = (
                f"no scale keeps {self.keep:.0%} of what continued pre-training gained; scale "
                f"{best.scale:g} stays closest to the instruct model's answers ({found})"
            )
        edge = best.scale in (self.trials[0].scale, self.trials[-1].scale)
        return reason + ("; it is the last one tried on its side" if edge else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spoken:
    """An answer of the instruct model, and how likely it held which token at each step.

    t tokens of the answer, k named tokens: the most likely ones.
    """

    ids: list[int]
    """Prompt and answer."""
    num_prompt: int
    named: Tensor
    """[t, k] token ids."""
    log_shares: Tensor
    """[t, k + 1] log-probabilities of the named tokens, and of all others together."""

    @property
    def num_tokens(self) -> int:
        return len(self.ids) - self.num_prompt


def choose_scale(
    target: str | Path,
    residual: Residual | Difference,
    base: str | Path,
    documents: Sequence[Document],
    *,
    instruct: str | Path | None = None,
    prompts: Sequence[str] = (),
    scales: Sequence[float] = SCALES,
    keep: float = KEEP,
    window: int = 512,
    max_new_tokens: int = 64,
) -> ScaleChoice:
    """Choose the scale at which `residual` goes onto `target`, a newer `base`.

    Args:
        documents: Held-out text of what the target has read since; must not be part of that.
        instruct: The original instruct model; without it, base + residual, which is the same but
            for a lossy residual.
        prompts: Requests to the instruct model; those that ship with fedgraft where none are named.
        scales: Tried first; then NUM_REFINEMENTS finer steps around the best of them.

    Raises:
        ResidualError: `base` or `instruct` are not the residual's parents, or it does not fit the
            target.
        EvaluationError: There is no prompt, document or finite scale, or the target does not read
            the documents better than the base does.
        NonFiniteError: A model's loss is NaN or infinite.
    """
    if not scales or not all(map(math.isfinite, scales)):
        raise EvaluationError(f"expected finite scales to try, found {list(scales) or 'none'}")
    base, target = resolve(base), resolve(target)
    instruct = instruct and resolve(instruct)
    _refuse_others(residual, base, instruct)
    tokenizer = open_tokenizer(residual.companions)
    asked = [
        prompt_ids(tokenizer, [Message(role="user", content=prompt)])
        for prompt in prompts or load_prompts(PROMPTS)
    ]

    def bits(model: "PreTrainedModel", label: str) -> float:
        return document_perplexity(
            model, tokenizer, documents, window=window, label=f"{label}: held-out text"
        ).bits_per_byte

    model = open_model(base)
    found = {"base": bits(model, "base")}
    with ExitStack() as stack:
        if instruct is None:
            stack.enter_context(applied(Live(model, base), residual))
            take_generation_config(model, residual.companions)  # the base's knows no end of a turn
        else:
            del model  # one at a time in memory
            model = open_model(instruct)
        found["instruct"] = bits(model, "instruct")
        answers = listen(model, tokenizer, asked, max_new_tokens=max_new_tokens)
    del model
    model = open_model(target)
    found["newer base"] = bits(model, "newer base")
    gain = found["base"] - found["newer base"]
    if gain <= 0:
        raise EvaluationError(
            f"{target}: expected held-out text that it reads better than the base, found "
            f"{found['newer base']:.4f} bits per byte where the base has {found['base']:.4f}; name "
            "held-out text of what it was pre-trained on, or choose the scale yourself"
        )

    def measure(scale: float) -> ScaleTrial:
        label = f"scale {scale:g}"
        with applied(Live(model, target), residual, scale):
            read = bits(model, label)
            return ScaleTrial(
                scale=scale,
                divergence=divergence(model, answers, label=label),
                bits_per_byte=read,
                kept=(found["instruct"] - read) / gain,
            )

    trials = search(measure, scales, keep)
    return ScaleChoice(
        scale=best_of(trials, keep).scale,
        keep=keep,
        trials=trials,
        bits_per_byte=found,
        num_answers=len(answers),
        num_tokens=sum(answer.num_tokens for answer in answers),
    )


def search(
    measure: Callable[[float], ScaleTrial], scales: Sequence[float], keep: float
) -> tuple[ScaleTrial, ...]:
    """Measure the scales, then the neighbours of the best of them at ever smaller steps."""
    ordered = sorted(set(scales))
    trials = [measure(scale) for scale in ordered]
    step = min((b - a for a, b in pairwise(ordered)), default=0.0)
    for _ in range(NUM_REFINEMENTS if step else 0):
        step /= 2
        centre = best_of(trials, keep).scale
        trials += [measure(round(centre + move, 6)) for move in (-step, step)]
    return tuple(sorted(trials, key=lambda trial: trial.scale))


def best_of(trials: Sequence[ScaleTrial], keep: float) -> ScaleTrial:
    """The smallest divergence among the trials that keep enough; among all where none does."""
    keeping = [trial for trial in trials if trial.kept >= keep]
    return min(keeping or trials, key=lambda trial: trial.divergence)


def load_prompts(file: Path) -> list[str]:
    """Prompts from a text file, one a line.

    Raises EvaluationError where it cannot be read or holds none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"{file}: expected a text file in UTF-8 with a prompt a line, found {error}; name "
            "another"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise EvaluationError(f"{file}: expected a prompt a line, found none; write a few dozen")
    return prompts


def listen(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
) -> tuple[Spoken, ...]:
    """Let the instruct model answer, and keep what it held likely at each step."""
    written = continuations(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, label="instruct: answers"
    )
    texts = [
        ([*prompt, *answer], len(prompt)) for prompt, answer in zip(prompts, written, strict=True)
    ]
    spoken: dict[int, Spoken] = {}
    for number, logs in _read(model, texts):
        named = logs.topk(min(NUM_NAMED, logs.shape[1] - 1)).indices
        ids, num_prompt = texts[number]
        spoken[number] = Spoken(
            ids=ids, num_prompt=num_prompt, named=named, log_shares=_shares(logs, named)
        )
    return tuple(spoken[number] for number in range(len(texts)))


def divergence(model: "PreTrainedModel", answers: Sequence[Spoken], *, label: str = "") -> float:
    """KL(instruct || model) on the instruct model's answers, the mean in nats per token.

    Each distribution is over the NUM_NAMED tokens that the instruct model holds most likely, and
    all others as one, so that the answers of a model with 150,000 tokens take megabytes. Merging
    outcomes never makes a divergence larger; it makes it 3 % smaller on the pocket family, whose
    distributions are flat, at every scale alike.

    Raises NonFiniteError where the model's logits are NaN or infinite.
    """
    nats = []
    texts = [(answer.ids, answer.num_prompt) for answer in answers]
    for number, logs in _read(model, texts):
        theirs = answers[number].log_shares
        ours = _shares(logs, answers[number].named)
        nats.append(float((theirs.exp() * (theirs - ours)).double().sum()))
    total = math.fsum(nats) / sum(answer.num_tokens for answer in answers)
    if not math.isfinite(total):
        raise NonFiniteError(
            f"{label}: expected a finite divergence from the instruct model, found {total}; check "
            "the checkpoint's weights, or take smaller scales"
        )
    return total


def _read(
    model: "PreTrainedModel", texts: Sequence[tuple[list[int], int]]
) -> Iterator[tuple[int, Tensor]]:
    """Number of a text, and the log-probabilities before each token of its answer, [t, v].

    Padding stands on the right, where causal attention never looks: no mask is needed.
    """
    lengths = [len(ids) for ids, _ in texts]
    with torch.inference_mode():
        for batch in by_length(lengths, BATCH_TOKENS):
            width = max(lengths[number] for number in batch)
            rows = [texts[number][0] + [0] * (width - lengths[number]) for number in batch]
            logits = model(
                input_ids=torch.tensor(rows, device=model.device), use_cache=False
            ).logits
            for row, number in enumerate(batch):
                answered = logits[row, texts[number][1] - 1 : lengths[number] - 1]
                yield number, answered.float().log_softmax(-1)


def _shares(logs: Tensor, named: Tensor) -> Tensor:
    """From log-probabilities [t, v]: of the named tokens [t, k], and of all others together."""
    others = logs.scatter(1, named, -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([logs.gather(1, named), others], 1)


def _refuse_others(
    residual: Residual | Difference, base: str | Path, instruct: str | Path | None
) -> None:
    """Refuse checkpoints that are not the residual's parents, by content hash."""
    expected = {"base": (base, residual.base_hash), "instruct": (instruct, residual.instruct_hash)}
    for role, (source, wanted) in expected.items():
        if source and (found := Checkpoint.open(source).content_hash) != wanted:
            raise ResidualError(
                f"{source}: expected the {role} model {wanted[:19]} that the residual was taken "
                f"from, found {found[:19]}; name that one"
            )
