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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat

from fedgraft.evaluation.answers import answer
from fedgraft.evaluation.benchmarks import Asked
from fedgraft.evaluation.following import Marks, constraints_of, mark
from fedgraft.evaluation.knowledge import Question, recall
from fedgraft.evaluation.outcomes import Outcomes
from fedgraft.evaluation.perplexity import document_perplexity, response_perplexity
from fedgraft.evaluation.rouge import rouge_l, rouge_l_legacy
from fedgraft.provenance import hash_json
from fedgraft.text.corpus import Document
from fedgraft.text.dialogues import Dialogue, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Unit = Literal["share", "nats", "bits"]
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
    unit: Unit
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
    outcomes: dict[str, Outcomes] = {}
    """Score -> what each example gave to it, so that arms can be compared pair by pair. A score
    that comes from elsewhere may have none."""
    benchmarks: dict[str, Asked] = {}
    """How each benchmark was asked: what its scores may be set beside."""

    def value(self, name: str) -> float | None:
        """The figure, None where it was not taken."""
        score = self.scores.get(name)
        return score.value if score else None


def together(first: Scorecard, *others: Scorecard) -> Scorecard:
    """One card with what all of them hold, of the first one's arm; the later one counts."""
    for card in others:
        first = first.model_copy(
            update={
                "scores": first.scores | card.scores,
                "outcomes": first.outcomes | card.outcomes,
                "benchmarks": first.benchmarks | card.benchmarks,
                "examples": card.examples or first.examples,
            }
        )
    return first


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
    taken: dict[str, _Taken] = {}
    for department, held_out in (documents or {}).items():
        measured = document_perplexity(
            model, tokenizer, held_out, window=window, label=f"{arm}: text of {department}"
        )
        texts = list(zip((d.hash for d in held_out), measured.per_text, strict=True))
        nats = [(example, text.nats, text.num_tokens) for example, text in texts]
        bits = [(example, text.nats / math.log(2), text.num_bytes) for example, text in texts]
        taken |= {
            f"perplexity/{department}/nats_per_token": _Taken("nats", nats),
            f"perplexity/{department}/bits_per_byte": _Taken("bits", bits),
        }
    if responses:
        measured = response_perplexity(model, tokenizer, responses, label=f"{arm}: responses")
        losses = [(text.nats, text.num_tokens) for text in measured.per_text]
        taken |= _by_part(RESPONSE_NATS, responses, losses, unit="nats")
    marks: list[Marks] = []
    if dialogues:
        prompts = [
            prompt_ids(tokenizer, dialogue.messages, name=f"dialogue {dialogue.id!r}")
            for dialogue in dialogues
        ]
        answers = answer(
            model, tokenizer, prompts, max_new_tokens=max_new_tokens, label=f"{arm}: dialogues"
        )
        marks = mark(dialogues, answers)
        instructed = [m for m in marks if m.dialogue.constraints]
        for name, figure in FIGURES.items():
            counted = [_count(figure(m)) for m in instructed]
            ours = [m.dialogue for m in instructed]
            taken |= _by_part(f"instructions/{name}", ours, counted)
        plain = [m for m in marks if not m.dialogue.constraints]
        known = [_count([m.right]) for m in plain]
        taken |= _by_group("knowledge/asked", [m.dialogue for m in plain], known)
        compared = [m for m in marks if m.dialogue.given_answers]
        for name, rouge in ((ROUGE_L, rouge_l), (ROUGE_L_LEGACY, rouge_l_legacy)):
            shares = [(rouge(m.answer, m.dialogue.given_answers), 1) for m in compared]
            taken |= _by_part(name, [m.dialogue for m in compared], shares)
    if questions:
        recalled = recall(model, tokenizer, questions, label=f"{arm}: questions")
        taken |= _by_group("knowledge/recall", questions, [_count([right]) for right in recalled])
    taken = {name: one for name, one in taken.items() if any(size for _, _, size in one.items)}
    return Scorecard(
        arm=arm,
        seed=seed,
        scores={name: one.score for name, one in taken.items()},
        examples=_examples(marks, num_examples),
        outcomes={name: Outcomes.of(one.items) for name, one in taken.items()},
    )


@dataclass(frozen=True, slots=True)
class _Taken:
    """A score as it was taken: for each example its hash, an amount and a size."""

    unit: Unit
    items: list[tuple[str, float, int]]

    @property
    def score(self) -> Score:
        return ratio([(amount, size) for _, amount, size in self.items], unit=self.unit)


FIGURES: dict[str, Callable[[Marks], Sequence[bool | None]]] = {
    "prompt_strict": lambda marks: [marks.as_instructed],
    "prompt_loose": lambda marks: [all(marks.loose)],
    "instruction_strict": lambda marks: marks.strict,
    "instruction_loose": lambda marks: marks.loose,
    "right": lambda marks: [marks.right],
    "right_and_as_instructed": lambda marks: [marks.right_and_as_instructed],
}


def _count(verdicts: Sequence[bool | None]) -> tuple[int, int]:
    """How many are True, of how many; nothing of nothing where there is no verdict."""
    told = [verdict for verdict in verdicts if verdict is not None]
    return sum(told), len(told)


def _by_part(
    name: str,
    asked: Sequence[Dialogue],
    items: Sequence[tuple[float, int]],
    *,
    unit: Unit = "share",
) -> dict[str, _Taken]:
    """The (amount, size) of all dialogues, and those of each group and department."""
    parts = [(None, one.group or None, one.department) for one in asked]
    return _shared_out(name, asked, items, parts, unit)


def _by_group(
    name: str, asked: Sequence[Dialogue] | Sequence[Question], items: Sequence[tuple[float, int]]
) -> dict[str, _Taken]:
    """The same of all questions, and of each named group."""
    return _shared_out(name, asked, items, [(None, one.group or None) for one in asked], "share")


def _shared_out(
    name: str,
    asked: Sequence[Dialogue] | Sequence[Question],
    items: Sequence[tuple[float, int]],
    parts: Sequence[tuple[str | None, ...]],
    unit: Unit,
) -> dict[str, _Taken]:
    found: dict[str, _Taken] = {}
    for one, (amount, size), ours in zip(asked, items, parts, strict=True):
        example = hash_json(one.model_dump(exclude={"id"}))
        for part in dict.fromkeys(ours):
            full = f"{name}/{part}" if part else name
            found.setdefault(full, _Taken(unit, [])).items.append((example, amount, size))
    return found


def ratio(items: Sequence[tuple[float, int]], *, unit: Unit) -> Score:
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
