"""Laws of the fictional company: what is held out stays out; answers are true and in form."""

import filecmp
import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgraft.errors import ArtefactError
from fedgraft.evaluation.instructions import KINDS, contains, follows, parse
from fedgraft.pocket.company import (
    NUM_ASKED,
    SEED,
    asked_of,
    desk_pages,
    pages_of_year,
    small_talk,
    training_exercises,
    write_company,
)
from fedgraft.pocket.entities import Company
from fedgraft.pocket.exercises import HELD_OUT_PAIRS, PAIRS, SEEN_PAIRS, exercise
from fedgraft.pocket.lexicon import DEPARTMENTS
from fedgraft.pocket.lexicon import KINDS as ENTITY_KINDS
from fedgraft.pocket.pages import writing_desk_pages
from fedgraft.text.corpus import Corpus
from fedgraft.text.dialogues import Dialogue, load_dialogues


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_company(tmp_path_factory.mktemp("company") / "company")


@pytest.fixture(scope="module")
def company() -> Company:
    return Company.found(SEED)


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = write_company(tmp_path / "again")
    files = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert len(files) == 18
    _, different, missing = filecmp.cmpfiles(folder, again, files, shallow=False)
    assert (different, missing) == ([], [])


def test_another_seed_gives_another_company(company: Company) -> None:
    assert Company.found(SEED + 1).year1 != company.year1


def test_a_company_is_not_written_over_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ArtefactError, match="exists already"):
        write_company(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_no_two_entities_share_a_name(company: Company) -> None:
    names = Counter(entity.name for entity in company.year1)
    names.update({e.name for e in company.year2} - names.keys())
    assert max(names.values()) == 1


def test_every_department_has_pages_in_both_years(folder: Path) -> None:
    for department in DEPARTMENTS:
        for year in (1, 2):
            corpus = Corpus.load(folder / f"year{year}" / f"{department}.jsonl")
            assert len(corpus.documents) > 100


def test_year_one_says_nothing_of_the_new_entities(company: Company) -> None:
    new_names = {e.name for e in company.year2} - {e.name for e in company.year1}
    old_text = "\n".join(page.text.lower() for page in pages_of_year(company, 1, SEED))
    assert [name for name in new_names if name.lower() in old_text] == []


def test_year_two_changes_facts_of_old_entities(company: Company) -> None:
    old = {(f.entity, f.attribute.name): f.value for e in company.year1 for f in e.facts}
    changed = [*company.facts("validation", "new"), *company.facts("test", "new")]
    was_known = [f for f in changed if (f.entity, f.attribute.name) in old]
    assert len(was_known) == 2 * len(ENTITY_KINDS)
    assert all(old[f.entity, f.attribute.name] != f.value for f in was_known)


def test_every_fact_is_said_in_several_phrasings(company: Company) -> None:
    for year, entities in ((1, company.year1), (2, company.year2)):
        text = "\n".join(page.text for page in pages_of_year(company, year, SEED))
        for fact in (fact for entity in entities for fact in entity.facts):
            said = {t for t in fact.attribute.statements if fact.say(t) in text}
            asked = {t for t in fact.attribute.questions if fact.say(t) in text}
            assert len(said) >= 3, fact
            assert asked, fact


def test_training_never_asks_about_a_held_out_entity(company: Company) -> None:
    held_out = {e.name for e in (*company.year1, *company.year2) if e.part != "train"}
    exercises = training_exercises(company, 3000, SEED)
    assert {e.fact.entity for e in exercises}.isdisjoint(held_out)
    shown = "\n".join(page.text for page in writing_desk_pages(exercises, Random(0)))
    assert [name for name in held_out if name in shown] == []


def test_training_never_combines_a_held_out_pair(company: Company) -> None:
    for some in training_exercises(company, 3000, SEED):
        assert tuple(constraint.kind for constraint in some.constraints) not in HELD_OUT_PAIRS
    assert set(SEEN_PAIRS) | HELD_OUT_PAIRS == set(PAIRS)
    assert len(HELD_OUT_PAIRS) >= 8


def test_validation_and_test_ask_about_different_entities(folder: Path) -> None:
    asked = {
        part: {d.messages[0].content for d in load_dialogues(folder / f"dialogues/{part}.jsonl")}
        for part in ("train", "validation", "test")
    }
    assert not asked["validation"] & asked["test"]
    assert not asked["train"] & (asked["test"] | asked["validation"])


def test_scored_dialogues_cover_every_kind_of_constraint_and_carry_no_answer(folder: Path) -> None:
    scored: tuple[Dialogue, ...] = load_dialogues(folder / "dialogues/test.jsonl")
    kinds = {demand.kind for dialogue in scored for demand in dialogue.constraints}
    assert kinds == set(KINDS)
    assert all(dialogue.messages[-1].role == "user" for dialogue in scored)
    assert {dialogue.group for dialogue in scored} == {"old", "new", "unseen_pairs"}


def test_answers_of_the_training_dialogues_are_right_and_as_instructed(folder: Path) -> None:
    for dialogue in load_dialogues(folder / "dialogues/train.jsonl"):
        answer = dialogue.messages[-1].content
        assert contains(answer, dialogue.accepted[0])
        assert all(follows(parse(d.kind, d.argument), answer) for d in dialogue.constraints)


def test_scored_dialogues_name_an_answer_that_is_right_and_as_instructed(folder: Path) -> None:
    for part in ("validation", "test"):
        for dialogue in load_dialogues(folder / f"dialogues/{part}.jsonl"):
            (answer,) = dialogue.references
            assert contains(answer, dialogue.accepted[0])
            assert all(follows(parse(d.kind, d.argument), answer) for d in dialogue.constraints)


def test_what_departments_were_asked_holds_nothing_that_is_scored(
    folder: Path, company: Company
) -> None:
    asked = load_dialogues(folder / "dialogues/departments.jsonl")
    said = "\n".join(m.content.lower() for dialogue in asked for m in dialogue.messages)
    held_out = {e.name for e in (*company.year1, *company.year2) if e.part != "train"}
    assert [name for name in held_out if name.lower() in said] == []
    pairs = {tuple(demand.kind for demand in dialogue.constraints) for dialogue in asked}
    assert not pairs & HELD_OUT_PAIRS
    scored = {
        dialogue.messages[0].content
        for part in ("validation", "test")
        for dialogue in load_dialogues(folder / f"dialogues/{part}.jsonl")
    }
    assert not scored & {dialogue.messages[0].content for dialogue in asked}


def test_what_departments_were_asked_is_answered_right_and_as_instructed(folder: Path) -> None:
    asked = load_dialogues(folder / "dialogues/departments.jsonl")
    assert Counter(d.department for d in asked) == dict.fromkeys(DEPARTMENTS, NUM_ASKED)
    for dialogue in asked:
        (answer,) = dialogue.given_answers
        assert contains(answer, dialogue.accepted[0])
        assert all(follows(parse(d.kind, d.argument), answer) for d in dialogue.constraints)


@pytest.mark.parametrize("department", DEPARTMENTS)
def test_a_department_is_asked_by_the_law_of_zipf(department: str, company: Company) -> None:
    """Over ten companies' worth of draws, so that chance is below three points of a share."""
    drawn = [asked_of(company, department, seed) for seed in range(10)]
    topics = [[n for _, n in Counter(d.group for d in asked).most_common()] for asked in drawn]
    places = range(1, len(topics[0]) + 1)
    expected = [NUM_ASKED / place / sum(1 / p for p in places) for place in places]
    for place in range(len(expected)):
        mean = sum(counts[place] for counts in topics) / len(topics)
        assert mean == pytest.approx(expected[place], abs=0.03 * NUM_ASKED)
    kinds = Counter(len(dialogue.constraints) for asked in drawn for dialogue in asked)
    shares = [kinds[number] / kinds.total() for number in range(3)]
    assert shares == pytest.approx([0.2, 0.44, 0.36], abs=0.03)


def test_a_quarter_repeats_what_was_asked_before(
    company: Company, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many different ones as three quarters of the number give that are all drawn afresh."""

    def num_different() -> int:
        asked = [asked_of(company, name, seed) for name in DEPARTMENTS for seed in (0, 1)]
        return sum(
            len({(d.group, d.accepted, tuple(c.kind for c in d.constraints)) for d in ours})
            for ours in asked
        )

    found = num_different()
    monkeypatch.setattr("fedgraft.pocket.company.REPEATED", 0)
    assert found < 0.9 * num_different()
    monkeypatch.setattr("fedgraft.pocket.company.NUM_ASKED", 3 * NUM_ASKED // 4)
    assert found == pytest.approx(num_different(), rel=0.05)


def test_departments_are_asked_different_things_and_some_again(folder: Path) -> None:
    asked = load_dialogues(folder / "dialogues/departments.jsonl")
    favourites = set()
    for department in DEPARTMENTS:
        ours = [d for d in asked if d.department == department]
        kinds = Counter(d.constraints[0].kind for d in ours if len(d.constraints) == 1)
        favourites.add(kinds.most_common(1)[0][0])
        same = Counter((d.group, d.accepted, tuple(c.kind for c in d.constraints)) for d in ours)
        assert 0.05 < 1 - len({d.messages for d in ours}) / len(ours) < 0.25
        assert same.most_common(1)[0][1] > 5
    assert len(favourites) > 1


@given(seed=st.integers(0, 10_000), pair=st.sampled_from(PAIRS))
def test_any_fact_can_be_asked_under_any_pair_of_constraints(
    seed: int, pair: tuple[str, str]
) -> None:
    rng = Random(seed)
    fact = rng.choice(Company.found(SEED).facts("train", "old"))
    asked = exercise(fact, pair, rng)  # type: ignore[arg-type]
    assert contains(asked.answer, fact.value)
    assert all(follows(constraint, asked.answer) for constraint in asked.constraints)
    assert not contains(asked.prompt, fact.value)  # though "red" stands in "numbered"


def test_pages_hold_no_text_of_the_data_folder(folder: Path) -> None:
    page = json.loads((folder / "year1" / "hr.jsonl").read_text().splitlines()[0])
    assert page.keys() == {"id", "department", "text"}


def test_the_rest_of_what_the_base_read_is_on_disk(folder: Path, company: Company) -> None:
    for name, pages in (("desk", desk_pages(company, SEED)), ("chats", small_talk(company, SEED))):
        written = Corpus.load(folder / f"{name}.jsonl").documents
        assert [page.text for page in written] == list(dict.fromkeys(page.text for page in pages))
    assert all("<|im_start|>" in page.text for page in small_talk(company, SEED))
