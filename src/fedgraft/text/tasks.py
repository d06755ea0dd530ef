"""Instruction data of others as dialogues: Dolly, Natural Instructions, and what a file holds.

    Dolly                   {"instruction", "context", "response", "category"}, one a line
    Natural Instructions    tasks/NAME.json: {"Definition": [...], "Instances": [{"id", "input",
                            "output": [...]}]};  splits/default/train_tasks.txt: a NAME a line

        instruction ┐                                definition ┐                  output[0]:
        blank line  ├ the user's turn                blank line ├ the user's turn  the assistant's;
        context     ┘     response: the assistant's  input      ┘                  all: references

A dialogue's group is its category or its task: what a partition shares out, what scores are told
by, and the true label that clusters are held against. White space at the ends of a text goes.
FedHDS's released code writes `### Input:` between the two (Alpaca's other form), compares with the
first output alone, and passes over instances whose input is longer, in *characters*, than its
longest row in tokens; here the text is the same under any template, every output counts, and who is
too long for a row is counted (`dialogues.short_enough`).
"""

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from fedgraft.errors import CorpusError, DialogueError
from fedgraft.text.corpus import load_lines, read_json_lines
from fedgraft.text.dialogues import Dialogue, Message, Phrase, load_dialogues
from fedgraft.text.examples import are_dialogues
from fedgraft.text.sources import Document, documents

Stripped = Annotated[
    str, StringConstraints(strip_whitespace=True), BeforeValidator(lambda text: text or "")
]


class _Instruction(BaseModel):
    """A line of Dolly, or of a file that names the same things as Alpaca does."""

    instruction: Phrase
    context: Stripped = Field("", validation_alias=AliasChoices("context", "input"))
    response: Phrase = Field(validation_alias=AliasChoices("response", "output"))
    category: Stripped = ""
    department: str | None = None


class _Instance(BaseModel):
    id: Phrase
    input: Stripped
    output: tuple[Phrase, ...] = Field(min_length=1)


class _Task(BaseModel):
    """What is read of a file of Natural Instructions; it has a dozen fields more."""

    model_config = ConfigDict(populate_by_name=True)

    definition: tuple[Phrase, ...] = Field(alias="Definition", min_length=1)
    instances: tuple[_Instance, ...] = Field(alias="Instances", min_length=1)


def load_dolly(path: str | Path) -> tuple[Dialogue, ...]:
    """Read one instruction a line, in Dolly's words or Alpaca's (`input` and `output`).

    The id is the file's name and the instruction's number in it, the group the category.

    Raises CorpusError for a line that is no JSON object, DialogueError (file, line) for one without
    instruction or response, and for a file without any.
    """
    file = Path(path)
    rows = load_lines(file, _Instruction, noun="line of Dolly's kind", error=DialogueError)
    return tuple(
        Dialogue(
            id=f"{file.stem}/{number:05d}",
            messages=_turns(row.instruction, row.context, row.response),
            department=row.department,
            group=row.category,
        )
        for number, row in enumerate(rows, 1)
    )


def load_tasks(folder: str | Path, names: Iterable[str]) -> tuple[Dialogue, ...]:
    """Read tasks of Natural Instructions by name, each with all its instances, in that order.

    Args:
        folder: The one with `tasks/` in it.

    Raises DialogueError for a task whose file is missing, is no JSON or is no task; the message
    names the file, and the instance.
    """
    read: list[Dialogue] = []
    for name in names:
        task = _load_task(Path(folder) / "tasks" / f"{name}.json")
        read += [
            Dialogue(
                id=instance.id,
                messages=_turns(task.definition[0], instance.input, instance.output[0]),
                references=instance.output,
                group=name,
            )
            for instance in task.instances
        ]
    return tuple(read)


def task_names(
    folder: str | Path, part: Literal["train", "test", "excluded"], *, split: str = "default"
) -> tuple[str, ...]:
    """The tasks that a split of Natural Instructions names for a part, in its order.

    The official `default` has 756 tasks for training and 119 unseen ones for the test. A task that
    a list names need not be on disk: `load_tasks` says so.

    Raises DialogueError where there is no such list, or nothing in it.
    """
    file = Path(folder) / "splits" / split / f"{part}_tasks.txt"
    names = tuple(filter(None, map(str.strip, _read(file).splitlines())))
    if not names:
        raise DialogueError(f"{file}: expected a task's name a line, found none")
    return names


def hold_out(
    dialogues: Sequence[Dialogue], groups: str | Collection[str]
) -> tuple[list[Dialogue], list[Dialogue]]:
    """The dialogues of all other groups, to train on, and those of the groups held out, to test.

    FedHDS holds out Dolly's `summarization`.

    Raises DialogueError for a group that no dialogue has, and where none is left to train on.
    """
    named = {groups} if isinstance(groups, str) else set(groups)
    there = {dialogue.group for dialogue in dialogues}
    if unknown := named - there:
        raise DialogueError(
            f"expected groups of these {len(dialogues)} dialogues to hold out, found "
            f"{', '.join(map(repr, sorted(unknown)))}, which none has; they have "
            f"{', '.join(map(repr, sorted(there))) or 'none'}"
        )
    train = [dialogue for dialogue in dialogues if dialogue.group not in named]
    if not train:
        raise DialogueError(
            f"expected dialogues to train on, found all {len(dialogues)} held out; name fewer "
            "groups"
        )
    return train, [dialogue for dialogue in dialogues if dialogue.group in named]


def load_examples(path: str | Path) -> tuple[Dialogue, ...] | tuple[Document, ...]:
    """Read a JSONL file of dialogues, of Dolly's or Alpaca's instructions, or of documents.

    The first line's fields tell which: `messages`, `instruction` or `text`. All lines are then of
    that kind. No line is dropped, copies included: an example's place is its line's.

    Raises CorpusError for a line that is no JSON object or a document without text, DialogueError
    for a first line of neither kind, a later line of another, and a file without any; each names
    file and line.
    """
    file = Path(path)
    number, first = next(read_json_lines(file), (0, None))
    match first:
        case {"messages": _}:
            return load_dialogues(file)
        case {"instruction": _}:
            return load_dolly(file)
        case {"text": _}:
            return _load_documents(file)
        case None:
            raise DialogueError(f"{file}: expected at least one example, found none")
    raise DialogueError(
        f"{file}, line {number}: expected a dialogue (`messages`), an instruction (`instruction`, "
        f"`response`) or a document (`text`), found the fields {', '.join(first) or 'none'}; "
        "rename them"
    )


def load_instructions(path: str | Path) -> tuple[Dialogue, ...]:
    """Read a JSONL file of dialogues, or of Dolly's or Alpaca's instructions.

    Raises as `load_examples`, and DialogueError for a file of documents.
    """
    found = load_examples(path)
    if not are_dialogues(found):
        raise DialogueError(
            f"{path}: expected dialogues (`messages`) or instructions (`instruction`, `response`), "
            "found documents"
        )
    return tuple(found)


def _load_documents(file: Path) -> tuple[Document, ...]:
    read = tuple(documents(file))
    for document in read:
        if not document.text.strip():
            raise CorpusError(
                f"{file}: expected text in every document, found none in {document.id!r}; leave it "
                "out"
            )
    return read


def _turns(instruction: str, context: str, answer: str) -> tuple[Message, Message]:
    asked = f"{instruction}\n\n{context}" if context else instruction
    return Message(role="user", content=asked), Message(role="assistant", content=answer)


def _load_task(file: Path) -> _Task:
    try:
        raw: Any = json.loads(_read(file))
    except json.JSONDecodeError as error:
        raise DialogueError(
            f"{file}, line {error.lineno}: expected a task as JSON, found {error.msg} at column "
            f"{error.colno}; fetch the file again"
        ) from error
    except (ValueError, RecursionError) as error:  # numbers and nesting beyond all bounds
        raise DialogueError(
            f"{file}: expected a task as JSON, found {error}; fetch the file again"
        ) from error
    try:
        return _Task.model_validate(raw)
    except ValidationError as invalid:
        faults = [
            f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in invalid.errors()
        ]
        raise DialogueError(
            f"{file}: expected a task with Definition and Instances (id, input, output), found "
            f"{len(faults)} faults, the first: {faults[0]}; mend the file"
        ) from invalid


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise DialogueError(
            f"expected a file of Natural Instructions at {file}, found {error.strerror}; name the "
            "folder that holds `tasks` and `splits`, and tasks that are in it"
        ) from error
    except UnicodeDecodeError as error:
        raise DialogueError(
            f"{file}: expected UTF-8, found byte {error.object[error.start]:#04x} at "
            f"{error.start}; fetch the file again"
        ) from error
