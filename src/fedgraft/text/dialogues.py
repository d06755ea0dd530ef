"""Dialogues through the tokenizer's chat template; only what the assistant says is a target.

    <|im_start|>user\\nWhere ...?<|im_end|>\\n<|im_start|>assistant\\nIn Riga.<|im_end|>\\n
    ---------------------- not in the loss ----------------------- ~~~~~~~~~~~~~~~~~~ in the loss

The answer's span is found by rendering the dialogue up to and with each answer, so any template
that renders a dialogue as a continuation of its beginning will do.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

from fedgraft.errors import DialogueError
from fedgraft.text.corpus import load_lines
from fedgraft.text.packing import IGNORED, Rows, pack_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    accepted: tuple[
        Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)], ...
    ] = ()
    """Phrases, any of which makes the answer right."""
    group: str = ""
    """What the dialogue counts towards in the scores, e.g. `old` or `new` facts."""


def load_dialogues(path: str | Path) -> tuple[Dialogue, ...]:
    """Read one dialogue a line.

    Raises CorpusError for a line that is no JSON object, DialogueError (file, line) for one that is
    no dialogue, and for a file without any.
    """
    return load_lines(Path(path), Dialogue, noun="dialogue", error=DialogueError)


def encode(tokenizer: "PreTrainedTokenizerBase", dialogue: Dialogue) -> tuple[list[int], list[int]]:
    """Token ids and labels of a dialogue: answers and their end-of-turn tokens are targets.

    Raises DialogueError where the tokenizer has no chat template, the dialogue has no answer, or
    the template does not render it as a continuation of its beginning.
    """
    messages = [message.model_dump() for message in dialogue.messages]
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise DialogueError(
            f"dialogue {dialogue.id!r}: expected an answer by the assistant to learn from, found "
            f"the roles {', '.join(m['role'] for m in messages) or 'none'}; add one or leave it out"
        )
    text = _render(tokenizer, messages)
    pieces: list[tuple[str, bool]] = []
    done = 0
    for turn in answers:
        before = _render(tokenizer, messages[:turn], prompt=True)
        after = _render(tokenizer, messages[: turn + 1])
        if not (text.startswith(before) and text.startswith(after) and after.startswith(before)):
            raise DialogueError(
                f"dialogue {dialogue.id!r}: the chat template rewrites earlier turns when later "
                "ones follow, so the answer's place cannot be told; split it into single answers"
            )
        answer = after[len(before) :]
        closed = answer.rstrip("\n")
        pieces += [(text[done : len(before)], False), (closed, True)]
        done = len(before) + len(closed)
    ids: list[int] = []
    labels: list[int] = []
    for piece, is_target in pieces:
        tokens = tokenizer.encode(piece, add_special_tokens=False)
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


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """Token ids of a dialogue up to where the assistant answers; a last answer is left out."""
    turns = [message.model_dump() for message in messages]
    if turns and turns[-1]["role"] == "assistant":
        turns.pop()
    text = _render(tokenizer, turns, prompt=True)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _render(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]], *, prompt: bool = False
) -> str:
    if not tokenizer.chat_template:
        raise DialogueError(
            f"expected a tokenizer with a chat template, found none in {tokenizer.name_or_path}; "
            "use the tokenizer of the instruct side"
        )
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert isinstance(text, str)
    return text
