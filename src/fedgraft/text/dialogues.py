"""Dialogues through the tokenizer's chat template; only what the assistant says is a target.

    <|im_start|>user\\nWhere ...?<|im_end|>\\n<|im_start|>assistant\\nIn Riga.<|im_end|>\\n
    ---------------------- not in the loss ----------------------- ~~~~~~~~~~~~~~~~~~ in the loss

    Below is an ... ### Instruction:\\nWhere ...?\\n\\n### Response:\\nIn Riga.<|endoftext|>
    ------------------- not in the loss ----------------------- ~~~~~~~~~~~~~~~~~~~ in the loss

The answer's span is found by rendering the dialogue up to and with each answer, so any template
that renders a dialogue as a continuation of its beginning will do. The second one, for models
without chat tokens, is Stanford Alpaca's prompt as such a template (`with_template`).
"""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

from fedgraft.errors import DialogueError
from fedgraft.provenance import hash_json
from fedgraft.text.corpus import load_lines
from fedgraft.text.packing import IGNORED, Rows, pack_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["chat", "alpaca"]
"""How dialogues become text: the own template of a tokenizer, or Alpaca's prompt."""

ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% elif message['role'] == 'user' %}"
    "{% if loop.first %}"
    "{{ 'Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.' }}"
    "{% endif %}"
    "{{ '\n\n### Instruction:\n' + message['content'] + '\n\n### Response:\n' }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
)
"""The prompt of Stanford Alpaca (tatsu-lab/stanford_alpaca, Apache-2.0) as a chat template.

Alpaca has two forms, with an `### Input:` and without. A dialogue has one user turn that holds both
instruction and input, so it is always the second form; and a line break stands before the response,
so that the answer's first word is spelled as at the beginning of a line. A system turn takes the
place of the first sentence.
"""

Phrase = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Message(BaseModel):
    """One turn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class Demand(BaseModel):
    """What an answer must look like; `evaluation.instructions` knows the kinds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    argument: str = ""


class Dialogue(BaseModel):
    """A dialogue of one line of JSON: for tuning with its answer, for scoring with its demands."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    messages: tuple[Message, ...]
    department: str | None = None
    constraints: tuple[Demand, ...] = ()
    accepted: tuple[Phrase, ...] = ()
    """Phrases, any of which makes the answer right."""
    references: tuple[Phrase, ...] = ()
    """Answers in full, any of which would do: what Rouge-L compares with."""
    group: str = ""
    """What the dialogue counts towards in the scores, e.g. `old` or `new` facts."""

    @property
    def hash(self) -> str:
        """Hash of its turns alone: what is said in the same words is the same dialogue."""
        turns = [message.model_dump() for message in self.messages]
        return hash_json(turns).removeprefix("sha256:")

    @property
    def given_answers(self) -> tuple[str, ...]:
        """The references, or else the assistant's last turn; empty where nobody has answered."""
        last = self.messages[-1:]
        spoken = tuple(m.content for m in last if m.role == "assistant" and m.content.strip())
        return self.references or spoken

    def answered(self) -> "Dialogue":
        """The dialogue with the first of its references said, where it ends with a question.

        Raises DialogueError where it ends with a question that has no reference.
        """
        if self.messages and self.messages[-1].role == "assistant":
            return self
        if not self.references:
            raise DialogueError(
                f"dialogue {self.id!r}: expected an answer or a reference to stand for one, found "
                "neither; add `references`"
            )
        said = Message(role="assistant", content=self.references[0])
        return self.model_copy(update={"messages": (*self.messages, said)})


def load_dialogues(path: str | Path) -> tuple[Dialogue, ...]:
    """Read one dialogue a line.

    Raises CorpusError for a line that is no JSON object, DialogueError (file, line) for one that is
    no dialogue, and for a file without any.
    """
    return load_lines(Path(path), Dialogue, noun="dialogue", error=DialogueError)


def with_template(
    tokenizer: "PreTrainedTokenizerBase", template: Template
) -> "PreTrainedTokenizerBase":
    """A copy of the tokenizer whose dialogues have that form: Alpaca's prompt, or its own chat.

    Alpaca's prompt begins with the start-of-text token where the tokenizer sets one, as documents
    do, and each answer ends with the end-of-text token.

    Raises DialogueError where there is no end-of-text token (alpaca) or no chat template (chat).
    """
    other = copy.copy(tokenizer)
    if template == "chat":
        _check_template(other)
        return other
    if other.eos_token is None:
        raise DialogueError(
            f"expected a tokenizer with an end-of-text token to close answers with, found none in "
            f"{tokenizer.name_or_path}; set eos_token in tokenizer_config.json"
        )
    starts = other.bos_token is not None and other.encode("")[:1] == [other.bos_token_id]
    other.chat_template = ("{{ bos_token }}" if starts else "") + ALPACA
    return other


def encode(tokenizer: "PreTrainedTokenizerBase", dialogue: Dialogue) -> tuple[list[int], list[int]]:
    """Token ids and labels of a dialogue: answers and their end-of-turn tokens are targets.

    Raises DialogueError where the tokenizer has no chat template, the dialogue has no answer, or
    the template refuses it or does not render it as a continuation of its beginning.
    """
    name = f"dialogue {dialogue.id!r}"
    messages = [message.model_dump() for message in dialogue.messages]
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise DialogueError(
            f"{name}: expected an answer by the assistant to learn from, found the roles "
            f"{_roles(messages)}; add one or leave it out"
        )
    text = _render(tokenizer, messages, name)
    pieces: list[tuple[str, bool]] = []
    done = 0
    for turn in answers:
        before = _render(tokenizer, messages[:turn], name, prompt=True)
        whole = turn + 1 == len(messages)
        after = text if whole else _render(tokenizer, messages[: turn + 1], name)
        if not (text.startswith(before) and text.startswith(after) and after.startswith(before)):
            raise DialogueError(
                f"{name}: the chat template rewrites earlier turns when later ones follow, so the "
                "answer's place cannot be told; split it into single answers"
            )
        answer = after[len(before) :]
        closed = answer.rstrip("\n")
        pieces += [(text[done : len(before)], False), (closed, True)]
        done = len(before) + len(closed)
    ids: list[int] = []
    labels: list[int] = []
    encoded = tokenizer([piece for piece, _ in pieces], add_special_tokens=False)
    for (_, is_target), tokens in zip(pieces, encoded["input_ids"], strict=True):
        ids += tokens
        labels += tokens if is_target else [IGNORED] * len(tokens)
    labels[0] = IGNORED
    return ids, labels


def pack_dialogues(
    tokenizer: "PreTrainedTokenizerBase",
    dialogues: Iterable[Dialogue],
    row_length: int,
    *,
    seed: int = 0,
) -> Rows:
    """Pack dialogues into rows as documents are, each whole.

    Raises DialogueError as `encode` does, and where a dialogue is longer than a row.
    """
    pieces = []
    for dialogue in dialogues:
        ids, labels = encode(tokenizer, dialogue)
        if len(ids) > row_length:
            raise DialogueError(
                f"dialogue {dialogue.id!r}: expected at most {row_length} tokens, found "
                f"{len(ids)}; choose longer rows or shorten it"
            )
        pieces.append((ids, labels))
    return pack_pieces(pieces, row_length, padding=tokenizer.eos_token_id, seed=seed)


def short_enough(
    tokenizer: "PreTrainedTokenizerBase", dialogues: Iterable[Dialogue], row_length: int
) -> tuple[list[Dialogue], int]:
    """The dialogues that fit a row of so many tokens, and how many do not: tell that number.

    Nothing is cut: half an answer teaches to break off, half a question to guess.

    Raises DialogueError as `encode` does.
    """
    kept, num_left_out = [], 0
    for dialogue in dialogues:
        if len(encode(tokenizer, dialogue)[0]) <= row_length:
            kept.append(dialogue)
        else:
            num_left_out += 1
    return kept, num_left_out


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, name: str = "dialogue"
) -> list[int]:
    """Token ids of a dialogue up to where the assistant answers; a last answer is left out.

    Raises DialogueError, which says the name, where the tokenizer has no chat template, or one that
    refuses the turns.
    """
    turns = [message.model_dump() for message in messages]
    if turns and turns[-1]["role"] == "assistant":
        turns.pop()
    text = _render(tokenizer, turns, name, prompt=True)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict[str, Any]],
    name: str,
    *,
    prompt: bool = False,
) -> str:
    from jinja2 import TemplateError

    _check_template(tokenizer)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, ValueError) as error:
        raise DialogueError(
            f"{name}: expected turns that the tokenizer's chat template takes, found the roles "
            f"{_roles(messages)}, of which it says: {error}; change the turns, or choose Alpaca's "
            "prompt"
        ) from error
    assert isinstance(text, str)
    return text


def _roles(messages: list[dict[str, Any]]) -> str:
    return ", ".join(message["role"] for message in messages) or "none"


def _check_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    if not tokenizer.chat_template:
        raise DialogueError(
            f"expected a tokenizer with a chat template, found none in {tokenizer.name_or_path}; "
            "use the tokenizer of the instruct side"
        )
