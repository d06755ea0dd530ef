"""Laws of the gate: every rule must pass, and what was not measured does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.evaluation.cards import card as card_of

from fedgraft.evaluation.gate import DEFAULT_RULES, MIN_EXAMPLES, Decision, Rule, decide
from fedgraft.evaluation.scorecard import FOLLOWED, Score, Scorecard

HR, FINANCE = "perplexity/hr/nats_per_token", "perplexity/finance/nats_per_token"
NEW = "knowledge/asked/new"
INSTRUCT = {FOLLOWED: 0.9, NEW: 0.1, HR: 3.0, FINANCE: 2.0}
shares = st.floats(0, 1)


def card(arm: str, scores: dict[str, float], *, stderr: float = 0.0) -> Scorecard:
    """A card of figures alone, as sure as `stderr` says."""
    units = {name: "nats" if name.startswith("perplexity") else "share" for name in scores}
    return Scorecard(
        arm=arm,
        seed=None,
        scores={
            name: Score(value=value, num=100, stderr=stderr, unit=units[name])  # type: ignore[arg-type]
            for name, value in scores.items()
        },
    )


def judge(candidate: dict[str, float], *rules: Rule) -> Decision:
    references = {"instruct": card("instruct", INSTRUCT)}
    return decide(card("graft", candidate), references, rules or DEFAULT_RULES)


def rule(score: str, bound: float = 1.0, reference: str = "instruct") -> Rule:
    return Rule(score=score, reference=reference, bound=bound, words="stays good")


def test_a_candidate_that_keeps_what_the_rules_ask_is_promoted() -> None:
    decision = judge({FOLLOWED: 0.82, NEW: 0.6, HR: 2.5, FINANCE: 2.0})
    assert decision.verdict == "promote"
    assert all(reason.passed for reason in decision.reasons)
    assert len(decision.reasons) == 4


@pytest.mark.parametrize(
    ("fault", "value"), [(FOLLOWED, 0.80), (NEW, 0.09), (HR, 3.01), (FINANCE, 2.01)]
)
def test_one_rule_that_fails_refuses_and_says_which(fault: str, value: float) -> None:
    good = {FOLLOWED: 0.82, NEW: 0.6, HR: 2.5, FINANCE: 2.0}
    decision = judge(good | {fault: value})
    assert decision.verdict == "refuse"
    (reason,) = [reason for reason in decision.reasons if not reason.passed]
    assert fault in reason.text
    assert reason.finding == "lost"
    assert ": lost (" in reason.text


@given(shares, shares, st.floats(0.1, 2))
def test_a_share_must_reach_its_part_of_the_references(
    found: float, wanted: float, bound: float
) -> None:
    references = {"instruct": card("instruct", {FOLLOWED: wanted})}
    decision = decide(card("graft", {FOLLOWED: found}), references, [rule(FOLLOWED, bound)])
    assert (decision.verdict == "promote") == (found >= bound * wanted)


@given(st.floats(0, 20), st.floats(0, 20), st.floats(0.1, 2))
def test_a_loss_must_stay_below_its_multiple_of_the_references(
    found: float, wanted: float, bound: float
) -> None:
    references = {"base": card("base", {HR: wanted})}
    decision = decide(card("graft", {HR: found}), references, [rule(HR, bound, "base")])
    assert (decision.verdict == "promote") == (found <= bound * wanted)


def test_reasons_hold_both_numbers() -> None:
    decision = judge({FOLLOWED: 0.853, HR: 2.5}, rule(FOLLOWED, 0.9), rule(HR))
    assert [reason.text for reason in decision.reasons] == [
        "stays good: instructions/prompt_strict is 85.3%, at least 81.0% was asked: "
        "kept (+4.3 points, 95% interval +4.3 to +4.3, not paired)",
        "stays good: perplexity/hr/nats_per_token is 2.500 nats, at most 3.000 nats was asked: "
        "kept (-0.5 nats, 95% interval -0.5 to -0.5, not paired)",
    ]


@pytest.mark.parametrize("missing", [FOLLOWED, NEW, HR])
def test_a_score_that_the_candidate_lacks_refuses(missing: str) -> None:
    good = {FOLLOWED: 0.9, NEW: 0.6, HR: 2.5, FINANCE: 2.0}
    decision = judge({name: value for name, value in good.items() if name != missing})
    assert decision.verdict == "refuse"
    texts = [reason.text for reason in decision.reasons if not reason.passed]
    assert [text.split(": ")[1] for text in texts] == [f"{missing} was not measured for graft"]


def test_a_score_that_only_the_candidate_has_refuses() -> None:
    decision = judge({"perplexity/legal/nats_per_token": 1.0}, rule("perplexity/l*/nats_per_token"))
    assert decision.verdict == "refuse"
    assert "nats_per_token was not measured for instruct" in decision.reasons[0].text


def test_a_score_that_nobody_has_refuses() -> None:
    decision = judge(INSTRUCT, rule("response/*"))
    assert decision.verdict == "refuse"
    assert decision.reasons[0].text == "stays good: response/* was not measured for graft"


def test_a_reference_that_was_not_scored_refuses() -> None:
    decision = judge(INSTRUCT, rule(FOLLOWED, reference="base"))
    assert decision.verdict == "refuse"
    assert "no scores of base to compare with" in decision.reasons[0].text


def test_a_gate_without_rules_promotes_nothing() -> None:
    decision = decide(card("graft", INSTRUCT), {}, ())
    assert decision.verdict == "refuse"
    assert "no rule was given" in decision.reasons[0].text


def test_a_star_stands_for_every_department() -> None:
    decision = judge(INSTRUCT, rule("perplexity/*/nats_per_token"))
    assert [reason.text.split()[2] for reason in decision.reasons] == [HR, FINANCE]


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bound_that_everything_or_nothing_meets_is_no_rule(bound: float) -> None:
    with pytest.raises(ValidationError):
        rule(FOLLOWED, bound)


def compared(ours: list[float], theirs: list[float], bound: float = 1.0) -> Decision:
    """The gate over outcomes, example by example."""
    candidate, reference = card_of(ours, name=FOLLOWED), card_of(theirs, name=FOLLOWED)
    return decide(candidate, {"instruct": reference}, [rule(FOLLOWED, bound)])


def shares_of(right: int, of: int) -> list[float]:
    return [1.0] * right + [0.0] * (of - right)


def test_a_bound_that_the_whole_interval_keeps_is_kept() -> None:
    decision = compared(shares_of(380, 400), shares_of(372, 400), 0.9)
    (reason,) = decision.reasons
    assert (reason.finding, decision.verdict) == ("kept", "promote")


def test_a_bound_that_the_whole_interval_misses_is_lost() -> None:
    decision = compared(shares_of(200, 400), shares_of(372, 400), 0.9)
    (reason,) = decision.reasons
    assert (reason.finding, decision.verdict) == ("lost", "refuse")


def test_what_the_examples_cannot_tell_refuses_and_says_how_many_would() -> None:
    theirs = shares_of(40, 50)
    decision = compared(theirs[8:] + theirs[:8], theirs, 0.9)
    (reason,) = decision.reasons
    assert (reason.finding, decision.verdict) == ("cannot be told", "refuse")
    assert ": cannot be told from 50 examples (+8 points, 95% interval -" in reason.text
    assert reason.text.endswith(" would tell")


def test_a_figure_that_misses_its_bound_never_promotes() -> None:
    decision = compared(shares_of(36, 50), shares_of(41, 50), 0.9)
    assert decision.verdict == "refuse"
    assert decision.reasons[0].finding == "cannot be told"


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=MIN_EXAMPLES, max_size=60), st.floats(0.1, 1))
def test_a_model_may_always_replace_itself(values: list[float], bound: float) -> None:
    assert compared(values, values, bound).verdict == "promote"


@given(st.integers(2, MIN_EXAMPLES - 1))
def test_a_few_outcomes_that_are_all_alike_tell_nothing(num: int) -> None:
    (reason,) = compared([1.0] * num, [1.0] * num, 0.9).reasons
    assert reason.finding == "cannot be told"
    assert reason.text.endswith("ask 20 at least")


def test_a_loss_keeps_its_bound_from_below() -> None:
    ours, theirs = ([value + shift for value in range(40)] for shift in (0.0, 1.0))
    cards = [card_of(side, name=HR, unit="nats") for side in (ours, theirs)]
    kept, lost = (
        decide(one, {"instruct": other}, [rule(HR)]).reasons[0]
        for one, other in (cards, cards[::-1])
    )
    assert (kept.finding, lost.finding) == ("kept", "lost")


def test_models_that_were_asked_other_examples_are_refused_in_words() -> None:
    cards = [card_of([1.0] * 30, name=FOLLOWED, first=first) for first in (0, 7)]
    decision = decide(cards[0], {"instruct": cards[1]}, [rule(FOLLOWED)])
    assert decision.verdict == "refuse"
    assert "expected both models to be asked the same examples" in decision.reasons[0].text
