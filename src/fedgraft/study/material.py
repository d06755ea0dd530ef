"""What the models of a study read and are asked: its texts, split, and its questions."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from fedgraft.errors import StudyError
from fedgraft.evaluation.knowledge import Question, load_questions
from fedgraft.provenance import hash_json
from fedgraft.study.study import Scored, Study, Texts
from fedgraft.text.corpus import Corpus, Document, Splits
from fedgraft.text.dialogues import Dialogue, load_dialogues

_Asked = TypeVar("_Asked", Dialogue, Question)


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
        splits = {name: _split("department", name, t) for name, t in study.departments.items()}
        domains = study.curve.domains.texts if study.curve and study.curve.domains else {}
        held_out = {d.hash for s in splits.values() for d in (*s.validation, *s.test)}
        old = _load(study.replay, None).documents if study.replay else ()
        dialogues, questions = study.dialogues, study.questions
        return cls(
            splits=splits,
            domains={name: _split("domain", name, texts) for name, texts in domains.items()},
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


def _split(kind: str, name: str, texts: Texts) -> Splits:
    split = _load(texts, name).split()
    empty = [part for part in ("train", "validation", "test") if not getattr(split, part)]
    if empty:
        raise StudyError(
            f"{kind} {name}: expected enough documents to hold some out, found none for "
            f"{' and '.join(empty)}; add documents"
        )
    return split


def _load(texts: Texts, department: str | None) -> Corpus:
    return Corpus.load(*texts.corpus, department=department, field=texts.field)


def _asked(
    load: Callable[[str], tuple[_Asked, ...]],
    scored: Scored | None,
    part: Literal["validation", "test"],
) -> tuple[_Asked, ...]:
    """What is asked in one part, of the groups that the study names."""
    if scored is None:
        return ()
    path: str = getattr(scored, part)
    rows = load(path)
    kept = tuple(row for row in rows if scored.groups is None or row.group in scored.groups)
    if not kept:
        raise StudyError(
            f"{path}: expected rows of the groups {', '.join(scored.groups or ())}, found only "
            f"{', '.join(sorted({row.group for row in rows}))}; correct `groups`"
        )
    return kept
