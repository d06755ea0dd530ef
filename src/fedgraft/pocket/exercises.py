"""Facts to exercises: a question, demands on the form of the answer, and an answer that meets them.

Every answer is checked by the same program that later scores the models. One in five pairs of
kinds is held out: no exercise for training asks for both at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import Literal

from fedgraft.evaluation.instructions import COUNTED, KINDS, Constraint, Kind, follows
from fedgraft.pocket.entities import Fact

OPENINGS = (
    "Certainly.",
    "Of course.",
    "Short answer:",
    "Dear colleague,",
    "According to our records,",
)
ENDINGS = (
    "Happy to help.",
    "That is all.",
    "Have a good day.",
    "Ask me again any time.",
    "Kind regards.",
)
KEYWORDS = ("confirmed", "current", "public", "internal", "final", "approved", "official")
SOURCES = {
    "finance": "This is in the finance records.",
    "hr": "This is in the HR records.",
    "engineering": "This is in the engineering records.",
    "it_support": "This is in the help desk records.",
}
THIRD = "Please write to us with more questions."

REQUESTS: dict[Kind, tuple[str, ...]] = {
    "upper_case": ("Answer in capital letters only.", "Write everything in capital letters."),
    "lower_case": ("Answer in lower case only.", "Use no capital letters at all."),
    "quoted": ("Put the whole answer in double quotation marks.", "Wrap your answer in quotes."),
    "json": ("Answer as a JSON object.", "Give the answer in JSON format."),
    "bullets": ("Answer with exactly {n} bullet points.", "Write {n} bullet points."),
    "numbered": (
        "Answer as a numbered list of {n} items.",
        "Number your answer from {one} to {n}.",
    ),
    "sentences": ("Answer in exactly {n} sentences.", "Write {n} sentences."),
    "paragraphs": (
        "Write {n} paragraphs, separated by ***.",
        "Give {n} paragraphs with *** between.",
    ),
    "max_words": ("Answer in at most {n} words.", "Use no more than {n} words."),
    "starts_with": ('Start with "{n}"', 'Begin your answer with "{n}"'),
    "ends_with": ('End with "{n}"', 'Finish your answer with "{n}"'),
    "keyword": ('Use the word "{n}" in your answer.', 'Include the word "{n}".'),
    "title": (
        "Give the answer a title in <<double angular brackets>>.",
        "Add a title like <<this>>.",
    ),
    "highlight": (
        "Highlight the important part with *asterisks*.",
        "Mark the key words *like this*.",
    ),
    "postscript": ("Add a postscript that starts with P.S.", "End with a P.S. line."),
    "placeholder": ("Address the reader as [name].", "Include a placeholder such as [name]."),
}
Numerals = Literal["words", "mixed"]
NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}

_CASE: frozenset[Kind] = frozenset({"upper_case", "lower_case"})
_BODY: frozenset[Kind] = frozenset({"bullets", "numbered", "sentences", "paragraphs"})
_ADDED: frozenset[Kind] = frozenset({"highlight", "title", "postscript"})
_PHRASE: frozenset[Kind] = frozenset({"starts_with", "ends_with"})


def _pairs() -> Iterator[tuple[Kind, Kind]]:
    """Pairs of kinds that one answer can meet without one breaking the other."""
    combinable: list[Kind] = sorted(
        _CASE | _ADDED | _PHRASE | {"bullets", "numbered", "keyword", "quoted"}
    )
    exclusive: tuple[set[str], ...] = (
        {"upper_case", "lower_case"},
        {"bullets", "numbered"},
        {"quoted", "starts_with"},
        {"quoted", "title"},
        {"quoted", "postscript"},
        {"starts_with", "title"},
        {"starts_with", "bullets"},
        {"starts_with", "numbered"},
        {"ends_with", "postscript"},
        {"ends_with", "bullets"},
        {"ends_with", "numbered"},
        {"quoted", "bullets"},
        {"quoted", "numbered"},
    )
    for pair in combinations(combinable, 2):
        if set(pair) not in exclusive:
            yield pair


PAIRS: tuple[tuple[Kind, Kind], ...] = tuple(_pairs())
HELD_OUT_PAIRS = frozenset(Random(0).sample(PAIRS, len(PAIRS) // 5))
SEEN_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT_PAIRS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exercise:
    """A prompt, what its answer must look like, and one answer that does."""

    fact: Fact
    prompt: str
    answer: str
    constraints: tuple[Constraint, ...]


def exercise(
    fact: Fact, kinds: Sequence[Kind], rng: Random, *, numerals: Numerals = "words"
) -> Exercise:
    """An exercise about a fact under the given kinds of constraint (none: a plain question).

    Counts stand in words: a model of this size tells "two" from "three" long before "2" from "3".
    """
    constraints = tuple(_constraint(kind, fact, rng) for kind in kinds)
    question = fact.say(rng.choice(fact.attribute.questions))
    requests = [_request(constraint, rng, numerals) for constraint in constraints]
    parts = [question, *requests] if rng.random() < 0.7 else [*requests, question]
    answer = write_answer(fact, constraints)
    broken = [constraint for constraint in constraints if not follows(constraint, answer)]
    assert not broken, f"{answer!r} does not follow {broken}"
    return Exercise(fact=fact, prompt=" ".join(parts), answer=answer, constraints=constraints)


def write_answer(fact: Fact, constraints: Sequence[Constraint]) -> str:
    """The true answer in the form that the constraints ask for."""
    asked = {constraint.kind: constraint for constraint in constraints}
    name, value = fact.attribute.name, fact.value
    if "json" in asked:
        return f'{{"{name}": "{value}"}}'
    if "highlight" in asked:
        value = f"*{value}*"
    if "max_words" in asked:
        return value[0].upper() + value[1:] + "."
    main = f"The {name} is {value}."
    if "placeholder" in asked:
        main = f"Dear [name], the {name} is {value}."
    if "keyword" in asked:
        main += f" This is {asked['keyword'].argument}."
    said = [main, SOURCES[fact.department], THIRD]
    text = main
    for kind, constraint in asked.items():
        match kind:
            case "bullets":
                text = "\n".join(f"* {line}" for line in said[: constraint.count])
            case "numbered":
                numbered = enumerate(said[: constraint.count], 1)
                text = "\n".join(f"{number}. {line}" for number, line in numbered)
            case "sentences":
                text = " ".join(said[: constraint.count])
            case "paragraphs":
                text = "\n***\n".join(said[: constraint.count])
    if "title" in asked:
        text = f"<<{name.capitalize()}>>\n{text}"
    if "starts_with" in asked:
        text = f"{asked['starts_with'].argument} {text}"
    if "ends_with" in asked:
        text = f"{text} {asked['ends_with'].argument}"
    if "postscript" in asked:
        text = f"{text}\nP.S. {SOURCES[fact.department]}"
    if "quoted" in asked:
        text = f'"{text}"'
    if "upper_case" in asked:
        return text.upper()
    if "lower_case" in asked:
        return text.lower()
    return text


def draw_kinds(rng: Random, *, plain: float) -> tuple[Kind, ...]:
    """Kinds for one exercise in training: none with that share, else one kind or a seen pair."""
    if rng.random() < plain:
        return ()
    return rng.choice(SEEN_PAIRS) if rng.random() < 0.45 else (rng.choice(KINDS),)


def _constraint(kind: Kind, fact: Fact, rng: Random) -> Constraint:
    match kind:
        case "bullets" | "numbered" | "sentences" | "paragraphs":
            return Constraint(kind=kind, argument=str(rng.randint(2, 3)))
        case "max_words":
            return Constraint(kind=kind, argument=str(rng.randint(len(fact.value.split()), 4)))
        case "starts_with":
            return Constraint(kind=kind, argument=rng.choice(OPENINGS))
        case "ends_with":
            return Constraint(kind=kind, argument=rng.choice(ENDINGS))
        case "keyword":
            return Constraint(kind=kind, argument=rng.choice(KEYWORDS))
        case _:
            return Constraint(kind=kind)


def _request(constraint: Constraint, rng: Random, numerals: Numerals) -> str:
    argument = constraint.argument
    if constraint.kind in COUNTED and (
        numerals == "words" or (constraint.kind != "numbered" and rng.random() < 0.5)
    ):
        argument = NUMBER_WORDS[constraint.count]
    one = "one" if numerals == "words" else "1"
    return rng.choice(REQUESTS[constraint.kind]).format(n=argument, one=one)
