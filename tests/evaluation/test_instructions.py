"""Laws of constraints: an answer built to obey passes, a plain one fails, loose forgives more."""

import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedgraft.errors import EvaluationError
from fedgraft.evaluation.instructions import (
    COUNTED,
    KINDS,
    PHRASED,
    Constraint,
    Kind,
    contains,
    describe,
    follows,
    follows_loosely,
    loose_variants,
    parse,
    sentences,
)

PLAIN = "The office of Mara is in Lisbon."
EMPTY = ("", " ", "\n\t\n")
PHRASES = ("Certainly.", "approved", "Kind regards")

word = st.text("abcdefghijklmnopqrstuvwxyz", min_size=2, max_size=8)
words = st.lists(word, min_size=1, max_size=6)
lines = st.lists(words.map(lambda ws: " ".join(ws).capitalize()), min_size=2, max_size=5)
answers = st.text('abAB 1.*"-[]<>{}\n', max_size=40)


def constraint_of(kind: Kind, *, count: int = 2, phrase: str = PHRASES[0]) -> Constraint:
    argument = str(count) if kind in COUNTED else phrase if kind in PHRASED else ""
    return Constraint(kind=kind, argument=argument)


constraints = st.builds(
    lambda kind, count, phrase: constraint_of(kind, count=count, phrase=phrase),
    st.sampled_from(KINDS),
    st.integers(1, 5),
    st.sampled_from(PHRASES),
)

OBEDIENT: dict[Kind, Callable[[Sequence[str], str], str]] = {
    "upper_case": lambda lines, _: "\n".join(lines).upper(),
    "lower_case": lambda lines, _: "\n".join(lines).lower(),
    "quoted": lambda lines, _: f'"{" ".join(lines)}"',
    "json": lambda lines, _: json.dumps({"answer": list(lines)}),
    "bullets": lambda lines, _: "Here:\n" + "\n".join(f"* {line}" for line in lines),
    "numbered": lambda lines, _: "\n".join(f"{n}. {line}" for n, line in enumerate(lines, 1)),
    "sentences": lambda lines, _: " ".join(f"{line}." for line in lines),
    "paragraphs": lambda lines, _: "\n***\n".join(lines),
    "max_words": lambda lines, _: " ".join(line.split()[0] for line in lines),
    "starts_with": lambda lines, phrase: f"{phrase} {' '.join(lines)}",
    "ends_with": lambda lines, phrase: f"{' '.join(lines)} {phrase}",
    "keyword": lambda lines, phrase: f"{lines[0]} {phrase}, {lines[1]}",
    "title": lambda lines, _: f"<<{lines[0]}>>\n{lines[1]}",
    "highlight": lambda lines, _: f"{lines[0]} *{lines[1]}*.",
    "postscript": lambda lines, _: f"{lines[0]}\nP.S. {lines[1]}",
    "placeholder": lambda lines, _: f"Dear [name], {lines[0]}",
}


@pytest.mark.parametrize("kind", KINDS)
@given(lines=lines, phrase=st.sampled_from(PHRASES))
def test_an_answer_built_to_obey_follows(kind: Kind, lines: list[str], phrase: str) -> None:
    constraint = constraint_of(kind, count=len(lines), phrase=phrase)
    assert follows(constraint, OBEDIENT[kind](lines, phrase))
    assert follows_loosely(constraint, OBEDIENT[kind](lines, phrase))


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_answer_follows_nothing(kind: Kind) -> None:
    for phrase in PHRASES:
        assert not follows(constraint_of(kind, phrase=phrase), PLAIN)
        assert not follows_loosely(constraint_of(kind, phrase=phrase), PLAIN)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("empty", EMPTY)
def test_an_empty_answer_follows_nothing(kind: Kind, empty: str) -> None:
    assert not follows(constraint_of(kind), empty)
    assert not follows_loosely(constraint_of(kind), empty)


@given(constraints, answers)
def test_what_follows_strictly_follows_loosely(constraint: Constraint, answer: str) -> None:
    assert follows_loosely(constraint, answer) or not follows(constraint, answer)


@given(constraints, answers)
def test_space_around_an_answer_does_not_count(constraint: Constraint, answer: str) -> None:
    assert follows(constraint, f"\n  {answer} \n") == follows(constraint, answer)


@pytest.mark.parametrize("kind", ["bullets", "numbered", "sentences", "paragraphs"])
@given(lines=lines, count=st.integers(1, 6))
def test_a_count_is_met_exactly(kind: Kind, lines: list[str], count: int) -> None:
    obedient = OBEDIENT[kind](lines, "")
    assert follows(constraint_of(kind, count=count), obedient) == (count == len(lines))


@given(words, st.integers(1, 8))
def test_a_limit_of_words_is_not_passed(words: list[str], limit: int) -> None:
    answer = ", ".join(words) + "."
    assert follows(constraint_of("max_words", count=limit), answer) == (len(words) <= limit)


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("upper_case", "THE OFFICE is IN LISBON"),
        ("upper_case", "123"),
        ("lower_case", "the office is in Lisbon"),
        ("quoted", '"Lisbon'),
        ("quoted", '""'),
        ("json", '["a list is no object"]'),
        ("json", 'Here: {"office": "Lisbon"}'),
        ("json", '{"office": Lisbon}'),
        ("bullets", "*one\n*two"),
        ("bullets", "* one\n*"),
        ("numbered", "1 one\n2 two"),
        ("paragraphs", "one *** two"),
        ("paragraphs", "***\none"),
        ("starts_with", "She said: Certainly."),
        ("ends_with", "Certainly. Goodbye"),
        ("keyword", "Certainly.ly"),
        ("title", "<<>> Lisbon"),
        ("title", "<Lisbon>"),
        ("highlight", "**Lisbon**"),
        ("highlight", "* Lisbon * Riga"),
        ("postscript", "See P.S. below"),
        ("postscript", "Lisbon.\nP.S."),
        ("placeholder", "Dear []"),
    ],
)
def test_what_only_looks_obedient_fails(kind: Kind, answer: str) -> None:
    assert not follows(constraint_of(kind), answer)


def test_phrases_count_in_any_case() -> None:
    assert follows(constraint_of("starts_with"), "CERTAINLY. IN LISBON.")
    assert follows(constraint_of("ends_with"), "in lisbon, certainly.")
    assert follows(constraint_of("keyword", phrase="approved"), "IT IS APPROVED.")


def test_an_ending_counts_within_quotation_marks() -> None:
    assert follows(constraint_of("ends_with"), '"In Lisbon. Certainly."')


def test_the_loose_variants_are_the_eight_of_ifeval() -> None:
    assert loose_variants("Sure:\n*IN* LISBON\nBye") == (
        "Sure:\n*IN* LISBON\nBye",
        "*IN* LISBON\nBye",
        "Sure:\n*IN* LISBON",
        "*IN* LISBON",
        "Sure:\nIN LISBON\nBye",
        "IN LISBON\nBye",
        "Sure:\nIN LISBON",
        "IN LISBON",
    )


@pytest.mark.parametrize("answer", ["Sure:\nIN LISBON", "IN LISBON\nBye", "Hi\nIN LISBON\nBye"])
def test_the_loose_check_forgives_a_greeting_and_a_farewell(answer: str) -> None:
    assert not follows(constraint_of("upper_case"), answer)
    assert follows_loosely(constraint_of("upper_case"), answer)


@given(lines)
def test_sentences_are_told_apart_and_nothing_is_lost(lines: list[str]) -> None:
    text = " ".join(f"{line}!" for line in lines)
    assert sentences(text) == [f"{line}!" for line in lines]


def test_initials_and_decimals_end_no_sentence() -> None:
    assert len(sentences("M. Lindquist pays 3.50 for lunch. She is in Riga.")) == 2


@given(word, word)
def test_a_phrase_is_contained_on_its_own_and_not_within_a_word(phrase: str, other: str) -> None:
    assert contains(f"{other} ({phrase.upper()})", phrase)
    assert not contains(f"{other}_{phrase}", phrase)
    assert not contains(f"{other} {phrase}", " ")


def test_each_kind_has_its_own_words() -> None:
    described = [describe(constraint_of(kind, count=3)) for kind in KINDS]
    assert len(set(described)) == len(KINDS)
    for kind, text in zip(KINDS, described, strict=True):
        assert ("3" in text) == (kind in COUNTED)
        assert (PHRASES[0] in text) == (kind in PHRASED)


@pytest.mark.parametrize("kind", KINDS)
def test_an_argument_that_does_not_fit_is_refused(kind: Kind) -> None:
    bad = ("", "0", "-1", "two") if kind in COUNTED else ("", " ") if kind in PHRASED else ("2",)
    for argument in bad:
        with pytest.raises(ValidationError):
            Constraint(kind=kind, argument=argument)
        with pytest.raises(EvaluationError, match=f"found '{kind}' with argument '{argument}'"):
            parse(kind, argument)


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(EvaluationError, match=r"upper_case, .*placeholder, found 'haiku'"):
        parse("haiku")


def test_a_known_kind_is_parsed() -> None:
    assert parse("bullets", "3") == Constraint(kind="bullets", argument="3")
