"""Laws of cleaning: every document is kept or counted, the first of its kind stays."""

import os
import random
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedgraft.errors import CorpusError
from fedgraft.text.cleaning import Cleaning, Tally, clean, normalise, shingles
from fedgraft.text.sources import Document, documents

NEWS = Path(os.environ.get("FEDGRAFT_DATA", "../shared/data")) / "news"
ENGLISH = (
    "The council of the town has decided to open the old harbour again, and the ships that bring "
    "the mail every morning will land there from the first day of the coming month."
)
GERMAN = (
    "Der Rat der Stadt hat beschlossen, den alten Hafen wieder zu öffnen, und die Schiffe, welche "
    "jeden Morgen die Post bringen, legen ab dem ersten Tag des nächsten Monats dort an."
)
ALL = Cleaning(near_duplicates=None, languages=None)


def made(*texts: str) -> list[Document]:
    return [Document(id=str(n), text=text, source="test") for n, text in enumerate(texts)]


def words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def kept(*texts: str, settings: Cleaning = ALL, tally: Tally | None = None) -> list[str]:
    count = words if settings.needs_tokens else None
    return [d.text for d in clean(made(*texts), settings, tally=tally, count=count)]


def story(seed: int, length: int = 300) -> list[str]:
    return [str(random.Random(f"{seed}:{n}").getrandbits(40)) for n in range(length)]


@given(
    st.lists(st.sampled_from(["", " \n", "a", "a ", "a b c", "d e f g h i j k", ENGLISH, GERMAN])),
    st.integers(1, 5),
)
def test_what_is_read_is_what_is_kept_and_all_that_was_dropped(
    texts: list[str], min_tokens: int
) -> None:
    tally = Tally()
    settings = Cleaning(min_tokens=min_tokens, max_tokens=40)
    found = kept(*texts, settings=settings, tally=tally)
    assert tally.num_read == len(texts) == tally.num_kept + sum(tally.dropped.values())
    assert tally.num_kept == len(found)
    assert tally.num_tokens == sum(words(found))


@given(st.lists(st.text(max_size=20)))
def test_without_filters_the_different_texts_stay_in_their_order(texts: list[str]) -> None:
    normal = [normalise(text) for text in texts]
    assert kept(*texts) == [text for text in dict.fromkeys(normal) if text.strip()]


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFC", once)


def test_one_way_to_write_a_character_a_space_and_a_line_end() -> None:
    assert normalise("caf\u0065\u0301") == "café"
    assert normalise("10\u202fkm\u00a0away\u3000now") == "10 km away now"
    assert normalise("a\r\nb\rc\u2028d\x85e") == "a\nb\nc\nd\ne"
    assert normalise("so\u00adft\u200b \ufeffand\x00 bell\x07") == "soft and bell"
    assert normalise("tab\tstays\nline stays") == "tab\tstays\nline stays"
    assert normalise("क्\u200dष \U0001f468\u200d\U0001f469") == "क्\u200dष \U0001f468\u200d\U0001f469"


def test_two_spellings_of_a_text_are_duplicates_once_normalised() -> None:
    tally = Tally()
    assert kept("café", "cafe\u0301", tally=tally) == ["café"]
    assert (tally.dropped["exact duplicate"], tally.num_changed) == (1, 1)
    raw = Cleaning(normalise=False, near_duplicates=None, languages=None)
    assert len(kept("café", "cafe\u0301", settings=raw)) == 2


def test_bounds_on_length_are_inclusive() -> None:
    tally = Tally()
    settings = Cleaning(min_tokens=2, max_tokens=3, near_duplicates=None, languages=None)
    texts = ("a", "a b", "a b c", "a b c d")
    assert kept(*texts, settings=settings, tally=tally) == ["a b", "a b c"]
    assert (tally.dropped["too short"], tally.dropped["too long"]) == (1, 1)


def test_documents_know_their_tokens_where_they_were_counted() -> None:
    assert [d.num_tokens for d in clean(made("a b", "c"), ALL, count=words)] == [2, 1]
    assert [d.num_tokens for d in clean(made("a b", "c"), ALL)] == [None, None]


def test_tokens_are_counted_in_batches_and_only_for_what_is_left() -> None:
    asked: list[int] = []

    def count(texts: list[str]) -> list[int]:
        asked.append(len(texts))
        return words(texts)

    list(clean(made(*(f"text {n % 100}" for n in range(200))), ALL, count=count))
    assert sum(asked) == 100
    assert len(asked) <= 4


def test_bounds_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(CorpusError, match="expected a tokenizer for the bounds"):
        clean(made("a"), Cleaning(min_tokens=1))


def test_bounds_that_leave_nothing_between_them_are_refused() -> None:
    with pytest.raises(ValidationError, match="found 5 and 4; swap them"):
        Cleaning(min_tokens=5, max_tokens=4)


def test_the_first_of_near_duplicates_stays() -> None:
    first = story(1)
    nearly = [*first[:-4], "another", "end", "is", "here"]
    half = first[:150] + story(2)[:150]
    tally = Tally()
    settings = Cleaning(languages=None)
    texts = [" ".join(text) for text in (first, nearly, half, story(3))]
    assert kept(*texts, settings=settings, tally=tally) == [texts[0], texts[2], texts[3]]
    assert tally.dropped["near duplicate"] == 1


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_pairs_well_above_the_threshold_go_and_pairs_well_below_stay(threshold: float) -> None:
    def found(similarity: float) -> int:
        """How many of 30 pairs, whose runs of words are so similar, are taken for duplicates."""
        number = 0
        for seed in range(30):
            one = story(seed, 404)
            shared = round(2 * 400 * similarity / (1 + similarity)) + 4
            other = one[:shared] + story(1000 + seed, 404 - shared)
            a, b = set(shingles(" ".join(one))), set(shingles(" ".join(other)))
            assert abs(len(a & b) / len(a | b) - similarity) < 0.02
            texts = (" ".join(one), " ".join(other))
            settings = Cleaning(languages=None, near_duplicates=threshold)
            number += 2 - len(kept(*texts, settings=settings))
        return number

    assert found(min(0.99, threshold + 0.1)) >= 27
    assert found(threshold - 0.2) <= 1


def test_case_and_punctuation_do_not_make_a_text_new() -> None:
    settings = Cleaning(languages=None)
    assert kept("One, two: three!", "one two three", settings=settings) == ["One, two: three!"]


def test_texts_without_any_word_are_not_duplicates_of_each_other() -> None:
    texts = ("---", "★★★", "★ ★ ★")
    assert kept(*texts, settings=Cleaning(languages=None)) == [*texts]


def test_a_language_that_was_not_asked_for_is_dropped() -> None:
    settings = Cleaning(near_duplicates=None)
    assert kept(ENGLISH, GERMAN, settings=settings) == [ENGLISH]
    both = Cleaning(near_duplicates=None, languages=("en", "de"))
    assert kept(ENGLISH, GERMAN, settings=both) == [ENGLISH, GERMAN]


def test_a_language_that_cannot_be_told_is_refused_with_those_that_can() -> None:
    with pytest.raises(CorpusError, match=r"one of .*de.*en.*, found 'english'"):
        clean(made("a"), Cleaning(languages=("english",)))


def test_documents_come_as_they_are_read() -> None:
    num_read = 0

    def endless() -> Iterator[Document]:
        nonlocal num_read
        while True:
            num_read += 1
            yield Document(id="", text=" ".join(story(num_read, 20)), source="")

    stream = clean(endless(), Cleaning(languages=None))
    for _ in range(100):
        next(stream)
    assert num_read < 300


def test_reasons_are_counted_in_the_order_of_the_checks_even_where_nothing_was_dropped() -> None:
    tally = Tally()
    list(clean([], Cleaning(min_tokens=1), tally=tally, count=words))
    assert list(tally.dropped) == [
        *("empty", "exact duplicate", "other language", "too short", "near duplicate")
    ]


def test_real_news_is_kept_but_for_a_few_and_twice_the_same_way() -> None:
    if not NEWS.is_dir():
        pytest.skip(f"no real text at {NEWS}: set FEDGRAFT_DATA")
    read = list(documents(NEWS / "wikipedia_current_events_2025_2026.jsonl"))
    tally = Tally()
    found = list(clean(read, Cleaning(), tally=tally))
    assert tally.num_read == len(read) == tally.num_kept + sum(tally.dropped.values())
    assert tally.num_kept > 0.98 * len(read)
    assert list(clean(read, Cleaning())) == found
    assert list(clean(found + found, Cleaning())) == found
