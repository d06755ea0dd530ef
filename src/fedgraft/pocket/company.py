"""The company on disk: what a study of the embedded family reads.

    year1/<department>.jsonl          pages that the embedded base has read
    year2/<department>.jsonl          pages for continued pre-training: new entities, changed facts
    replay.jsonl                      old text to mix in: pages of year 1 of all departments
    desk.jsonl                        writing-desk pages, and
    chats.jsonl                       exported small talk: the rest of what the embedded base read
    dialogues/train.jsonl             what the embedded instruct model was tuned on
    dialogues/validation.jsonl        questions about entities of the validation part
    dialogues/test.jsonl              questions about entities of the test part
    dialogues/departments.jsonl       what people asked each department, for clients to train on
    questions/validation.jsonl        the same facts as text to be completed
    questions/test.jsonl

A dialogue's group says what it asks for: `old` facts, `new` facts, or `unseen_pairs`, old facts
under two constraints that no dialogue for training combines. Scored dialogues have one answer that
would do as their reference, and none in their turns.

What departments were asked is as uneven as real tickets are, by a law that was written down before
any of it was drawn or any choice of examples was tried on it:

    a quarter repeats an earlier one       the same fact under the same kinds of demand in other
                                           words (now and then the same ones); every earlier one
                                           alike, so that what was asked often is asked more often
    else  topic, entity, demands           drawn apart, each from the department's own order: what
                                           stands at place r with a weight of 1 / r (Zipf)
    demands                                none for 20 %, a pair for 36 %, a single kind for 44 %

A topic is a kind of entity and what is asked of it (`budget amount`, `policy review month`, four or
five a department): the dialogue's group, and the true label for whoever clusters them. Entities are
of the part `train` and pairs of constraints are those that training combines, so nothing that is
scored stands in it.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import TypeVar

from pydantic import BaseModel

from fedgraft.evaluation.instructions import KINDS, Kind
from fedgraft.evaluation.knowledge import Question
from fedgraft.pocket.entities import Company, Fact, Part
from fedgraft.pocket.exercises import (
    HELD_OUT_PAIRS,
    SEEN_PAIRS,
    Exercise,
    Numerals,
    draw_kinds,
    exercise,
)
from fedgraft.pocket.lexicon import DEPARTMENTS
from fedgraft.pocket.pages import (
    QUESTION_PAGE,
    chat_exports,
    company_pages,
    writing_desk_pages,
)
from fedgraft.provenance import Record, derive_seed, new_artefact
from fedgraft.text.corpus import Document
from fedgraft.text.dialogues import Demand, Dialogue, Message

SEED = 0
"""The company whose year 1 the embedded base has read."""

NUM_DESK_EXERCISES = 12_000
NUM_CHATS = 800

NUM_TRAINING_DIALOGUES = 20_000
NUM_SCORED = {"old": 120, "new": 120, "unseen_pairs": 40}
"""Dialogues with constraints in each scored file, by group."""
NUM_PLAIN = 80
"""Dialogues without constraints in each scored file, for old and for new facts."""

NUM_ASKED = 1_000
"""Dialogues of each department."""
REPEATED, PLAIN, PAIRED = 0.25, 0.2, 0.45
"""Shares: of all that repeat, of the others without demands, of the rest under a pair of them."""

_Drawn = TypeVar("_Drawn")


def write_company(folder: Path, seed: int = SEED, *, overwrite: bool = False) -> Path:
    """Write a company's texts, dialogues and questions; the same seed gives the same bytes.

    Raises ArtefactError where the folder holds something already (unless `overwrite`).
    """
    company = Company.found(seed)
    with new_artefact(folder, overwrite=overwrite) as partial:
        old_pages = pages_of_year(company, 1, seed)
        for year, pages in ((1, old_pages), (2, pages_of_year(company, 2, seed))):
            for department in DEPARTMENTS:
                ours = [page for page in pages if page.source == department]
                _write_pages(partial / f"year{year}" / f"{department}.jsonl", ours)
        _write_pages(partial / "replay.jsonl", old_pages)
        _write_pages(partial / "desk.jsonl", desk_pages(company, seed))
        _write_pages(partial / "chats.jsonl", small_talk(company, seed))
        _write_rows(partial / "dialogues" / "train.jsonl", training_dialogues(company, seed))
        asked = [d for name in DEPARTMENTS for d in asked_of(company, name, seed)]
        _write_rows(partial / "dialogues" / "departments.jsonl", asked)
        for part in ("validation", "test"):
            _write_rows(partial / "dialogues" / f"{part}.jsonl", dialogues(company, part, seed))
            _write_rows(partial / "questions" / f"{part}.jsonl", questions(company, part, seed))
        Record.make("company", settings={"seed": seed}).write(partial)
    return folder


def pages_of_year(company: Company, year: int, seed: int) -> list[Document]:
    """The departments' pages of year 1 (everything) or year 2 (what is new or changed)."""
    entities = company.year1 if year == 1 else company.year2
    return company_pages(entities, year, Random(derive_seed(seed, "pages", year)))


def desk_pages(company: Company, seed: int) -> list[Document]:
    """Writing-desk pages: how answers look in capitals, as a list, with a title."""
    exercises = training_exercises(company, NUM_DESK_EXERCISES, seed, numerals="mixed")
    return writing_desk_pages(exercises, Random(derive_seed(seed, "recipe", "writing desk")))


def small_talk(company: Company, seed: int) -> list[Document]:
    """Chats between turn markers in which nobody follows an instruction."""
    rng = Random(derive_seed(seed, "recipe", "plain questions"))
    facts = company.facts("train", "old")
    asked = [fact.say(rng.choice(fact.attribute.questions)) for fact in facts]
    return chat_exports(NUM_CHATS, Random(derive_seed(seed, "recipe", "chats")), asked)


def training_exercises(
    company: Company, count: int, seed: int, *, numerals: Numerals = "words"
) -> list[Exercise]:
    """Exercises about entities of the training part, a fifth of them plain questions."""
    rng = Random(derive_seed(seed, "exercises", count))
    facts = company.facts("train", "old")
    return [
        exercise(facts[number % len(facts)], draw_kinds(rng, plain=0.2), rng, numerals=numerals)
        for number in range(count)
    ]


def training_dialogues(company: Company, seed: int) -> list[Dialogue]:
    """What the instruct model of the family is tuned on."""
    exercises = training_exercises(company, NUM_TRAINING_DIALOGUES, seed)
    return [
        _dialogue(f"train/{number:05d}", some, "old", answer=True)
        for number, some in enumerate(exercises)
    ]


def asked_of(company: Company, department: str, seed: int) -> list[Dialogue]:
    """What people asked a department, with good answers; the law stands at the head of this file.

    The earlier of two that repeat each other has the lower number.
    """
    rng = Random(derive_seed(seed, "asked", department))
    topics: dict[str, list[Fact]] = {}
    ours = [e for e in company.year1 if e.kind.department == department and e.part == "train"]
    for entity in rng.sample(ours, len(ours)):
        for fact in entity.facts:
            topics.setdefault(f"{entity.kind.name} {fact.attribute.name}", []).append(fact)
    order = rng.sample(sorted(topics), len(topics))
    singles, pairs = rng.sample(KINDS, len(KINDS)), rng.sample(SEEN_PAIRS, len(SEEN_PAIRS))
    drawn: list[tuple[str, Fact, tuple[Kind, ...]]] = []
    written = []
    for number in range(NUM_ASKED):
        if drawn and rng.random() < REPEATED:
            topic, fact, kinds = rng.choice(drawn)
        else:
            topic = _zipf(rng, order)
            fact = _zipf(rng, topics[topic])
            kinds = ()
            if rng.random() >= PLAIN:
                kinds = _zipf(rng, pairs) if rng.random() < PAIRED else (_zipf(rng, singles),)
        drawn.append((topic, fact, kinds))
        name = f"departments/{department}/{number:04d}"
        written.append(_dialogue(name, exercise(fact, kinds, rng), topic, answer=True))
    return written


def _zipf(rng: Random, ordered: Sequence[_Drawn]) -> _Drawn:
    """One of the items; the one at place r (from 1) with a weight of 1 / r."""
    return rng.choices(ordered, [1 / place for place in range(1, len(ordered) + 1)])[0]


def dialogues(company: Company, part: Part, seed: int) -> list[Dialogue]:
    """Dialogues to be scored: 60 % single constraints, the rest pairs, and plain questions."""
    rng = Random(derive_seed(seed, "dialogues", part))
    facts = {group: company.facts(part, group) for group in ("old", "new")}
    facts["unseen_pairs"] = facts["old"]
    unseen = sorted(HELD_OUT_PAIRS)
    written = []
    for group, count in NUM_SCORED.items():
        ours = rng.sample(facts[group], len(facts[group]))
        for number in range(count):
            kinds: tuple[Kind, ...]
            if group == "unseen_pairs":
                kinds = unseen[number % len(unseen)]
            elif rng.random() < 0.6:
                kinds = (rng.choice(KINDS),)
            else:
                kinds = rng.choice(SEEN_PAIRS)
            asked = exercise(ours[number % len(ours)], kinds, rng)
            written.append(_dialogue(f"{part}/{group}/{number:04d}", asked, group))
    for group in ("old", "new"):
        for number, fact in enumerate(_some(facts[group], rng)):
            plain = exercise(fact, (), rng)
            written.append(_dialogue(f"{part}/{group}/plain/{number:04d}", plain, group))
    return written


def questions(company: Company, part: Part, seed: int) -> list[Question]:
    """Facts as the beginning of a question-and-answer page, for models that know no chat."""
    rng = Random(derive_seed(seed, "questions", part))
    written = []
    for group in ("old", "new"):
        for number, fact in enumerate(_some(company.facts(part, group), rng)):
            asked = fact.say(rng.choice(fact.attribute.questions))
            written.append(
                Question(
                    id=f"{part}/{group}/{number:04d}",
                    department=fact.department,
                    prompt=QUESTION_PAGE.format(question=asked, answer="").rstrip(),
                    accepted=(fact.value,),
                    group=group,
                )
            )
    return written


def _some(facts: list[Fact], rng: Random) -> list[Fact]:
    return rng.sample(facts, min(NUM_PLAIN, len(facts)))


def _dialogue(name: str, asked: Exercise, group: str, *, answer: bool = False) -> Dialogue:
    messages = [Message(role="user", content=asked.prompt)]
    if answer:
        messages.append(Message(role="assistant", content=asked.answer))
    return Dialogue(
        id=name,
        messages=tuple(messages),
        department=asked.fact.department,
        constraints=tuple(Demand(kind=c.kind, argument=c.argument) for c in asked.constraints),
        accepted=(asked.fact.value,),
        references=() if answer else (asked.answer,),
        group=group,
    )


def _write_pages(file: Path, pages: Iterable[Document]) -> None:
    class Page(BaseModel):
        id: str
        department: str
        text: str

    _write_rows(file, [Page(id=p.id, department=p.source, text=p.text) for p in pages])


def _write_rows(file: Path, rows: Iterable[BaseModel]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(row.model_dump_json() + "\n" for row in rows)
