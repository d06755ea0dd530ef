"""What the models of a study read and are asked: its texts, split, and its questions.

corpus of a department -- split by hash --> train | validation | test
        |                                     |         |         |
        +-- partition --> client 1 of it    its own part of each
                          client 2 ...
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from fedgraft.errors import FederationError, StudyError
from fedgraft.evaluation.knowledge import Question, load_questions
from fedgraft.federation.partition import Partition
from fedgraft.provenance import derive_seed, hash_json
from fedgraft.study.study import Scored, Study, Texts
from fedgraft.text.corpus import Corpus, Document, Splits
from fedgraft.text.dialogues import Dialogue, load_dialogues

_Asked = TypeVar("_Asked", Dialogue, Question)
Clients = Mapping[str, Mapping[str, Splits]]
"""Department -> its clients -> the documents of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """Everything that the models of a study read or are scored on."""

    splits: dict[str, Splits]
    """By department; the models of a study read all of them."""
    domains: dict[str, Splits]
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


def hash_documents(*parts: Iterable[Document]) -> str:
    """Hash of documents in their order, part by part."""
    return hash_json([[document.hash for document in part] for part in parts])


def first_by_hash(documents: Iterable[Document], limit: int | None) -> list[Document]:
    """At most so many documents, chosen by their text alone."""
    return sorted(documents, key=lambda document: document.hash)[:limit]


def shared_out(departments: Mapping[str, Splits], partition: Partition, seed: int) -> Clients:
    """Give the documents of each department to its clients; a document stays in its part.

    A client of `departments` is named `hr-1`, those of other partitions by their own last name,
    such as `hr-2` or `hr-translation`.

    Raises StudyError, with all clients at once, where one has nothing to train on or to be scored
    on (validation), and with the department where it cannot be parted.
    """
    seeded = partition.model_copy(update={"seed": derive_seed(seed, "clients", partition.seed)})
    clients = {name: _parted(name, split, seeded) for name, split in departments.items()}
    faults = [
        f"  {client}: no document for {part}, of {len(splits.train)} for train, "
        f"{len(splits.validation)} for validation"
        for members in clients.values()
        for client, splits in members.items()
        for part in ("train", "validation")
        if not getattr(splits, part)
    ]
    if faults:
        raise StudyError(
            "expected documents to train on and to hold out for each client (about a tenth is held "
            f"out), found {len(faults)} without; ask for fewer clients or add text:\n"
            + "\n".join(faults)
        )
    return clients


def _parted(department: str, splits: Splits, partition: Partition) -> dict[str, Splits]:
    documents = [*splits.train, *splits.validation, *splits.test]
    fields: dict[str, list[str | None]] = {"department": [department] * len(documents)}
    field = partition.label_field
    if field and field != "department":
        fields = {field: [document.facts.get(field) for document in documents]}
    try:
        places = partition.clients(fields, ids=[document.hash for document in documents])
    except FederationError as error:
        raise StudyError(f"department {department}: {error}") from error
    own = department if partition.label_field == "department" else ""
    members = {
        client if own else f"{department}-{client.removeprefix('client-')}": {
            documents[place].hash for place in chosen
        }
        for client, chosen in places.items()
    }
    return {
        client: Splits(
            train=tuple(d for d in splits.train if d.hash in ours),
            validation=tuple(d for d in splits.validation if d.hash in ours),
            test=tuple(d for d in splits.test if d.hash in ours),
        )
        for client, ours in members.items()
    }


def split_texts(kind: str, name: str, texts: Texts) -> Splits:
    """The text of a department or a domain, split.

    Raises CorpusError for what cannot be read, StudyError for too little to hold some out.
    """
    split = load_texts(texts, name).split()
    empty = [part for part in ("train", "validation", "test") if not getattr(split, part)]
    if empty:
        raise StudyError(
            f"{kind} {name}: expected enough documents to hold some out, found none for "
            f"{' and '.join(empty)}; add documents"
        )
    return split


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
