"""Outcomes pair what models were asked, whatever the order, in few bytes."""

from hypothesis import given
from hypothesis import strategies as st

from fedgraft.evaluation.outcomes import Outcomes

items = st.lists(
    st.tuples(st.uuids().map(str), st.floats(0, 1e4), st.integers(0, 900)),
    min_size=1,
    unique_by=lambda item: item[0],
).filter(lambda found: any(size for _, _, size in found))


@given(items, st.randoms())
def test_the_order_of_examples_does_not_matter(
    found: list[tuple[str, float, int]], random: object
) -> None:
    other = list(found)
    random.shuffle(other)  # type: ignore[attr-defined]
    assert Outcomes.of(found) == Outcomes.of(other)


@given(items)
def test_what_is_read_is_what_was_written(found: list[tuple[str, float, int]]) -> None:
    outcomes = Outcomes.of(found)
    assert Outcomes.model_validate_json(outcomes.model_dump_json()) == outcomes


@given(items)
def test_the_value_is_the_ratio_of_sums_to_a_millionth(
    found: list[tuple[str, float, int]],
) -> None:
    kept = [(amount, size) for _, amount, size in found if size]
    value = sum(amount for amount, _ in kept) / sum(size for _, size in kept)
    assert abs(Outcomes.of(found).value - value) <= 2e-5 * value


def test_outcomes_are_one_line_of_text() -> None:
    outcomes = Outcomes.of([("a", 1, 1), ("b", 0, 1), ("c", 1, 1)])
    assert outcomes.model_dump(mode="json")["amounts"] == "1 0 1"
    assert outcomes.sizes is None
    assert Outcomes.of([("a", 2.5, 3), ("b", 0, 1)]).model_dump(mode="json")["sizes"] == "3 1"


def test_other_examples_are_other_examples() -> None:
    ours = Outcomes.of([("a", 1, 1), ("b", 0, 1)])
    assert ours.examples != Outcomes.of([("a", 1, 1), ("c", 0, 1)]).examples
    assert ours.examples == Outcomes.of([("b", 1, 1), ("a", 1, 1)]).examples


def test_an_example_that_says_nothing_is_left_out() -> None:
    assert Outcomes.of([("a", 1, 1), ("b", 0, 0)]) == Outcomes.of([("a", 1, 1)])
    assert Outcomes.of([("a", 1, 1), ("b", 0, 0)]).num_examples == 1
