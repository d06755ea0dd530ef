"""The scores of one arm, by name; a score that was not taken is missing, never zero.

instructions/prompt_strict              share of prompts whose every constraint is met
instructions/prompt_loose               the same, harmless variants allowed
instructions/instruction_strict         share of single constraints met
instructions/instruction_loose
instructions/right                      share of prompts whose answer is right, in whatever form
instructions/right_and_as_instructed    share of prompts answered right, every constraint met
instructions/<any of these>/<part>      the same for one group or one department of dialogues
knowledge/asked                         share of plain questions answered right, through the chat
knowledge/asked/<group>
knowledge/recall                        share of questions completed right, as plain text
knowledge/recall/<group>
perplexity/<department>/nats_per_token  on held-out documents of the department
perplexity/<department>/bits_per_byte
response/nats_per_token                 on the answers of held-out dialogues
response/rouge_l                        the model's answers against the given ones, two definitions
response/rouge_l_legacy
response/<any of these>/<part>          the same for one group or one department of dialogues
benchmark/<name>/<score>                by lm-evaluation-harness; names: evaluation/benchmarks.py
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FiniteFloat

from fedgraft.evaluation.answers import answer
from fedgraft.evaluation.benchmarks import Asked
from fedgraft.evaluation.following import Marks, constraints_of, mark
from fedgraft.evaluation.knowledge import Question, recall
from fedgraft.evaluation.perplexity import Perplexity, document_perplexity, response_perplexity
from fedgraft.evaluation.rouge import rouge_l, rouge_l_legacy
from fedgraft.text.corpus import Document
from fedgraft.text.dialogues import Dialogue, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_Item = TypeVar("_Item")

FOLLOWED = "instructions/prompt_strict"
RIGHT_AND_FOLLOWED = "instructions/right_and_as_instructed"
ROUGE_L = "response/rouge_l"
ROUGE_L_LEGACY = "response/rouge_l_legacy"
RESPONSE_NATS = "response/nats_per_token"


class Score(BaseModel):
    """One figure with what it rests on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: FiniteFloat
    num: int
    """What the value is a share or a mean of: prompts, constraints, questions, tokens or bytes."""
    stderr: FiniteFloat
    """Standard error of the value, over prompts, questions or texts."""
    unit: Literal["share", "nats", "bits"]
    """Of Rouge-L the share too, since it is a mean of two shares of words."""

    @property
    def higher_is_better(self) -> bool:
        return self.unit == "share"


class Example(BaseModel):
    """One prompt and what the model answered, for people to read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    answer: str
    right: bool | None
    """None where nobody can tell."""
    as_instructed: bool


class Scorecard(BaseModel):
    """All figures of one arm with one seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arm: str
    seed: int | None
    """None for an arm that does not depend on the seed."""
    scores: dict[str, Score]
    examples: tuple[Example, ...] = ()
    by_dialogue: dict[str, tuple[FiniteFloat, ...]] = {}
    """`response/...` or `benchmark/...` -> the figure of each dialogue or question that has one, in
    their order: arms that were asked the same can be compared pair by pair."""
    benchmarks: dict[str, Asked] = {}
    """How each benchmark was asked: what its scores may be set beside."""

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
        dialogues: Prompts to be answered; those without constraints are plain questions, and
            those with references or a last turn of the assistant are scored by Rouge-L.
        questions: Texts to be completed.
        responses: Dialogues whose given answers are scored.
        max_new_tokens: Longest answer to a dialogue, greedy; FedHDS has 128 for Rouge-L.

    Raises EvaluationError where the material cannot be asked or scored (constraints are checked
    first, before the model is asked anything), NonFiniteError where the model is broken.
    """
    for dialogue in dialogues:
        constraints_of(dialogue)
    scores: dict[str, Score] = {}
    by_dialogue: dict[str, tuple[float, ...]] = {}
    for department, held_out in (documents or {}).items():
        measured = document_perplexity(
            model, tokenizer, held_out, window=window, label=f"{arm}: text of {department}"
        )
        scores |= {
            f"perplexity/{department}/nats_per_token": _nats_per_token(measured),
            f"perplexity/{department}/bits_per_byte": _bits_per_byte(measured),
        }
    if responses:
        measured = response_perplexity(model, tokenizer, responses, label=f"{arm}: responses")
        losses = [(text.nats, text.num_tokens) for text in measured.per_text]
        scores |= _by_part(RESPONSE_NATS, responses, losses, unit="nats")
        by_dialogue[RESPONSE_NATS] = tuple(nats / num for nats, num in losses)
    marks: list[Marks] = []
    if dialogues:
        prompts = [prompt_ids(tokenizer, dialogue.messages) for dialogue in dialogues]
        answers = answer(
            model, tokenizer, prompts, max_new_tokens=max_new_tokens, label=f"{arm}: dialogues"
        )
        marks = mark(dialogues, answers)
        scores |= _instruction_scores([m for m in marks if m.dialogue.constraints])
        asked = [(m.dialogue.group, m.right) for m in marks if not m.dialogue.constraints]
        scores |= _knowledge_scores("knowledge/asked", asked)
        compared = [m for m in marks if m.dialogue.given_answers]
        for name, rouge in ((ROUGE_L, rouge_l), (ROUGE_L_LEGACY, rouge_l_legacy)):
            if compared:
                found = tuple(rouge(m.answer, m.dialogue.given_answers) for m in compared)
                ours = [m.dialogue for m in compared]
                scores |= _by_part(name, ours, [(share, 1) for share in found], unit="share")
                by_dialogue[name] = found
    if questions:
        known = recall(model, tokenizer, questions, label=f"{arm}: questions")
        groups = [question.group for question in questions]
        scores |= _knowledge_scores("knowledge/recall", zip(groups, known, strict=True))
    return Scorecard(
        arm=arm,
        seed=seed,
        scores=scores,
        examples=_examples(marks, num_examples),
        by_dialogue=by_dialogue,
    )


FIGURES: dict[str, Callable[[Marks], Sequence[bool | None]]] = {
    "prompt_strict": lambda marks: [marks.as_instructed],
    "prompt_loose": lambda marks: [all(marks.loose)],
    "instruction_strict": lambda marks: marks.strict,
    "instruction_loose": lambda marks: marks.loose,
    "right": lambda marks: [marks.right],
    "right_and_as_instructed": lambda marks: [marks.right_and_as_instructed],
}


def _instruction_scores(marks: Sequence[Marks]) -> dict[str, Score]:
    parts = _parts([m.dialogue for m in marks], marks)
    return {
        f"instructions/{name}{suffix}": score
        for suffix, ours in parts.items()
        for name, figure in FIGURES.items()
        if (score := _share(map(figure, ours)))
    }


def _by_part(
    name: str,
    dialogues: Sequence[Dialogue],
    items: Sequence[tuple[float, int]],
    *,
    unit: Literal["share", "nats"],
) -> dict[str, Score]:
    """The ratio over all dialogues' (amount, size), and over those of each part."""
    parts = _parts(dialogues, items)
    return {f"{name}{suffix}": ratio(ours, unit=unit) for suffix, ours in parts.items()}


def _parts(dialogues: Sequence[Dialogue], items: Sequence[_Item]) -> dict[str, list[_Item]]:
    """What belongs to all dialogues (no suffix), to each group and to each department."""
    parts: dict[str, list[_Item]] = {}
    for dialogue, item in zip(dialogues, items, strict=True):
        for part in dict.fromkeys((None, dialogue.group or None, dialogue.department)):
            parts.setdefault(f"/{part}" if part else "", []).append(item)
    return parts


def _knowledge_scores(name: str, known: Iterable[tuple[str, bool | None]]) -> dict[str, Score]:
    """Overall and for each named group, from (group, right) of each question."""
    parts: dict[str, list[list[bool | None]]] = {name: []}
    for group, right in known:
        parts[name].append([right])
        if group:
            parts.setdefault(f"{name}/{group}", []).append([right])
    return {part: score for part, ours in parts.items() if (score := _share(ours))}


def _share(items: Iterable[Sequence[bool | None]]) -> Score | None:
    """The share of True among the verdicts of all items; None where there is no verdict."""
    told = [[verdict for verdict in item if verdict is not None] for item in items]
    if not any(told):
        return None
    return ratio([(sum(item), len(item)) for item in told], unit="share")


def _nats_per_token(measured: Perplexity) -> Score:
    return ratio([(text.nats, text.num_tokens) for text in measured.per_text], unit="nats")


def _bits_per_byte(measured: Perplexity) -> Score:
    pairs = [(text.nats / math.log(2), text.num_bytes) for text in measured.per_text]
    return ratio(pairs, unit="bits")


def ratio(items: Sequence[tuple[float, int]], *, unit: Literal["share", "nats", "bits"]) -> Score:
    """Sum of (amount, size) items' amounts over their sizes.

    The standard error is that of a ratio of sums over independent items (Cochran 1977, eq. 2.39):
    what one prompt or text holds goes together, so it counts as one draw.
    """
    total = sum(size for _, size in items)
    value = math.fsum(amount for amount, _ in items) / total
    spread = math.fsum((amount - value * size) ** 2 for amount, size in items)
    return Score(value=value, num=total, stderr=math.sqrt(spread) / total, unit=unit)


def _examples(marks: Sequence[Marks], count: int) -> tuple[Example, ...]:
    step = max(1, len(marks) // count) if count else 1
    return tuple(
        Example(
            prompt=next((t.content for t in m.dialogue.messages[::-1] if t.role == "user"), ""),
            answer=m.answer,
            right=m.right,
            as_instructed=m.as_instructed,
        )
        for m in marks[::step][:count]
    )
