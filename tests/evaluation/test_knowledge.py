"""Laws of knowledge: a phrase counts where it stands on its own, in the first line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.evaluation.lessons import Taught

from fedgraft.errors import CorpusError, EvaluationError
from fedgraft.evaluation.knowledge import Question, is_right, load_questions, recall

words = st.text("abcdefghij", min_size=1, max_size=8)


def question(prompt: str, *accepted: str) -> Question:
    return Question(id=prompt, prompt=prompt, accepted=accepted)


@given(words, words, words)
def test_a_phrase_counts_among_other_words_in_any_case(
    before: str, phrase: str, after: str
) -> None:
    assert is_right(f"{before} {phrase.upper()}, {after}", [phrase])
    assert is_right(f'{{"{before}": "{phrase}"}}', [phrase])
    assert is_right(f"*{phrase}*", ["never", phrase])


@given(words, words)
def test_a_phrase_does_not_count_within_a_word(phrase: str, other: str) -> None:
    assert not is_right(f"{phrase}x{other}", [phrase, other])


@pytest.mark.parametrize(
    ("text", "phrase"),
    [("EUR 1,200", "200"), ("EUR 1,200", "1"), ("3.50", "3"), ("3.50", "50"), ("1200", "200")],
)
def test_a_number_does_not_count_within_a_number(text: str, phrase: str) -> None:
    assert not is_right(text, [phrase])
    assert is_right(text, [text])


def test_a_number_counts_before_a_full_stop() -> None:
    assert is_right("It is EUR 1,200. Regards", ["1,200"])
    assert is_right("Floors 2, 3", ["2"])


def test_without_accepted_phrases_nothing_is_right() -> None:
    assert not is_right("anything", [])
    assert not is_right("anything", [""])


def test_recall_completes_plain_text_and_judges_the_first_line_alone(taught: Taught) -> None:
    questions = [
        question("The heron stands in the", "river"),
        question("The heron stands in the", "awake"),
        question("The door of the mill is", "blue", "red"),
    ]
    assert recall(taught.model, taught.tokenizer, questions) == [True, False, True]


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_questions_are_read_a_line_each(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "prompt": "The mill is", "accepted": ["red"], "group": "old"},
        {"id": "2", "prompt": "Anna is", "accepted": ["a baker"], "department": "hr"},
    ]
    assert load_questions(write(tmp_path / "q.jsonl", *rows)) == tuple(
        Question.model_validate(row) for row in rows
    )


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"id": "2", "prompt": "Anna is"}, "accepted: Field required"),
        ({"id": "2", "prompt": "Anna is", "accepted": []}, "accepted: .*at least 1 item"),
        ({"id": "2", "prompt": "Anna is", "accepted": [" "]}, r"accepted\.0: .*at least 1 char"),
        ({"id": "2", "prompt": "", "accepted": ["x"]}, "prompt: .*at least 1 char"),
        ({"id": "2", "prompt": "Anna is", "accepted": ["x"], "answer": 1}, "answer: Extra inputs"),
    ],
)
def test_a_bad_question_is_refused_with_file_line_and_field(
    tmp_path: Path, row: dict[str, Any], fault: str
) -> None:
    good = {"id": "1", "prompt": "The mill is", "accepted": ["red"]}
    file = write(tmp_path / "q.jsonl", good, row)
    with pytest.raises(
        EvaluationError, match=rf"q\.jsonl, line 2: expected a question .*{fault}.*; mend the line"
    ):
        load_questions(file)


def test_a_broken_line_is_refused_with_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"q\.jsonl, line 1: expected a JSON object"):
        load_questions(write(tmp_path / "q.jsonl", "{"))


def test_a_file_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="expected at least one question, found none"):
        load_questions(write(tmp_path / "q.jsonl"))
