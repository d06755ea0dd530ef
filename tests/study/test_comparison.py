"""Scores to means, claims and a verdict."""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.evaluation.cards import card as card_of

from fedgraft.evaluation.gate import Decision
from fedgraft.evaluation.scorecard import (
    FOLLOWED,
    RIGHT_AND_FOLLOWED,
    Example,
    Score,
    Scorecard,
    together,
)
from fedgraft.study.comparison import (
    MIN_RIGHT,
    check_claims,
    compare,
    in_words,
    summarise,
    told_of,
    verdict,
    with_forms,
)
from fedgraft.study.result import ARMS, Claim, Comparison

KNOWN = "knowledge/asked/new"
TEXT = "perplexity/hr/nats_per_token"

FOLLOWS = "The instruct model follows the instructions"
BASE = "The base model does not"
FORGETS = "Pre-training the instruct model further (S1) makes it forget them"
KEEPS = "The graft keeps what the instruct model followed"
KNOWS = "The graft knows the new facts"
BEATS = "The graft beats S1 on answers that are right and as instructed"


def card(arm: str, seed: int | None = None, **scores: float) -> Scorecard:
    """A scorecard; `followed`, `both` and `known` are shares, `nats` is of a text."""
    names = {"followed": FOLLOWED, "both": RIGHT_AND_FOLLOWED, "known": KNOWN, "nats": TEXT}
    return Scorecard(
        arm=arm,
        seed=seed,
        scores={
            names[key]: Score(
                value=value, num=100, stderr=0.01, unit="nats" if key == "nats" else "share"
            )
            for key, value in scores.items()
        },
    )


def claims(*cards: Scorecard) -> dict[str, Claim]:
    return {claim.text: claim for claim in check_claims(summarise(cards))}


def test_mean_and_spread_are_those_of_the_seeds() -> None:
    found = summarise(card("s1", seed, followed=v) for seed, v in ((1, 0.2), (2, 0.4), (3, 0.9)))
    score = found["s1"][FOLLOWED]
    assert score.mean == pytest.approx(0.5)
    assert (score.lowest, score.highest) == (0.2, 0.9)
    assert score.stdev == pytest.approx(0.36055512754)
    assert score.num_seeds == 3


def test_one_seed_has_no_spread() -> None:
    assert summarise([card("base", followed=0.1)])["base"][FOLLOWED].stdev is None


def test_a_score_that_was_not_taken_is_missing_not_zero() -> None:
    found = summarise([card("s1", 1, followed=0.5), card("s1", 2, followed=0.7, nats=3.0)])
    assert found["s1"][TEXT].num_seeds == 1
    assert found["s1"][TEXT].mean == 3.0
    assert KNOWN not in found["s1"]


@given(st.permutations([0.1, 0.7, 0.3, 0.25]))
def test_the_order_of_the_seeds_does_not_matter(values: list[float]) -> None:
    found = summarise(card("graft", seed, followed=value) for seed, value in enumerate(values))
    expected = summarise(card("graft", s, followed=v) for s, v in enumerate(sorted(values)))
    assert found == expected


@pytest.mark.parametrize(
    ("text", "cards", "reached"),
    [
        (FOLLOWS, [card("instruct", followed=0.9)], True),
        (FOLLOWS, [card("instruct", followed=0.899)], False),
        (BASE, [card("base", followed=0.099)], True),
        (BASE, [card("base", followed=0.1)], False),
        (FORGETS, [card("instruct", followed=0.95), card("s1", followed=0.75)], True),
        (FORGETS, [card("instruct", followed=0.95), card("s1", followed=0.76)], False),
        (FORGETS, [card("instruct", followed=0.7), card("s1", followed=0.9)], False),
        (KEEPS, [card("instruct", followed=0.7), card("graft", followed=0.63)], True),
        (KEEPS, [card("instruct", followed=0.7), card("graft", followed=0.62)], False),
        (KNOWS, [card("graft", known=0.5)], True),
        (KNOWS, [card("graft", known=0.49)], False),
        (BEATS, [card("graft", both=0.6), card("s1", both=0.4)], True),
        (BEATS, [card("graft", both=0.59), card("s1", both=0.4)], False),
        (BEATS, [card("graft", both=0.4), card("s1", both=0.6)], False),
    ],
)
def test_a_claim_is_held_against_its_bar(text: str, cards: list[Scorecard], reached: bool) -> None:
    assert claims(*cards)[text].reached is reached


def test_a_claim_that_was_not_measured_is_left_out() -> None:
    assert claims(*(card(arm, nats=2.0) for arm in ARMS)) == {}
    assert set(claims(card("instruct", followed=0.9))) == {FOLLOWS}
    assert KEEPS not in claims(card("instruct", followed=0.0), card("graft", followed=0.4))


def test_what_was_measured_is_shown_with_its_spread() -> None:
    found = claims(
        card("instruct", followed=0.95),
        card("s1", 1, followed=0.5, both=0.3),
        card("s1", 2, followed=0.6, both=0.3),
        card("graft", 1, followed=0.9, both=0.62),
        card("graft", 2, followed=0.9, both=0.6),
    )
    assert (
        found[FORGETS].measured == "40.0 points: from 95.0% to 55.0% (50.0% to 60.0% over 2 seeds)"
    )
    assert found[KEEPS].measured == "94.7% of it: 90.0% (90.0% to 90.0% over 2 seeds)"
    assert found[BEATS].measured.startswith("by 31.0 points: 61.0% (")


def decision(arm: str, outcome: Literal["promote", "refuse"]) -> Decision:
    return Decision(candidate=arm, verdict=outcome, reasons=())


def test_the_verdict_says_what_was_found() -> None:
    summaries = summarise(
        [
            card("instruct", followed=0.9, nats=3.0),
            card("s1", 1, followed=0.4, nats=2.1),
            card("graft", 1, followed=0.85, nats=2.0),
        ]
    )
    said = verdict(summaries, check_claims(summaries), [decision("graft", "promote")])
    assert "the graft follows 85% of the instructions" in said
    assert "follows 40%." in said
    assert "held-out text of 1 of 1 departments better" in said
    assert "3 of 3 claims were reached" in said
    assert said.endswith("The gate says: promote the graft.")


@pytest.mark.parametrize(
    ("followed", "said"),
    [
        (90, "against S1, the graft is better by 40.0 points ("),
        (51, "against S1, the graft cannot be told apart ("),
        (50, "against S1, the graft is the same, a 95% interval"),
        (10, "against S1, the graft is worse by 40.0 points ("),
    ],
)
def test_the_verdict_is_a_sentence_whatever_the_interval_says(followed: int, said: str) -> None:
    cards = {
        arm: [card_of([1.0] * right + [0.0] * (100 - right), arm=arm, name=FOLLOWED)]
        for arm, right in (("graft", followed), ("s1", 50))
    }
    summaries = summarise(one for found in cards.values() for one in found)
    assert said in verdict(summaries, (), (), compare(cards))


def test_other_ways_to_add_the_residual_are_told_against_plain_addition() -> None:
    cards = {
        arm: [card_of([1.0] * right + [0.0] * (100 - right), arm=arm, name=FOLLOWED)]
        for arm, right in (("graft", 80), ("TIES 0.2", 30), ("1 bit", 79))
    }
    ways = compare(cards, [("TIES 0.2", "graft"), ("1 bit", "graft")])
    assert verdict({}, (), (), ways=ways) == (
        "Other ways to add the residual, by prompts followed in full: example by example against "
        "graft, TIES 0.2 is worse; 1 bit is not to be told apart (95% intervals over 100 examples "
        "of one seed)."
    )


def test_one_refusal_among_the_seeds_refuses_the_graft() -> None:
    summaries = summarise([card("graft", 1, nats=2.0), card("instruct", nats=1.0)])
    decisions = [decision("graft", "promote"), decision("graft", "refuse")]
    said = verdict(summaries, (), decisions)
    assert "held-out text of 0 of 1 departments better" in said
    assert said.endswith("The gate passed 1 of 2 seeds: do not promote it yet.")


RIGHT, IN_FORM = "instructions/right", "instructions/in_form"


def answered(arm: str, right: int, in_form: int, of: int = 100) -> Scorecard:
    """A card of so many right answers, the first of which are in the form asked for."""
    cards = {
        name: card_of([1.0] * num + [0.0] * (of - num), arm=arm, name=name)
        for name, num in ((RIGHT, right), (RIGHT_AND_FOLLOWED, in_form))
    }
    return cards[RIGHT].model_copy(
        update={
            "scores": {name: one.scores[name] for name, one in cards.items()},
            "outcomes": {name: one.outcomes[name] for name, one in cards.items()},
        }
    )


def found(*cards: Scorecard) -> dict[tuple[str, str, str], Comparison]:
    by_arm: dict[str, list[Scorecard]] = {}
    for one in cards:
        by_arm.setdefault(one.arm, []).append(one)
    return {(one.arm, one.against, one.score): one for one in compare(by_arm)}


def test_arms_are_compared_on_the_same_examples() -> None:
    told = found(answered("graft", 90, 88), answered("s1", 60, 30), answered("instruct", 90, 89))
    assert told["graft", "s1", RIGHT_AND_FOLLOWED].told == "better"
    assert told["s1", "instruct", RIGHT_AND_FOLLOWED].told == "worse"
    assert told["graft", "instruct", RIGHT_AND_FOLLOWED].told == "cannot be told"


def test_lower_losses_are_better() -> None:
    cards = [
        card_of([value + shift for value in range(30)], arm=arm, name=TEXT, unit="nats")
        for arm, shift in (("graft", 0.0), ("s1", 1.0))
    ]
    assert found(*cards)["graft", "s1", TEXT].told == "better"


def test_the_fall_of_form_alone_has_a_line_of_its_own() -> None:
    """As GSM8K's strict match falls in arXiv 2410.10739, while its flexible match holds."""
    told = found(answered("instruct", 75, 74), answered("graft", 75, 47))
    assert told["graft", "instruct", IN_FORM].told == "worse"
    difference = told["graft", "instruct", IN_FORM].difference
    assert difference
    assert difference.value == pytest.approx(47 / 75 - 74 / 75)
    said = verdict({}, (), (), tuple(told.values()))
    assert said.startswith("The form of right answers suffers: against the instruct model, the")


def test_knowing_less_is_no_fall_of_form() -> None:
    told = found(answered("instruct", 80, 80), answered("graft", 40, 40))
    assert told["graft", "instruct", RIGHT_AND_FOLLOWED].told == "worse"
    assert told["graft", "instruct", IN_FORM].told == "the same"


def test_of_few_right_answers_the_form_is_missing() -> None:
    assert IN_FORM in with_forms(answered("base", MIN_RIGHT, 0)).scores
    told = found(answered("instruct", 80, 80), answered("graft", MIN_RIGHT - 1, 0))
    assert told["graft", "instruct", IN_FORM].told == "missing"
    assert in_words(told["graft", "instruct", IN_FORM]) == "missing"


def test_a_score_that_one_arm_lacks_is_missing_in_its_pairs_alone() -> None:
    told = found(card("graft", 1, followed=0.9), card("instruct", followed=0.9), card("s1", 1))
    assert told["graft", "instruct", FOLLOWED].difference is not None
    assert told["graft", "s1", FOLLOWED].told == "missing"


def test_pairs_and_a_score_of_ones_own_are_compared_that_score_first() -> None:
    cards = {
        arm: [card_of([1.0] * right + [0.0] * (40 - right), arm=arm, name="mine")]
        for arm, right in (("a", 30), ("b", 10), ("c", 20))
    }
    for arm, (only,) in cards.items():
        cards[arm] = [together(only, answered(arm, 30, 20))]
    told = compare(cards, [("a", "b"), ("c", "b")], score="mine")
    names = ["mine", RIGHT_AND_FOLLOWED, IN_FORM]
    assert [(one.arm, one.against) for one in told] == [("a", "b")] * 3 + [("c", "b")] * 3
    assert [one.score for one in told[:3]] == names
    assert told[0].told == "better"
    assert "mine" not in [one.score for one in compare(cards, [("a", "b")])]


def test_a_score_of_a_single_example_is_missing_from_comparisons_and_stops_nothing() -> None:
    cards = {arm: [card_of([1.0], arm=arm, name=FOLLOWED)] for arm in ("graft", "s1")}
    (one,) = compare(cards)
    assert one.told == "missing"


def test_cards_put_together_keep_the_examples_of_either() -> None:
    asked = Example(prompt="Who?", answer="I.", right=True, as_instructed=True)
    told = card("a").model_copy(update={"examples": (asked,)})
    for cards in ((told, card("a")), (card("a"), told)):
        assert together(*cards).examples == (asked,)


def test_what_is_better_worse_and_untold_is_said_in_one_sentence() -> None:
    cards = {
        arm: [card_of([1.0] * right + [0.0] * (100 - right), arm=arm, name=FOLLOWED)]
        for arm, right in (("up", 90), ("higher", 95), ("down", 10), ("same", 50), ("close", 51))
    }
    cards["mid"] = [card_of([1.0] * 50 + [0.0] * 50, arm="mid", name=FOLLOWED)]
    cards["gone"] = [card("gone")]
    pairs = [(arm, "mid") for arm in cards if arm != "mid"]
    assert told_of(FOLLOWED, compare(cards, pairs)) == (
        "Example by example against mid, up, higher are better; down is worse; same is the same; "
        "close is not to be told apart (95% intervals over 100 examples of one seed)."
    )
    assert told_of("other", compare(cards, pairs)) == ""


def test_comparisons_are_told_in_words_with_their_interval() -> None:
    told = found(answered("graft", 90, 88), answered("s1", 60, 30))
    said = in_words(told["graft", "s1", RIGHT_AND_FOLLOWED])
    assert said.startswith("better by 58.0 points (4")
    close = found(answered("graft", 90, 88), answered("s1", 90, 89))
    assert in_words(close["graft", "s1", RIGHT_AND_FOLLOWED]).startswith("cannot be told apart (-")
