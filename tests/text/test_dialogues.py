"""Laws of dialogues: the prompt never enters the loss, the end of the answer does."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.errors import DialogueError
from fedgraft.testing import tiny_tokenizer
from fedgraft.text.dialogues import (
    Dialogue,
    Message,
    encode,
    load_dialogues,
    pack_dialogues,
    prompt_ids,
)
from fedgraft.text.packing import IGNORED

tokenizer = cache(tiny_tokenizer)
words = st.text(st.sampled_from("abc .,?!\n"), min_size=1, max_size=30).filter(str.strip)


def dialogue_of(*turns: str, system: str | None = None) -> Dialogue:
    roles = ["user", "assistant"] * len(turns)
    messages = [Message(role=r, content=t) for r, t in zip(roles, turns, strict=False)]  # type: ignore[arg-type]
    if system:
        messages.insert(0, Message(role="system", content=system))
    return Dialogue(id="d", messages=tuple(messages))


@given(st.lists(words, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0))
def test_targets_are_the_answers_and_their_end_of_turn_and_nothing_else(turns: list[str]) -> None:
    ids, labels = encode(tokenizer(), dialogue_of(*turns))
    assert len(ids) == len(labels)
    targets = tokenizer().decode([label for label in labels if label != IGNORED])
    assert targets == "".join(answer + "<|im_end|>" for answer in turns[1::2])


@given(st.lists(words, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0))
def test_the_ids_are_those_of_the_rendered_dialogue(turns: list[str]) -> None:
    dialogue = dialogue_of(*turns, system="Be kind.")
    ids, _ = encode(tokenizer(), dialogue)
    messages = [message.model_dump() for message in dialogue.messages]
    rendered = tokenizer().apply_chat_template(messages, tokenize=False)
    assert tokenizer().decode(ids) == rendered.rstrip("\n")


def test_a_prompt_ends_where_the_answer_begins() -> None:
    dialogue = dialogue_of("Where?", "Here.")
    ids, labels = encode(tokenizer(), dialogue)
    prompt = prompt_ids(tokenizer(), dialogue.messages)
    assert ids[: len(prompt)] == prompt
    assert set(labels[: len(prompt)]) == {IGNORED}
    assert IGNORED not in labels[len(prompt) :]


def test_packed_dialogues_keep_their_labels() -> None:
    rows = pack_dialogues(tokenizer(), [dialogue_of("Where?", "Here."), dialogue_of("a", "b")], 64)
    labels = rows.stacked()["labels"]
    targets = tokenizer().decode(labels[labels != IGNORED])
    assert len(labels[labels != IGNORED]) == rows.num_targets
    assert "Here.<|im_end|>" in targets
    assert "Where" not in targets


def test_a_dialogue_longer_than_a_row_is_refused() -> None:
    with pytest.raises(DialogueError, match=r"'d': expected at most 8 tokens, found \d+"):
        pack_dialogues(tokenizer(), [dialogue_of("Where?", "Here.")], 8)


def test_a_dialogue_without_an_answer_is_refused() -> None:
    with pytest.raises(DialogueError, match=r"'d': expected an answer by the assistant"):
        encode(tokenizer(), dialogue_of("Where?"))


def test_a_tokenizer_without_a_template_is_refused_with_the_remedy() -> None:
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(DialogueError, match="use the tokenizer of the instruct side"):
        encode(bare, dialogue_of("Where?", "Here."))


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    forgetful = tiny_tokenizer()
    forgetful.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    with pytest.raises(DialogueError, match="rewrites earlier turns"):
        encode(forgetful, dialogue_of("Where?", "Here."))


def test_a_line_that_is_no_dialogue_is_reported_by_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    good = dialogue_of("Where?", "Here.").model_dump_json()
    file.write_text(good + '\n{"id": "x", "messages": [], "colour": 1}\n')
    with pytest.raises(DialogueError, match=r"d\.jsonl, line 2: .*colour"):
        load_dialogues(file)
    file.write_text(good + "\n")
    assert load_dialogues(file) == (dialogue_of("Where?", "Here."),)
    file.write_text(good.replace('"accepted":[]', '"accepted":[" "]') + "\n")
    with pytest.raises(DialogueError, match=r"accepted\.0: .*at least 1 char"):
        load_dialogues(file)
    file.write_text("")
    with pytest.raises(DialogueError, match="expected at least one dialogue"):
        load_dialogues(file)
