"""The scores of one arm, by name; a score that was not taken is missing, never zero.

instructions/prompt_strict              share of prompts whose every constraint is met
instructions/prompt_loose               the same, harmless variants allowed
instructions/instruction_strict         share of single constraints met
instructions/instruction_loose
instructions/right_and_as_instructed    share of prompts answered right, every constraint met
instructions/<any of these>/<group>     the same for one group of dialogues
knowledge/asked/<group>                 share of plain questions answered right, through the chat
knowledge/recall/<group>                share of questions completed right, as plain text
perplexity/<department>/nats_per_token  on held-out documents of the department
perplexity/<department>/bits_per_byte
response/nats_per_token                 on the answers of held-out dialogues
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from fedgraft.evaluation.answers import answer
from fedgraft.evaluation.following import Marks, mark
from fedgraft.evaluation.knowledge import Question, recall
from fedgraft.evaluation.perplexity import Perplexity, document_perplexity, response_perplexity
from fedgraft.text.corpus import Document
from fedgraft.text.dialogues import Dialogue, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLLOWED = "instructions/prompt_strict"
RIGHT_AND_FOLLOWED = "instructions/right_and_as_instructed"


class Score(BaseModel):
    """One figure with what it rests on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    num: int
    """Prompts, questions or tokens that were scored."""
    stderr: float
    """Standard error of the value over the items that were scored."""
    unit: Literal["share", "nats", "bits"]

    @property
    def higher_is_better(self) -> bool:
        return self.unit == "share"


class Example(BaseModel):
    """One prompt and what the model answered, for people to read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    answer: str
    right: bool
    as_instructed: bool


class Scorecard(BaseModel):
    """All figures of one arm with one seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arm: str
    seed: int | None
    """None for an arm that does not depend on the seed."""
    scores: dict[str, Score]
    examples: tuple[Example, ...] = ()

    def value(self, name: str) -> float | None:
        """The figure, None where it was not taken."""
        score = self.scores.get(name)
        return score.value if score else None


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    arm: str,
    seed: int | None = None,
    documents: Mapping[str, Sequence[Document]] | None = None,
    dialogues: Sequence[Dialogue] = (),
    questions: Sequence[Question] = (),
    responses: Sequence[Dialogue] = (),
    window: int = 512,
    max_new_tokens: int = 64,
    num_examples: int = 6,
) -> Scorecard:
    """Take every figure that there is material for.

    Args:
        documents: Held-out documents of each department.
        dialogues: Prompts to be answered; those without constraints are plain questions.
        questions: Texts to be completed.
        responses: Dialogues whose given answers are scored.
    """
    scores: dict[str, Score] = {}
    for department, held_out in (documents or {}).items():
        measured = document_perplexity(
            model, tokenizer, held_out, window=window, label=f"{arm}: text of {department}"
        )
        scores |= _perplexity_scores(f"perplexity/{department}", measured)
    if responses:
        measured = response_perplexity(model, tokenizer, responses, label=f"{arm}: responses")
        scores |= _perplexity_scores("response", measured)
    marks: list[Marks] = []
    if dialogues:
        prompts = [prompt_ids(tokenizer, dialogue.messages) for dialogue in dialogues]
        answers = answer(
            model, tokenizer, prompts, max_new_tokens=max_new_tokens, label=f"{arm}: dialogues"
        )
        marks = mark(dialogues, answers)
        scores |= _marks_scores(marks)
    if questions:
        known = recall(model, tokenizer, questions, label=f"{arm}: questions")
        for group in dict.fromkeys(question.group for question in questions):
            ours = [k for k, q in zip(known, questions, strict=True) if q.group == group]
            scores[f"knowledge/recall/{group}"] = _share(ours)
    return Scorecard(arm=arm, seed=seed, scores=scores, examples=_examples(marks, num_examples))


def _marks_scores(marks: Sequence[Marks]) -> dict[str, Score]:
    instructed = [m for m in marks if m.dialogue.constraints]
    plain = [m for m in marks if not m.dialogue.constraints]
    scores: dict[str, Score] = {}
    parts: dict[str, list[Marks]] = {"": instructed}
    for m in instructed:
        for part in (m.dialogue.group, m.dialogue.department):
            if part:
                parts.setdefault(f"/{part}", []).append(m)
    figures: dict[str, Callable[[Marks], Sequence[bool]]] = {
        "prompt_strict": lambda m: [all(m.strict)],
        "prompt_loose": lambda m: [all(m.loose)],
        "instruction_strict": lambda m: m.strict,
        "instruction_loose": lambda m: m.loose,
        "right_and_as_instructed": lambda m: [m.right_and_as_instructed],
    }
    for suffix, ours in parts.items():
        if ours:
            for name, figure in figures.items():
                met = [one for m in ours for one in figure(m)]
                scores[f"instructions/{name}{suffix}"] = _share(met)
    for group in dict.fromkeys(m.dialogue.group for m in plain):
        right = [m.right for m in plain if m.dialogue.group == group]
        scores[f"knowledge/asked/{group}"] = _share(right)
    return scores


def _perplexity_scores(name: str, measured: Perplexity) -> dict[str, Score]:
    """Both figures; the standard error is that of a ratio of sums over texts (jackknife-linear)."""
    mean = measured.nats_per_token
    spread = sum((nats - mean * tokens) ** 2 for nats, tokens in measured.per_text)
    stderr = math.sqrt(spread) / measured.num_tokens
    to_bits = measured.bits_per_byte / mean if mean else 0.0
    num = measured.num_tokens
    return {
        f"{name}/nats_per_token": Score(value=mean, num=num, stderr=stderr, unit="nats"),
        f"{name}/bits_per_byte": Score(
            value=measured.bits_per_byte, num=num, stderr=stderr * to_bits, unit="bits"
        ),
    }


def _share(met: Sequence[bool]) -> Score:
    value = sum(met) / len(met)
    stderr = math.sqrt(value * (1 - value) / len(met))
    return Score(value=value, num=len(met), stderr=stderr, unit="share")


def _examples(marks: Sequence[Marks], count: int) -> tuple[Example, ...]:
    step = max(1, len(marks) // count) if count else 1
    return tuple(
        Example(
            prompt=m.dialogue.messages[-1].content,
            answer=m.answer,
            right=m.right,
            as_instructed=m.as_instructed,
        )
        for m in marks[::step][:count]
    )
