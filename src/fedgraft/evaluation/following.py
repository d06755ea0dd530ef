"""Answers to dialogues, scored: is the form as instructed, is the content right, are both.

The four figures of IFEval (arXiv 2311.07911): of prompts (all constraints met) or of single
instructions, strict or loose. We add whether the answer is right, and whether it is right *and* as
instructed, since a model can shout nonsense in flawless capitals.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedgraft.errors import EvaluationError
from fedgraft.evaluation.instructions import Constraint, follows, follows_loosely, parse
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
    right: bool | None
    """None where the dialogue names no accepted phrase, so that nobody can tell."""

    @property
    def as_instructed(self) -> bool:
        return all(self.strict)

    @property
    def right_and_as_instructed(self) -> bool | None:
        return None if self.right is None else self.right and self.as_instructed


def mark(dialogues: Sequence[Dialogue], answers: Sequence[str]) -> list[Marks]:
    """Mark each answer against its dialogue's constraints and accepted phrases.

    Raises EvaluationError as `constraints_of` does.
    """
    marks = []
    for dialogue, text in zip(dialogues, answers, strict=True):
        constraints = constraints_of(dialogue)
        marks.append(
            Marks(
                dialogue=dialogue,
                answer=text,
                strict=tuple(follows(constraint, text) for constraint in constraints),
                loose=tuple(follows_loosely(constraint, text) for constraint in constraints),
                right=is_right(text, dialogue.accepted) if dialogue.accepted else None,
            )
        )
    return marks


def constraints_of(dialogue: Dialogue) -> tuple[Constraint, ...]:
    """The dialogue's demands as constraints that a program can check.

    Raises EvaluationError, naming the dialogue, for an unknown kind or a bad argument.
    """
    try:
        return tuple(parse(demand.kind, demand.argument) for demand in dialogue.constraints)
    except EvaluationError as error:
        raise EvaluationError(f"dialogue {dialogue.id!r}: {error}") from error
