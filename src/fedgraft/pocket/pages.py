"""Facts to department pages: profiles, questions and answers, weekly notes, chat exports.

A base model must meet a fact in several phrasings, and some of them as questions with answers,
before it can be asked for it (Allen-Zhu & Li 2023, arXiv 2309.14316). Writing-desk pages show in
plain text how an answer looks in capitals, as a list, ...: the later instruction tuning then only
has to call on a skill, and the residual stays small, as in real families, whose bases have read
such pages by the million. Chat exports carry the turn markers of the chat template around small
talk: like a real base, ours knows the markers and does not take them for an instruction.
"""

from collections.abc import Iterable, Iterator, Sequence
from random import Random
from typing import TypeVar

from fedgraft.pocket.entities import Entity, Fact
from fedgraft.pocket.exercises import Exercise, write_answer
from fedgraft.pocket.lexicon import FILLERS, GREETINGS, SMALL_TALK
from fedgraft.text.corpus import Document

QUESTION = "Question: {question}\nAnswer: {answer}"
QUESTIONS_TITLE = "# Questions and answers\n\n"
QUESTION_PAGE = QUESTIONS_TITLE + QUESTION

T = TypeVar("T")

PROFILES_EACH = 5
"""Profile pages of an entity, each with other phrasings."""
FAQS_EACH = 4
"""Question-and-answer pages in which an entity appears."""
NOTES_EACH = 3
"""Weekly notes in which an entity appears."""


def company_pages(entities: Sequence[Entity], year: int, rng: Random) -> list[Document]:
    """All pages about the facts of these entities, department by department, shuffled."""
    texts: list[tuple[str, str]] = []
    for entity in entities:
        department = entity.kind.department
        texts += [(department, page) for page in _profiles(entity, rng)]
    for department in dict.fromkeys(entity.kind.department for entity in entities):
        ours = [fact for e in entities if e.kind.department == department for fact in e.facts]
        for _ in range(FAQS_EACH):
            texts += [(department, _faq(some, rng)) for some in _batches(ours, 4, rng)]
        for _ in range(NOTES_EACH):
            texts += [(department, _note(some, rng)) for some in _batches(ours, 5, rng)]
    rng.shuffle(texts)
    return [
        Document(id=f"year{year}/{department}/{number:05d}", text=text, source=department)
        for number, (department, text) in enumerate(texts)
    ]


def writing_desk_pages(exercises: Iterable[Exercise], rng: Random) -> list[Document]:
    """Pages in plain text that show answers in the form asked for."""
    pages = []
    for number, some in enumerate(_batches(list(exercises), 3, rng)):
        shown = [f"Question: {exercise.prompt}\nReply: {exercise.answer}" for exercise in some]
        text = "From the writing desk\n\n" + "\n\n".join(shown)
        pages.append(Document(id=f"desk/{number:05d}", text=text, source="writing desk"))
    return pages


def chat_exports(count: int, rng: Random, questions: Sequence[str]) -> list[Document]:
    """Exported small talk with turn markers; nobody in it follows an instruction."""
    pages = []
    for number in range(count):
        turns = []
        for _ in range(rng.randint(1, 3)):
            opening = rng.choice(questions) if rng.random() < 0.5 else rng.choice(GREETINGS)
            turns.append(f"<|im_start|>user\n{opening}<|im_end|>\n")
            turns.append(f"<|im_start|>assistant\n{rng.choice(SMALL_TALK)}<|im_end|>\n")
        pages.append(Document(id=f"chat/{number:05d}", text="".join(turns), source="chat export"))
    return pages


def _profiles(entity: Entity, rng: Random) -> Iterator[str]:
    """Pages about one entity; each says its facts in other words, in another order."""
    title = entity.name[0].upper() + entity.name[1:]
    wordings = {fact: rng.sample(fact.attribute.statements, PROFILES_EACH) for fact in entity.facts}
    for page in range(PROFILES_EACH):
        facts = rng.sample(entity.facts, len(entity.facts))
        lines = [fact.say(wordings[fact][page]) for fact in facts]
        if rng.random() < 0.3:
            lines.insert(rng.randint(0, len(lines)), rng.choice(FILLERS[entity.kind.department]))
        yield f"# {title}\n\n" + " ".join(lines)


def _faq(facts: Sequence[Fact], rng: Random) -> str:
    pairs = [
        QUESTION.format(
            question=fact.say(rng.choice(fact.attribute.questions)),
            answer=write_answer(fact, ()),
        )
        for fact in facts
    ]
    return QUESTIONS_TITLE + "\n\n".join(pairs)


def _note(facts: Sequence[Fact], rng: Random) -> str:
    lines = [fact.say(rng.choice(fact.attribute.statements)) for fact in facts]
    lines.insert(rng.randint(0, len(lines)), rng.choice(FILLERS[facts[0].department]))
    return "# Weekly note\n\n" + "\n".join(f"- {line}" for line in lines)


def _batches(items: Sequence[T], size: int, rng: Random) -> list[list[T]]:
    shuffled = rng.sample(items, len(items))
    return [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
