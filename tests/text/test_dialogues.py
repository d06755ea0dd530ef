"""Laws of dialogues: the prompt never enters the loss, the end of the answer does."""

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from fedgraft.errors import DialogueError
from fedgraft.testing import tiny_tokenizer
from fedgraft.text.dialogues import (
    Dialogue,
    Message,
    encode,
    load_dialogues,
    pack_dialogues,
    prompt_ids,
    short_enough,
    with_template,
)
from fedgraft.text.packing import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

tokenizer = cache(tiny_tokenizer)
alpaca = cache(lambda: with_template(tiny_tokenizer(), "alpaca"))
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


REFUSING = (
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate, and no system') }}"
    "{% endif %}{{ message['content'] }}{% endfor %}"
)
"""As Gemma's template does."""


@pytest.mark.parametrize(
    "roles", [("system", "user", "assistant"), ("user", "user", "assistant")], ids=" ".join
)
def test_turns_that_a_template_refuses_are_reported_with_the_dialogue(
    roles: tuple[str, ...],
) -> None:
    strict = tiny_tokenizer()
    strict.chat_template = REFUSING
    turns = tuple(Message(role=role, content="a") for role in roles)  # type: ignore[arg-type]
    told = rf"^dialogue 'd': expected turns .* roles {roles[0]}, user.*: Roles must .*; change"
    with pytest.raises(DialogueError, match=told):
        encode(strict, Dialogue(id="d", messages=turns))
    with pytest.raises(DialogueError, match=told):
        prompt_ids(strict, turns, name="dialogue 'd'")


def test_an_answer_that_nothing_was_said_before_is_reported_with_the_dialogue() -> None:
    dialogue = Dialogue(id="d", messages=(Message(role="assistant", content="Here."),))
    told = r"^dialogue 'd': expected turns .* roles none, .* empty conversation.*; change the turns"
    with pytest.raises(DialogueError, match=told):
        encode(tokenizer(), dialogue)
    with pytest.raises(DialogueError, match=told):
        prompt_ids(tokenizer(), dialogue.messages, name="dialogue 'd'")


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


BELOW = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)


def test_alpacas_prompt_is_stanfords_word_for_word() -> None:
    ids, labels = encode(alpaca(), dialogue_of("Where?", "Here."))
    expected = f"{BELOW}\n\n### Instruction:\nWhere?\n\n### Response:\nHere.<|endoftext|>"
    assert alpaca().decode(ids) == expected
    assert alpaca().decode([i for i in labels if i != IGNORED]) == "Here.<|endoftext|>"


@given(st.lists(words, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0))
def test_with_alpacas_prompt_targets_are_the_answers_and_their_ends(turns: list[str]) -> None:
    dialogue = dialogue_of(*turns)
    ids, labels = encode(alpaca(), dialogue)
    targets = alpaca().decode([label for label in labels if label != IGNORED])
    assert targets == "".join(answer + "<|endoftext|>" for answer in turns[1::2])
    prompt = prompt_ids(alpaca(), dialogue.messages)
    assert ids[: len(prompt)] == prompt
    assert alpaca().decode(prompt).endswith(turns[-2] + "\n\n### Response:\n")


def test_a_system_turn_stands_in_the_place_of_alpacas_first_sentence() -> None:
    ids, _ = encode(alpaca(), dialogue_of("Where?", "Here.", system="Be kind."))
    assert alpaca().decode(ids).startswith("Be kind.\n\n### Instruction:\nWhere?\n\n### Response:")


def test_alpacas_prompt_begins_as_the_tokenizers_texts_do() -> None:
    starting = tiny_tokenizer()
    starting.bos_token = "<|im_start|>"
    assert "<|im_start|>" not in decoded(starting)
    starting.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert decoded(starting).startswith("<|im_start|>Below")
    assert decoded(starting).count("<|im_start|>") == 1


def decoded(tokenizer: "PreTrainedTokenizerBase") -> str:
    ids, _ = encode(with_template(tokenizer, "alpaca"), dialogue_of("Where?", "Here."))
    return str(tokenizer.decode(ids))


def test_another_template_leaves_the_tokenizer_as_it_was() -> None:
    ours = tiny_tokenizer()
    before = encode(ours, dialogue_of("Where?", "Here."))
    assert encode(with_template(ours, "alpaca"), dialogue_of("Where?", "Here.")) != before
    assert encode(ours, dialogue_of("Where?", "Here.")) == before
    assert encode(with_template(ours, "chat"), dialogue_of("Where?", "Here.")) == before


def test_alpacas_prompt_needs_no_chat_template_and_chat_does() -> None:
    bare = tiny_tokenizer()
    bare.chat_template = None
    encode(with_template(bare, "alpaca"), dialogue_of("Where?", "Here."))
    with pytest.raises(DialogueError, match="expected a tokenizer with a chat template"):
        with_template(bare, "chat")
    bare.eos_token = None
    with pytest.raises(DialogueError, match=r"end-of-text token to close .*set eos_token"):
        with_template(bare, "alpaca")


@given(st.lists(st.tuples(words, words), max_size=6), st.integers(1, 40))
def test_what_is_too_long_for_a_row_is_left_out_whole_and_counted(
    said: list[tuple[str, str]], row_length: int
) -> None:
    dialogues = [dialogue_of(*turns) for turns in said]
    kept, num_left_out = short_enough(tokenizer(), dialogues, row_length)
    assert len(kept) + num_left_out == len(dialogues)
    assert [d for d in dialogues if len(encode(tokenizer(), d)[0]) <= row_length] == kept
    if kept:
        assert len(pack_dialogues(tokenizer(), kept, row_length)) <= len(kept)


def test_given_answers_are_the_references_or_else_the_last_turn() -> None:
    asked, said = dialogue_of("Where?"), dialogue_of("Where?", "Here.")
    assert (asked.given_answers, said.given_answers) == ((), ("Here.",))
    both = said.model_copy(update={"references": ("Here", "There")})
    assert both.given_answers == ("Here", "There")


def test_a_question_is_answered_by_its_first_reference_and_an_answer_stays() -> None:
    asked, said = dialogue_of("Where?"), dialogue_of("Where?", "Here.")
    referenced = asked.model_copy(update={"references": ("Here.", "There.")})
    assert referenced.answered().messages == said.messages
    assert said.answered() is said
    with pytest.raises(DialogueError, match=r"'d': expected an answer or a reference .*neither"):
        asked.answered()


def test_a_line_written_before_there_were_references_is_read_as_ever(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    line = dialogue_of("Where?", "Here.").model_dump(mode="json", exclude={"references"})
    file.write_text(json.dumps(line) + "\n")
    assert load_dialogues(file) == (dialogue_of("Where?", "Here."),)
