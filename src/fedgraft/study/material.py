"""What the models of a study read and are asked: its texts, split, and its questions.

text of a department ---- split by hash --> train | validation | test
        |                                     |         |         |
        +-- partition --> client 1 of it    its own part of each
                          client 2 ...
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from fedgraft.errors import FederationError, StudyError
from fedgraft.evaluation.knowledge import Question, load_questions
from fedgraft.federation.partition import Partition
from fedgraft.provenance import derive_seed, hash_json
from fedgraft.study.study import Scored, Study, Texts
from fedgraft.text.corpus import Corpus, Document, Splits, split
from fedgraft.text.dialogues import Dialogue, load_dialogues
from fedgraft.text.examples import Example
from fedgraft.text.tasks import load_instructions

_Asked = TypeVar("_Asked", Dialogue, Question)
_Example = TypeVar("_Example", bound=Example)
Clients = Mapping[str, Mapping[str, Splits[Document]]]
"""Department -> its clients -> the documents of each."""
Owners = Mapping[str, Mapping[str, Splits[Example]]]
"""Department -> its clients -> the documents of each, or the dialogues."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """Everything that the models of a study read or are scored on."""

    splits: dict[str, Splits[Document]]
    """By department; the models of a study read all of them."""
    domains: dict[str, Splits[Document]]
    """Texts that models of their own read, see `study.forgetting`."""
    replay: tuple[Document, ...]
    validation_dialogues: tuple[Dialogue, ...]
    test_dialogues: tuple[Dialogue, ...]
    test_questions: tuple[Question, ...]

    @classmethod
    def load(cls, study: Study) -> "Material":
        """Read the texts of a study.

        Raises CorpusError, DialogueError or EvaluationError for what cannot be read, StudyError
        where a department or a domain has too few documents to hold some out.
        """
        splits = {name: split_texts("department", name, t) for name, t in study.departments.items()}
        domains = study.curve.domains.texts if study.curve and study.curve.domains else {}
        held_out = {d.hash for s in splits.values() for d in (*s.validation, *s.test)}
        old = load_texts(study.replay).documents if study.replay else ()
        dialogues, questions = study.dialogues, study.questions
        return cls(
            splits=splits,
            domains={name: split_texts("domain", name, texts) for name, texts in domains.items()},
            replay=tuple(document for document in old if document.hash not in held_out),
            validation_dialogues=_asked(load_dialogues, dialogues, "validation"),
            test_dialogues=_asked(load_dialogues, dialogues, "test"),
            test_questions=_asked(load_questions, questions, "test"),
        )

    @property
    def new(self) -> tuple[Document, ...]:
        """The new text of all departments, one after the other."""
        return tuple(document for split in self.splits.values() for document in split.train)

    @property
    def training_hash(self) -> str:
        """Hash of every document that is trained on, in order."""
        return hash_documents(self.new, self.replay)

    @property
    def test_hash(self) -> str:
        held_out = {name: [d.hash for d in split.test] for name, split in self.splits.items()}
        dialogues = [d.model_dump() for d in self.test_dialogues]
        return hash_json([held_out, dialogues, [q.model_dump() for q in self.test_questions]])

    def held_out(self, limit: int | None) -> dict[str, list[Document]]:
        """The test documents of each department, at most so many, the first by hash."""
        return {name: first_by_hash(split.test, limit) for name, split in self.splits.items()}


def hash_documents(*parts: Iterable[Example]) -> str:
    """Hash of documents, or dialogues, in their order, part by part."""
    return hash_json([[example.hash for example in part] for part in parts])


def first_by_hash(examples: Iterable[_Example], limit: int | None) -> list[_Example]:
    """At most so many documents, or dialogues, chosen by what they say alone."""
    return sorted(examples, key=lambda example: example.hash)[:limit]


def at_equal_distances(dialogues: Sequence[Dialogue], limit: int | None) -> list[Dialogue]:
    """At most so many, spread over the whole, so that no group is left out for its place."""
    if limit is None or limit >= len(dialogues):
        return list(dialogues)
    return [dialogues[number * len(dialogues) // limit] for number in range(limit)]


def shared_out(
    departments: Mapping[str, Splits[_Example]], partition: Partition, seed: int
) -> dict[str, dict[str, Splits[_Example]]]:
    """Give the documents, or dialogues, of each department to its clients; each stays in its part.

    A client of `departments` is named `hr-1`, those of other partitions by their own last name,
    such as `hr-2` or `hr-translation`.

    Raises StudyError, with all clients at once, where one has nothing to train on or to be scored
    on (validation), and with the department where it cannot be parted.
    """
    seeded = partition.model_copy(update={"seed": derive_seed(seed, "clients", partition.seed)})
    clients = {name: _parted(name, split, seeded) for name, split in departments.items()}
    faults = [
        f"  {client}: nothing for {part}, of {len(splits.train)} for train, "
        f"{len(splits.validation)} for validation"
        for members in clients.values()
        for client, splits in members.items()
        for part in ("train", "validation")
        if not getattr(splits, part)
    ]
    if faults:
        raise StudyError(
            "expected examples to train on and to hold out for each client (about a tenth is held "
            f"out), found {len(faults)} without; ask for fewer clients or add text:\n"
            + "\n".join(faults)
        )
    return clients


def _parted(
    department: str, splits: Splits[_Example], partition: Partition
) -> dict[str, Splits[_Example]]:
    examples = [*splits.train, *splits.validation, *splits.test]
    fields: dict[str, list[str | None]] = {"department": [department] * len(examples)}
    field = partition.label_field
    if field and field != "department":
        fields = {field: [label_of(example, field) for example in examples]}
    try:
        places = partition.clients(fields, ids=[example.hash for example in examples])
    except FederationError as error:
        raise StudyError(f"department {department}: {error}") from error
    own = department if partition.label_field == "department" else ""
    members = {
        client if own else f"{department}-{client.removeprefix('client-')}": {
            examples[place].hash for place in chosen
        }
        for client, chosen in places.items()
    }
    return {
        client: Splits(
            train=tuple(one for one in splits.train if one.hash in ours),
            validation=tuple(one for one in splits.validation if one.hash in ours),
            test=tuple(one for one in splits.test if one.hash in ours),
        )
        for client, ours in members.items()
    }


def label_of(example: Example, field: str) -> str | None:
    """What a document's source, or a dialogue, says of a field, such as its group."""
    if isinstance(example, Document):
        return example.facts.get(field)
    return {"group": example.group or None, "department": example.department}.get(field)


def split_texts(kind: str, name: str, texts: Texts) -> Splits[Document]:
    """The text of a department or a domain, split.

    Raises CorpusError for what cannot be read, StudyError for too little to hold some out.
    """
    return _checked(kind, name, load_texts(texts, name).split(), "documents")


def split_dialogues(kind: str, name: str, files: Iterable[str]) -> Splits[Dialogue]:
    """The dialogues of a department, split as documents are; copies are dropped.

    One that ends with a question, and has no answer before, is answered by its first reference.

    Raises as `load_instructions` for what cannot be read, DialogueError for a dialogue without any
    answer, StudyError for too few to hold some out.
    """
    dialogues = [
        one if any(turn.role == "assistant" for turn in one.messages) else one.answered()
        for file in files
        for one in load_instructions(file)
    ]
    return _checked(kind, name, split(dialogues), "dialogues")


def _checked(kind: str, name: str, splits: Splits[_Example], noun: str) -> Splits[_Example]:
    empty = [part for part in ("train", "validation", "test") if not getattr(splits, part)]
    if empty:
        raise StudyError(
            f"{kind} {name}: expected enough {noun} to hold some out, found none for "
            f"{' and '.join(empty)}; add {noun}"
        )
    return splits


def load_texts(texts: Texts, department: str | None = None) -> Corpus:
    return Corpus.load(*texts.corpus, department=department, field=texts.field)


def asked(
    load: Callable[[str], tuple[_Asked, ...]], file: str, groups: tuple[str, ...] | None
) -> tuple[_Asked, ...]:
    """What a file asks, of the groups that count.

    Raises StudyError where it has none of them.
    """
    rows = load(file)
    kept = tuple(row for row in rows if groups is None or row.group in groups)
    if not kept:
        raise StudyError(
            f"{file}: expected rows of the groups {', '.join(groups or ())}, found only "
            f"{', '.join(sorted({row.group for row in rows}))}; correct `groups`"
        )
    return kept


def _asked(
    load: Callable[[str], tuple[_Asked, ...]],
    scored: Scored | None,
    part: Literal["validation", "test"],
) -> tuple[_Asked, ...]:
    """What is asked in one part, of the groups that the study names."""
    return asked(load, getattr(scored, part), scored.groups) if scored else ()
