"""Examples: what a client trains on and scores, documents or dialogues, never some of both.

document    every token is a target                       packed across rows
dialogue    answers and their end-of-turn tokens are      packed whole, none longer than a row
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

from fedgraft.provenance import hash_json
from fedgraft.text.corpus import Document
from fedgraft.text.dialogues import (
    Dialogue,
    Template,
    encode,
    pack_dialogues,
    short_enough,
    with_template,
)
from fedgraft.text.packing import Rows, pack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = Document | Dialogue
Examples = Sequence[Example]
"""All documents or all dialogues: the first one tells."""


def are_dialogues(examples: Examples) -> TypeGuard[Sequence[Dialogue]]:
    """Whether examples are dialogues; none at all are documents."""
    return bool(examples) and isinstance(examples[0], Dialogue)


def are_documents(examples: Examples) -> TypeGuard[Sequence[Document]]:
    return not are_dialogues(examples)


def tokenizer_for(
    tokenizer: "PreTrainedTokenizerBase", examples: Examples, prompt: Template
) -> "PreTrainedTokenizerBase":
    """The tokenizer that examples are encoded with: dialogues have the form that `prompt` says."""
    return with_template(tokenizer, prompt) if are_dialogues(examples) else tokenizer


def examples_at(examples: Examples, places: Sequence[int]) -> Examples:
    """Those examples that stand at some places, in that order."""
    if are_dialogues(examples):
        return [examples[place] for place in places]
    assert are_documents(examples)
    return [examples[place] for place in places]


def fitting(
    tokenizer: "PreTrainedTokenizerBase", examples: Examples, row_length: int
) -> tuple[Examples, int]:
    """The examples that fit a row, and how many do not: see `short_enough`. A document always does.

    Raises DialogueError as `dialogues.encode` does.
    """
    return (
        short_enough(tokenizer, examples, row_length) if are_dialogues(examples) else (examples, 0)
    )


def pack_examples(
    tokenizer: "PreTrainedTokenizerBase",
    examples: Examples,
    row_length: int,
    *,
    seed: int,
    num_positions: int | None = None,
) -> Rows:
    """Pack examples into rows. Raises as `pack` does for documents, else as `pack_dialogues`."""
    if are_dialogues(examples):
        return pack_dialogues(tokenizer, examples, row_length, seed=seed)
    assert are_documents(examples)
    return pack(tokenizer, examples, row_length, seed=seed, num_positions=num_positions)


def encode_examples(
    tokenizer: "PreTrainedTokenizerBase", examples: Examples, window: int
) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each example, for comparing examples with each other.

    A document is compared by its first `window` tokens, the end-of-text token among them where it
    is that short; a dialogue is whole, whatever its length.

    Raises DialogueError as `dialogues.encode` does.
    """
    if are_dialogues(examples):
        return [encode(tokenizer, dialogue) for dialogue in examples]
    assert are_documents(examples)
    found = []
    for document in examples:
        ids = [*tokenizer.encode(document.text, add_special_tokens=False), tokenizer.eos_token_id]
        found.append((ids[:window], ids[:window]))
    return found


def example_texts(examples: Examples) -> list[str]:
    """What each example says, without any template: of a dialogue its turns, a line break between.

    For a model of another kind, which reads text in its own tokens.
    """
    if are_dialogues(examples):
        return ["\n".join(turn.content for turn in one.messages) for one in examples]
    assert are_documents(examples)
    return [document.text for document in examples]


def hash_examples(examples: Examples) -> str:
    """Hash of examples in their order."""
    if are_dialogues(examples):
        return hash_json([dialogue.model_dump(mode="json") for dialogue in examples])
    assert are_documents(examples)
    return hash_json([document.hash for document in examples])
