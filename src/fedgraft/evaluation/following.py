"""Answers to dialogues, scored: is the form as instructed, is the content right, are both.

The four figures of IFEval (arXiv 2311.07911): of prompts (all constraints met) or of single
instructions, strict or loose. We add whether the answer is right, and whether it is right *and* as
instructed, since a model can shout nonsense in flawless capitals.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedgraft.evaluation.instructions import follows, follows_loosely, parse
from fedgraft.evaluation.knowledge import is_right
from fedgraft.text.dialogues import Dialogue


@dataclass(frozen=True, kw_only=True, slots=True)
class Marks:
    """What one answer got."""

    dialogue: Dialogue
    answer: str
    strict: tuple[bool, ...]
    """For each constraint of the dialogue."""
    loose: tuple[bool, ...]
    right: bool

    @property
    def as_instructed(self) -> bool:
        return all(self.strict)

    @property
    def right_and_as_instructed(self) -> bool:
        return self.right and self.as_instructed


def mark(dialogues: Sequence[Dialogue], answers: Sequence[str]) -> list[Marks]:
    """Mark each answer against its dialogue's constraints and accepted phrases.

    Raises EvaluationError for a constraint of an unknown kind.
    """
    marks = []
    for dialogue, text in zip(dialogues, answers, strict=True):
        constraints = [parse(demand.kind, demand.argument) for demand in dialogue.constraints]
        marks.append(
            Marks(
                dialogue=dialogue,
                answer=text,
                strict=tuple(follows(constraint, text) for constraint in constraints),
                loose=tuple(follows_loosely(constraint, text) for constraint in constraints),
                right=is_right(text, dialogue.accepted),
            )
        )
    return marks
