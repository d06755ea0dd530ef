"""Laws of instruction data: nothing is lost, nothing of what is held out is trained on."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.errors import CorpusError, DialogueError
from fedgraft.text.corpus import Document
from fedgraft.text.dialogues import Dialogue
from fedgraft.text.tasks import hold_out, load_dolly, load_examples, load_tasks, task_names

DATA = Path(os.environ.get("FEDGRAFT_DATA", "../shared/data")) / "instruct"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs instruct/ of FEDGRAFT_DATA")

PLAIN = {"instruction": "Name a bird.", "context": "", "response": "Heron", "category": "open_qa"}
WITH_CONTEXT = {
    "instruction": "Sum this up.",
    "context": " The river runs past the mill.\n",
    "response": "A river.",
    "category": "summarization",
}


def write(file: Path, *rows: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_task(folder: Path, name: str, *instances: Any, **fields: Any) -> Path:
    task = {"Definition": ["Say where."], "Instances": instances, "Source": ["us"], **fields}
    return write(folder / "tasks" / f"{name}.json", task)


def instance(number: int, *output: str) -> dict[str, Any]:
    return {"id": f"task1-{number}", "input": f"The mill {number}", "output": output}


def turns(dialogue: Dialogue) -> tuple[str, ...]:
    return tuple(message.content for message in dialogue.messages)


def test_the_context_of_an_instruction_follows_it_after_a_blank_line(tmp_path: Path) -> None:
    plain, summed = load_dolly(write(tmp_path / "dolly.jsonl", PLAIN, WITH_CONTEXT))
    assert turns(plain) == ("Name a bird.", "Heron")
    assert turns(summed) == ("Sum this up.\n\nThe river runs past the mill.", "A river.")
    assert [m.role for m in summed.messages] == ["user", "assistant"]
    assert (plain.group, summed.group) == ("open_qa", "summarization")
    assert (plain.id, summed.id) == ("dolly/00001", "dolly/00002")
    assert summed.given_answers == ("A river.",)


def test_instructions_in_alpacas_words_are_the_same(tmp_path: Path) -> None:
    theirs = {"instruction": "Sum this up.", "input": "The river.", "output": "Water."}
    (read,) = load_dolly(write(tmp_path / "alpaca.jsonl", theirs))
    assert turns(read) == ("Sum this up.\n\nThe river.", "Water.")


def test_an_instruction_keeps_the_department_that_it_names(tmp_path: Path) -> None:
    (read,) = load_dolly(write(tmp_path / "a.jsonl", {**PLAIN, "department": "hr", "doc_id": 7}))
    assert read.department == "hr"


def test_an_instruction_without_a_response_is_reported_by_file_and_line(tmp_path: Path) -> None:
    file = write(tmp_path / "dolly.jsonl", PLAIN, {**PLAIN, "response": " "})
    with pytest.raises(DialogueError, match=r"dolly\.jsonl, line 2: .*response: .*at least 1"):
        load_dolly(file)
    file.write_text(json.dumps(PLAIN) + "\n{")
    with pytest.raises(CorpusError, match=r"dolly\.jsonl, line 2: expected a JSON object"):
        load_dolly(file)
    file.write_text("")
    with pytest.raises(DialogueError, match="expected at least one line of Dolly's kind"):
        load_dolly(file)


def test_a_task_is_answered_by_its_first_output_and_compared_with_all(tmp_path: Path) -> None:
    write_task(
        tmp_path, "task1_mill", instance(1, "By the river", "At the river"), instance(2, "?")
    )
    write_task(tmp_path, "task2_mill", {**instance(9, "Here"), "input": ""})
    first, second, third = load_tasks(tmp_path, ["task1_mill", "task2_mill"])
    assert turns(first) == ("Say where.\n\nThe mill 1", "By the river")
    assert first.references == ("By the river", "At the river")
    assert (first.id, second.id, first.group) == ("task1-1", "task1-2", "task1_mill")
    assert turns(third) == ("Say where.", "Here")


def test_the_tasks_of_a_part_are_those_of_its_list(tmp_path: Path) -> None:
    lists = tmp_path / "splits" / "default"
    lists.mkdir(parents=True)
    (lists / "train_tasks.txt").write_text("task2_b\ntask1_a\n\n")
    (lists / "test_tasks.txt").write_text("\n")
    assert task_names(tmp_path, "train") == ("task2_b", "task1_a")
    with pytest.raises(DialogueError, match=r"test_tasks\.txt: expected a task's name a line"):
        task_names(tmp_path, "test")
    with pytest.raises(DialogueError, match=r"splits/mine/train_tasks\.txt, found No such file"):
        task_names(tmp_path, "train", split="mine")


def test_a_task_that_cannot_be_read_is_named_with_its_fault(tmp_path: Path) -> None:
    with pytest.raises(DialogueError, match=r"tasks/task9_x\.json, found No such file.*tasks that"):
        load_tasks(tmp_path, ["task9_x"])
    file = write_task(tmp_path, "task1_mill", instance(1, "Here"), instance(2))
    with pytest.raises(
        DialogueError, match=r"task1_mill\.json: .*Instances\.1\.output: .*at least"
    ):
        load_tasks(tmp_path, ["task1_mill"])
    file.write_text('{"Definition": [,')
    with pytest.raises(DialogueError, match=r"task1_mill\.json, line 1: expected a task as JSON"):
        load_tasks(tmp_path, ["task1_mill"])
    file.write_bytes(b'{"Definition": "\xff"}')
    with pytest.raises(DialogueError, match=r"task1_mill\.json: expected UTF-8, found byte 0xff"):
        load_tasks(tmp_path, ["task1_mill"])
    for text in ('{"Definition": ' + "9" * 5000 + "}", "[" * 100_000):
        file.write_text(text)
        with pytest.raises(
            DialogueError, match=r"task1_mill\.json.* expected a task as JSON, foun"
        ):
            load_tasks(tmp_path, ["task1_mill"])
    write(file, {"Definition": [], "Instances": [instance(1, "Here")]})
    with pytest.raises(DialogueError, match="expected a task with Definition and Instances"):
        load_tasks(tmp_path, ["task1_mill"])


groups = st.lists(st.sampled_from("abcd"), min_size=1, max_size=30)


@given(groups, st.sets(st.sampled_from("abcd"), max_size=3))
def test_what_is_held_out_is_in_one_part_and_everything_in_one_of_the_two(
    found: list[str], held_out: set[str]
) -> None:
    dialogues = [Dialogue(id=str(n), messages=(), group=g) for n, g in enumerate(found)]
    held_out &= set(found)
    if held_out == set(found):
        with pytest.raises(DialogueError, match=f"found all {len(found)} held out"):
            hold_out(dialogues, held_out)
        return
    train, test = hold_out(dialogues, held_out)
    assert {d.group for d in train} == set(found) - held_out
    assert {d.group for d in test} == held_out
    assert sorted([*train, *test], key=lambda d: int(d.id)) == dialogues


def test_a_group_that_nobody_has_is_not_held_out_in_silence() -> None:
    dialogues = [Dialogue(id="1", messages=(), group="summarization")]
    with pytest.raises(DialogueError, match=r"found 'summarisation'.*they have 'summarization'"):
        hold_out(dialogues, "summarisation")


def test_the_kind_of_a_file_is_told_by_its_fields(tmp_path: Path) -> None:
    said = {"id": "d", "messages": [{"role": "user", "content": "Where?"}]}
    page = {"id": "p", "text": "The mill."}
    dialogues = load_examples(write(tmp_path / "d.jsonl", said))
    instructions = load_examples(write(tmp_path / "i.jsonl", PLAIN, WITH_CONTEXT))
    pages = load_examples(write(tmp_path / "p.jsonl", page, page))
    assert dialogues == (Dialogue.model_validate(said),)
    assert instructions == load_dolly(tmp_path / "i.jsonl")
    assert [(type(p), p.id) for p in pages] == [(Document, "p")] * 2


def test_a_file_of_something_else_is_refused_with_its_fields(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", {"prompt": "Where?", "completion": "Here."})
    with pytest.raises(DialogueError, match=r"x\.jsonl, line 1: .*the fields prompt, completion"):
        load_examples(file)
    with pytest.raises(DialogueError, match="expected at least one example, found none"):
        load_examples(write(file))
    with pytest.raises(CorpusError, match="expected text in every document, found none in 'p'"):
        load_examples(write(file, {"id": "p", "text": " "}))
    for first, other in ((PLAIN, {"text": "The mill."}), ({"text": "The mill."}, PLAIN)):
        with pytest.raises((DialogueError, CorpusError), match=r"x\.jsonl, line 2: expected"):
            load_examples(write(file, first, other))


@needs_data
def test_all_of_dolly_is_read_and_its_summaries_can_be_held_out() -> None:
    dialogues = load_dolly(DATA / "databricks-dolly-15k.jsonl")
    train, test = hold_out(dialogues, "summarization")
    assert (len(train), len(test)) == (13_808, 1_188)
    assert len({dialogue.id for dialogue in dialogues}) == len(dialogues)


@needs_data
def test_all_tasks_that_are_there_are_read_and_no_unseen_one_is_trained_on() -> None:
    folder = DATA / "natural_instructions"
    names = {part: task_names(folder, part, split="kept") for part in ("train", "test")}
    read = {part: load_tasks(folder, ours) for part, ours in names.items()}
    assert {part: len(ours) for part, ours in read.items()} == {"train": 6_854, "test": 2_098}
    assert not {d.group for d in read["train"]} & {d.group for d in read["test"]}
    assert set(names["test"]) <= set(task_names(folder, "test"))
    assert (len(task_names(folder, "train")), len(task_names(folder, "test"))) == (756, 119)
