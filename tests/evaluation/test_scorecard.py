"""Laws of scorecards: known answers give known scores; what was not measured is missing."""

import math
from typing import Any

import pytest
from pydantic import ValidationError
from tests.evaluation.lessons import LESSONS, PAGES, Taught, dialogue

from fedgraft.errors import EvaluationError, NonFiniteError
from fedgraft.evaluation.knowledge import Question
from fedgraft.evaluation.perplexity import document_perplexity, response_perplexity
from fedgraft.evaluation.scorecard import FOLLOWED, Score, Scorecard, evaluate
from fedgraft.testing import tiny_model, tiny_tokenizer
from fedgraft.text.corpus import Document
from fedgraft.text.dialogues import Demand

CAPITALS, SHORT = Demand(kind="upper_case"), Demand(kind="max_words", argument="2")
(MILL, _), (BAKER, _), (OPEN, _) = LESSONS
# The model answers "BY THE RIVER.", "ANNA BAKES." and "at noon".
INSTRUCTED = (
    dialogue(MILL, demands=(CAPITALS, SHORT), accepted=("river",), group="old", department="hr"),
    dialogue(BAKER, demands=(CAPITALS,), accepted=("Otto",), group="new", department="hr"),
    dialogue(OPEN, demands=(SHORT,), group="new", department="finance"),
)
DOCUMENTS = tuple(Document(id=str(n), text=text, source="") for n, text in enumerate(PAGES))


def values(taught: Taught, **material: Any) -> dict[str, float]:
    card = evaluate(taught.model, taught.tokenizer, arm="taught", **material)
    return {name: score.value for name, score in card.scores.items()}


def test_instructions_are_scored_by_prompt_and_by_constraint(taught: Taught) -> None:
    found = values(taught, dialogues=INSTRUCTED)
    assert found["instructions/prompt_strict"] == pytest.approx(2 / 3)
    assert found["instructions/instruction_strict"] == pytest.approx(3 / 4)
    assert found["instructions/prompt_loose"] >= found["instructions/prompt_strict"]
    assert found["instructions/instruction_loose"] >= found["instructions/instruction_strict"]


def test_each_group_and_department_has_its_own_scores(taught: Taught) -> None:
    found = values(taught, dialogues=INSTRUCTED)
    strict = {n.removeprefix(f"{FOLLOWED}/"): v for n, v in found.items() if n.startswith(FOLLOWED)}
    assert strict == {FOLLOWED: pytest.approx(2 / 3), "old": 0, "new": 1, "hr": 0.5, "finance": 1}


def test_a_group_that_bears_the_name_of_its_department_counts_once(taught: Taught) -> None:
    asked = dialogue(BAKER, demands=(CAPITALS,), group="hr", department="hr")
    card = evaluate(taught.model, taught.tokenizer, arm="taught", dialogues=[asked])
    assert card.scores[f"{FOLLOWED}/hr"].num == 1


def test_only_what_can_be_told_counts_as_right_or_wrong(taught: Taught) -> None:
    card = evaluate(taught.model, taught.tokenizer, arm="taught", dialogues=INSTRUCTED)
    assert card.value("instructions/right") == 0.5
    assert card.value("instructions/right_and_as_instructed") == 0
    assert card.scores["instructions/right"].num == 2
    assert card.value("instructions/right/finance") is None
    assert card.value("instructions/right_and_as_instructed/finance") is None


def test_plain_questions_are_knowledge_and_not_instructions(taught: Taught) -> None:
    plain = (
        dialogue(MILL, accepted=("by the river",), group="old"),
        dialogue(BAKER, accepted=("Otto",), group="new"),
        dialogue(OPEN, group="new"),
    )
    expected = {"knowledge/asked": 0.5, "knowledge/asked/old": 1, "knowledge/asked/new": 0}
    assert values(taught, dialogues=plain) == expected
    assert all(name.startswith("instructions/") for name in values(taught, dialogues=INSTRUCTED))


def test_completed_questions_are_scored_overall_and_by_group(taught: Taught) -> None:
    heron = Question(id="1", prompt="The heron stands in the", accepted=("river",), group="old")
    door = Question(id="2", prompt="The door of the mill is", accepted=("blue",))
    expected = {"knowledge/recall": 0.5, "knowledge/recall/old": 1}
    assert values(taught, questions=[heron, door]) == expected


def test_perplexity_has_a_score_for_each_department_and_for_responses(taught: Taught) -> None:
    responses = [dialogue(*lesson) for lesson in LESSONS]
    found = values(taught, documents={"hr": DOCUMENTS}, responses=responses)
    text = document_perplexity(taught.model, taught.tokenizer, DOCUMENTS)
    said = response_perplexity(taught.model, taught.tokenizer, responses)
    assert found == {
        "perplexity/hr/nats_per_token": pytest.approx(text.nats_per_token),
        "perplexity/hr/bits_per_byte": pytest.approx(text.bits_per_byte),
        "response/nats_per_token": pytest.approx(said.nats_per_token),
    }


REFERENCED = (
    dialogue(MILL, group="old", department="hr", references=("the river", "by the  river")),
    dialogue(BAKER, "Anna", group="new", department="hr"),
    dialogue(OPEN, group="new"),
)
"""The third has nothing to be compared with."""


def test_answers_are_compared_with_references_or_given_answers_in_both_definitions(
    taught: Taught,
) -> None:
    card = evaluate(taught.model, taught.tokenizer, arm="taught", dialogues=REFERENCED)
    found = {name: score.value for name, score in card.scores.items()}
    assert found == {
        "response/rouge_l": pytest.approx((1 + 2 / 3) / 2),
        "response/rouge_l/old": 1,
        "response/rouge_l/new": pytest.approx(2 / 3),
        "response/rouge_l/hr": pytest.approx((1 + 2 / 3) / 2),
        # "BY THE RIVER." and "ANNA BAKES." share no word with theirs where case counts
        **{name: 0 for name in found if name.startswith("response/rouge_l_legacy")},
    }
    assert "response/rouge_l_legacy/hr" in found
    assert card.scores["response/rouge_l"].num == 2
    assert sorted(card.outcomes["response/rouge_l"].amounts) == pytest.approx([2 / 3, 1])


def test_each_response_has_its_own_loss_and_each_part_the_mean_over_its_tokens(
    taught: Taught,
) -> None:
    responses = [
        dialogue(*lesson, group=group) for lesson, group in zip(LESSONS, "aab", strict=True)
    ]
    card = evaluate(taught.model, taught.tokenizer, arm="taught", responses=responses)
    said = response_perplexity(taught.model, taught.tokenizer, responses).per_text
    nats = [text.nats / text.num_tokens for text in said]
    kept = card.outcomes["response/nats_per_token"]
    in_six_digits = sorted(text.nats for text in said)
    assert sorted(kept.amounts) == pytest.approx(in_six_digits, rel=1e-5)
    assert kept.sizes is not None
    assert sorted(kept.sizes) == sorted(text.num_tokens for text in said)
    both = (said[0].nats + said[1].nats) / (said[0].num_tokens + said[1].num_tokens)
    assert card.value("response/nats_per_token/a") == pytest.approx(both)
    assert card.value("response/nats_per_token/b") == pytest.approx(nats[2])


def test_what_was_not_measured_is_missing_and_not_zero(taught: Taught) -> None:
    card = evaluate(taught.model, taught.tokenizer, arm="taught")
    assert card.scores == {}
    assert card.value(FOLLOWED) is None


def test_the_standard_error_of_a_share_is_the_binomial_one(taught: Taught) -> None:
    card = evaluate(taught.model, taught.tokenizer, arm="taught", dialogues=INSTRUCTED)
    assert card.scores[FOLLOWED].stderr == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 3))


def test_constraints_of_one_prompt_are_one_draw(taught: Taught) -> None:
    once = dialogue(BAKER, demands=(CAPITALS,)), dialogue(OPEN, demands=(CAPITALS,))
    thrice = dialogue(BAKER, demands=(CAPITALS,) * 3), dialogue(OPEN, demands=(CAPITALS,) * 3)
    name = "instructions/instruction_strict"
    cards = [evaluate(taught.model, taught.tokenizer, arm="", dialogues=d) for d in (once, thrice)]
    assert [card.scores[name].num for card in cards] == [2, 6]
    assert [card.scores[name].stderr for card in cards] == pytest.approx([0.5**1.5] * 2)


def test_the_standard_error_of_texts_shrinks_with_the_root_of_their_number(taught: Taught) -> None:
    name = "perplexity/hr/nats_per_token"
    few, many = (
        evaluate(taught.model, taught.tokenizer, arm="", documents={"hr": DOCUMENTS * copies})
        for copies in (1, 4)
    )
    assert few.scores[name].value == pytest.approx(many.scores[name].value)
    assert few.scores[name].stderr == pytest.approx(2 * many.scores[name].stderr)
    assert few.scores[name].stderr > 0


def test_shares_are_better_high_and_losses_low() -> None:
    better = {
        unit: Score(value=1, num=1, stderr=0, unit=unit).higher_is_better
        for unit in ("share", "nats", "bits")
    }
    assert better == {"share": True, "nats": False, "bits": False}


def test_examples_show_the_question_and_never_the_reference_answer(taught: Taught) -> None:
    asked = [dialogue(*lesson, accepted=("noon",), demands=(SHORT,)) for lesson in LESSONS]
    card = evaluate(taught.model, taught.tokenizer, arm="taught", dialogues=asked, num_examples=2)
    assert [(e.prompt, e.answer) for e in card.examples] == [*LESSONS[:2]]
    last = evaluate(taught.model, taught.tokenizer, arm="taught", dialogues=asked[2:]).examples[0]
    assert (last.answer, last.right, last.as_instructed) == ("at noon", True, True)


def test_a_scorecard_comes_back_from_json_as_it_was(taught: Taught) -> None:
    card = evaluate(
        taught.model, taught.tokenizer, arm="taught", seed=3, dialogues=INSTRUCTED, num_examples=3
    )
    assert len(card.examples) == 3
    assert Scorecard.model_validate_json(card.model_dump_json()) == card


def test_a_value_that_is_no_number_cannot_be_a_score() -> None:
    with pytest.raises(ValidationError):
        Score(value=math.nan, num=1, stderr=0, unit="nats")


def test_a_bad_constraint_is_found_before_the_model_is_asked_anything() -> None:
    bad = dialogue("Where?", demands=(Demand(kind="haiku"),))
    with pytest.raises(EvaluationError, match=r"dialogue 'Where\?'"):
        evaluate(None, None, arm="none", documents={"hr": DOCUMENTS}, dialogues=[bad])


def test_a_department_without_documents_is_named() -> None:
    with pytest.raises(EvaluationError, match="a: text of hr: expected held-out documents"):
        evaluate(tiny_model(), tiny_tokenizer(), arm="a", documents={"hr": ()})


def test_a_broken_model_gets_no_scores() -> None:
    model = tiny_model()
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    for material in ({"documents": {"hr": DOCUMENTS}}, {"dialogues": INSTRUCTED}):
        with pytest.raises(NonFiniteError):
            evaluate(model, tiny_tokenizer(), arm="broken", **material)


def test_every_score_is_made_of_the_outcomes_that_are_kept_with_it(taught: Taught) -> None:
    card = evaluate(
        taught.model,
        taught.tokenizer,
        arm="taught",
        documents={"hr": DOCUMENTS},
        dialogues=(*INSTRUCTED, *REFERENCED),
        questions=[Question(id="1", prompt="The door of the mill is", accepted=("blue",))],
        responses=[dialogue(*lesson) for lesson in LESSONS],
    )
    assert card.outcomes.keys() == card.scores.keys()
    for name, kept in card.outcomes.items():
        assert kept.value == pytest.approx(card.scores[name].value, rel=1e-5)


def test_the_same_examples_in_another_order_give_the_same_outcomes(taught: Taught) -> None:
    asked = [*INSTRUCTED, *REFERENCED]
    one, two = (
        evaluate(taught.model, taught.tokenizer, arm="", dialogues=dialogues)
        for dialogues in (asked, asked[::-1])
    )
    assert one.outcomes == two.outcomes
