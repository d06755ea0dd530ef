"""Laws of the gate: every rule must pass, and what was not measured does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedgraft.evaluation.gate import DEFAULT_RULES, Decision, Rule, decide
from fedgraft.evaluation.scorecard import FOLLOWED, Score, Scorecard

HR, FINANCE = "perplexity/hr/nats_per_token", "perplexity/finance/nats_per_token"
NEW = "knowledge/asked/new"
INSTRUCT = {FOLLOWED: 0.9, NEW: 0.1, HR: 3.0, FINANCE: 2.0}
shares = st.floats(0, 1)


def card(arm: str, scores: dict[str, float]) -> Scorecard:
    units = {name: "nats" if name.startswith("perplexity") else "share" for name in scores}
    return Scorecard(
        arm=arm,
        seed=None,
        scores={
            name: Score(value=value, num=100, stderr=0.01, unit=units[name])  # type: ignore[arg-type]
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
    assert reason.text.endswith("not reached")


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
        "stays good: instructions/prompt_strict is 85.3%, at least 81.0% was asked",
        "stays good: perplexity/hr/nats_per_token is 2.500 nats, at most 3.000 nats was asked",
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
