"""Instructions that a program can check: sixteen kinds of constraint on the form of an answer.

The kinds follow IFEval (Zhou et al. 2023, arXiv 2311.07911), in the sizes that a small model can
write. As there, the strict check looks at the answer as it is; the loose check accepts an answer
of which a harmless variant passes (first or last line dropped, asterisks removed). We differ from
the released IFEval code in that an empty answer follows nothing, and in that a phrase to start with
counts (IFEval has only the end).
"""

import json
import re
from collections.abc import Callable
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, model_validator

from fedgraft.errors import EvaluationError

Kind = Literal[
    "upper_case",
    "lower_case",
    "quoted",
    "json",
    "bullets",
    "numbered",
    "sentences",
    "paragraphs",
    "max_words",
    "starts_with",
    "ends_with",
    "keyword",
    "title",
    "highlight",
    "postscript",
    "placeholder",
]
KINDS: tuple[Kind, ...] = get_args(Kind)
COUNTED: frozenset[Kind] = frozenset(
    {"bullets", "numbered", "sentences", "paragraphs", "max_words"}
)
PHRASED: frozenset[Kind] = frozenset({"starts_with", "ends_with", "keyword"})


class Constraint(BaseModel):
    """One demand on the form of an answer; `argument` is a count, a phrase, or empty."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    argument: str = ""

    @model_validator(mode="after")
    def _argument_fits(self) -> "Constraint":
        if self.kind in COUNTED and not (self.argument.isdecimal() and int(self.argument) > 0):
            raise ValueError(f"{self.kind} needs a count above zero, found {self.argument!r}")
        if self.kind in PHRASED and not self.argument.strip():
            raise ValueError(f"{self.kind} needs a phrase, found {self.argument!r}")
        if self.kind not in COUNTED | PHRASED and self.argument:
            raise ValueError(f"{self.kind} takes no argument, found {self.argument!r}")
        return self

    @property
    def count(self) -> int:
        return int(self.argument)


def follows(constraint: Constraint, answer: str) -> bool:
    """Whether the answer obeys the constraint as it stands (strict); an empty answer never does."""
    text = answer.strip()
    if not text:
        return False
    match constraint.kind:
        case "upper_case":
            return text.isupper()
        case "lower_case":
            return text.islower()
        case "quoted":
            return len(text) > 2 and text.startswith('"') and text.endswith('"')
        case "json":
            return _is_json_object(text)
        case "bullets":
            return _num_lines(r"\s*[*\-]\s+\S", text) == constraint.count
        case "numbered":
            return _num_lines(r"\s*\d+[.)]\s+\S", text) == constraint.count
        case "sentences":
            return len(sentences(text)) == constraint.count
        case "paragraphs":
            parts = re.split(r"\s*\n\s*\*\*\*\s*\n\s*", text)
            return len(parts) == constraint.count and all(part.strip() for part in parts)
        case "max_words":
            return len(re.findall(r"\w+", text)) <= constraint.count
        case "starts_with":
            return text.lower().startswith(constraint.argument.lower())
        case "ends_with":
            return text.rstrip('"').lower().endswith(constraint.argument.lower())
        case "keyword":
            return contains(text, constraint.argument)
        case "title":
            return re.search(r"<<[^\n<>]*\w[^\n<>]*>>", text) is not None
        case "highlight":
            return re.search(r"(?<!\*)\*[^\n*\s][^\n*]*\*(?!\*)", text) is not None
        case "postscript":
            return re.search(r"^\s*p\.\s?s\.\s*\S", text, re.IGNORECASE | re.MULTILINE) is not None
        case "placeholder":
            return re.search(r"\[[^\[\]\n]+\]", text) is not None


def follows_loosely(constraint: Constraint, answer: str) -> bool:
    """Whether the answer, or a harmless variant of it, obeys the constraint."""
    return any(follows(constraint, variant) for variant in loose_variants(answer))


def loose_variants(answer: str) -> tuple[str, ...]:
    """The answer and its seven variants of IFEval: ends dropped by the line, asterisks removed."""
    lines = answer.split("\n")
    kept = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return (*kept, *(text.replace("*", "") for text in kept))


def contains(text: str, phrase: str) -> bool:
    """Whether the phrase stands on its own in the text, in any case.

    "art" is not in "part", and "200" is neither in "1,200" nor in "200.5". A blank phrase is in
    no text.
    """
    alone = rf"(?<!\w)(?<!\d[.,]){re.escape(phrase)}(?!\w)(?![.,]\d)"
    return bool(phrase.strip()) and re.search(alone, text, re.IGNORECASE) is not None


def sentences(text: str) -> list[str]:
    """The sentences of a short answer: split after . ! ? at the end of a word of two characters."""
    return [part for part in re.split(r"(?<=[\w)\]\"'*]{2}[.!?])\s+", text.strip()) if part.strip()]


def describe(constraint: Constraint) -> str:
    """The demand in words, as it stands in a report."""
    match constraint.kind:
        case "upper_case":
            return "all in capital letters"
        case "lower_case":
            return "all in lower case"
        case "quoted":
            return "in double quotation marks"
        case "json":
            return "as a JSON object"
        case "bullets":
            return f"as {constraint.count} bullet points"
        case "numbered":
            return f"as a numbered list of {constraint.count}"
        case "sentences":
            return f"in exactly {constraint.count} sentences"
        case "paragraphs":
            return f"in {constraint.count} paragraphs parted by ***"
        case "max_words":
            return f"in at most {constraint.count} words"
        case "starts_with":
            return f'starting with "{constraint.argument}"'
        case "ends_with":
            return f'ending with "{constraint.argument}"'
        case "keyword":
            return f'with the word "{constraint.argument}"'
        case "title":
            return "with a title in <<double angular brackets>>"
        case "highlight":
            return "with a part *highlighted*"
        case "postscript":
            return "with a P.S."
        case "placeholder":
            return "with a [placeholder]"


def parse(kind: str, argument: str = "") -> Constraint:
    """A constraint from a file or a command line.

    Raises EvaluationError for an unknown kind or an argument that does not fit it.
    """
    try:
        return Constraint.model_validate({"kind": kind, "argument": argument})
    except ValueError as error:
        raise EvaluationError(
            f"expected a constraint of one of the kinds {', '.join(KINDS)}, found {kind!r} with "
            f"argument {argument!r}: {error}; correct the dialogue that asks for it"
        ) from error


def _num_lines(pattern: str, text: str) -> int:
    matches: Callable[[str], object] = re.compile(pattern).match
    return sum(1 for line in text.splitlines() if matches(line))


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False
