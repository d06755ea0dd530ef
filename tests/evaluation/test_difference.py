"""Laws of differences: a model equals itself, pairing helps, order is nothing, intervals hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.evaluation.cards import NAME, card

from fedgraft.errors import EvaluationError
from fedgraft.evaluation import difference as module
from fedgraft.evaluation.difference import Difference, difference
from fedgraft.evaluation.outcomes import Outcomes

outcomes = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=60)


def noise(seed: int, *shape: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal(shape)


def apart(ours: NDArray[np.float64], theirs: NDArray[np.float64], *, paired: bool = True) -> float:
    """How wide the interval is."""
    found = difference(NAME, [card(list(ours), paired=paired)], [card(list(theirs), paired=paired)])
    return found.high - found.low


@given(outcomes)
@settings(max_examples=30)
def test_a_model_differs_from_itself_by_nothing_for_sure(values: list[float]) -> None:
    found = difference(NAME, [card(values)], [card(values)])
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert found.finding == "the same"
    of_seeds = difference(
        NAME, [card(values), card(values[::-1])], [card(values), card(values[::-1])]
    )
    assert (of_seeds.low, of_seeds.high) == (0, 0)


@given(st.permutations(range(12)))
@settings(max_examples=30)
def test_the_order_of_examples_does_not_matter(order: list[int]) -> None:
    ours, theirs = noise(1, 12), noise(2, 12)

    def found(places: list[int]) -> Difference:
        items = [[(str(p), side[p], 1) for p in places] for side in (ours, theirs)]
        cards = [
            card(list(side)).model_copy(update={"outcomes": {NAME: Outcomes.of(one)}})
            for side, one in zip((ours, theirs), items, strict=True)
        ]
        return difference(NAME, cards[:1], cards[1:])

    assert found(order) == found(list(range(12)))


def test_the_order_of_seeds_does_not_matter() -> None:
    cards = [card(list(noise(seed, 30) + seed / 9)) for seed in range(4)]
    other = card(list(noise(9, 30)))
    one, two = difference(NAME, cards, [other]), difference(NAME, cards[::-1], [other])
    assert one.value == pytest.approx(two.value)
    assert (one.low, one.high) == pytest.approx((two.low, two.high))


def test_pairing_narrows_the_interval_of_models_that_err_on_the_same_examples() -> None:
    hard = noise(1, 200)
    ours, theirs = hard + 0.1 * noise(2, 200), hard + 0.1 * noise(3, 200)
    assert apart(ours, theirs) < 0.2 * apart(ours, theirs, paired=False)


def test_more_examples_narrow_the_interval_as_their_root() -> None:
    few, many = (apart(noise(1, n), noise(2, n)) for n in (100, 1600))
    assert few / many == pytest.approx(4, rel=0.2)


def test_an_example_counts_as_much_as_its_size() -> None:
    ours = card([30.0, 2.0], sizes=[10, 1])
    found = difference(NAME, [ours], [card([10.0, 1.0], sizes=[10, 1])])
    assert found.value == pytest.approx(32 / 11 - 1)


def test_drawing_kinds_of_outcomes_gives_the_intervals_of_drawing_examples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of sums and sizes that differ too, and of three seeds."""
    draw = np.random.default_rng(5)
    sizes = draw.integers(1, 4, 400)
    sides = [draw.binomial(sizes, share).astype(float) for share in (0.6, 0.7) * 3]
    cards = [card(list(side), sizes=sizes.tolist()) for side in sides]
    plain = difference(NAME, cards[::2], cards[1::2])
    monkeypatch.setattr(module, "MANY", 10)
    kinds = difference(NAME, cards[::2], cards[1::2])
    assert kinds.value == plain.value
    width = plain.high - plain.low
    assert kinds.low == pytest.approx(plain.low, abs=0.05 * width)
    assert kinds.high == pytest.approx(plain.high, abs=0.05 * width)


def test_with_one_seed_the_interval_speaks_of_examples_alone_and_seeds_widen_it() -> None:
    alike = [card(list(noise(1, 100) + shift)) for shift in (0.0, 0.0, 0.0)]
    apart = [card(list(noise(1, 100) + shift)) for shift in (-0.3, 0.0, 0.3)]
    other = [card(list(noise(2, 100)))]
    widths = [
        found.high - found.low
        for found in (difference(NAME, cards, other) for cards in (alike[:1], alike, apart))
    ]
    assert widths[0] == pytest.approx(widths[1], rel=0.05)
    assert widths[2] > 2 * widths[1]


@pytest.mark.parametrize(
    ("num_seeds", "num_examples", "of_seeds", "of_examples", "of_both"),
    [
        (1, 100, 0, 1, 0),
        (1, 8, 0, 1, 0),
        (3, 60, 1, 0.1, 0.1),
        (3, 60, 0.1, 1, 0.3),
        (5, 60, 0.1, 1, 1),
    ],
)
def test_intervals_hold_the_truth_about_as_often_as_they_promise(
    num_seeds: int,
    num_examples: int,
    of_seeds: float,
    of_examples: float,
    of_both: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Never much below 95%: never taken for more than it is. 250 worlds; 2 standard errors are
    2.8 points. Drawing seeds again with replacement gives 75% in the third world."""
    monkeypatch.setattr(module, "DRAWS", 600)
    rng, truth, held = np.random.default_rng(3), 0.3, 0
    for _ in range(250):
        theirs = rng.standard_normal(num_examples)
        common = truth + of_examples * rng.standard_normal(num_examples)
        ours = [
            theirs
            + common
            + of_seeds * rng.standard_normal()
            + of_both * rng.standard_normal(num_examples)
            for _ in range(num_seeds)
        ]
        found = difference(NAME, [card(list(one)) for one in ours], [card(list(theirs))])
        held += found.low <= truth <= found.high
    assert 0.92 <= held / 250 <= 0.99


def test_the_margin_to_a_bound_is_told_against_that_multiple() -> None:
    ours, theirs = card([1.0, 0.0, 1.0, 1.0]), card([1.0, 1.0, 1.0, 1.0])
    assert difference(NAME, [ours], [theirs], times=0.5).value == pytest.approx(0.25)


def test_the_number_of_examples_that_would_tell_is_told() -> None:
    found = Difference(value=0.02, low=-0.02, high=0.06, num_examples=100, num_seeds=1, paired=True)
    assert found.num_needed == 400
    assert found.model_copy(update={"num_seeds": 3}).num_needed is None
    assert found.model_copy(update={"value": 0.001}).num_needed is None


def test_without_outcomes_the_standard_errors_speak() -> None:
    ours, theirs = card([1.0] * 80 + [0.0] * 20, paired=False), card([1.0] * 50 + [0.0] * 50)
    found = difference(NAME, [ours], [theirs])
    assert not found.paired
    half = 1.96 * (0.04**2 + 0.05**2) ** 0.5
    assert (found.low, found.high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.01)


def test_models_that_were_asked_other_examples_are_not_compared() -> None:
    with pytest.raises(EvaluationError, match="asked the same examples, found others for graft"):
        difference(NAME, [card([1.0, 0.0])], [card([1.0, 0.0], first=5, arm="s1")])


def test_seeds_that_do_not_pair_are_not_compared() -> None:
    cards = [card([1.0, 0.0])] * 3
    with pytest.raises(
        EvaluationError, match="the same seeds of both, or one for all of them, found 3 and 2"
    ):
        difference(NAME, cards, cards[:2])


def test_one_card_for_all_seeds_may_stand_on_either_side() -> None:
    seeds = [card([1.0, 0.0, 1.0, share]) for share in (0.1, 0.5, 0.8)]
    alone = card([0.0, 0.0, 1.0, 0.0])
    ahead, behind = difference(NAME, seeds, [alone]), difference(NAME, [alone], seeds)
    assert behind.value == pytest.approx(-ahead.value)
    assert behind.num_seeds == ahead.num_seeds == 3
    assert (behind.low, behind.high) == pytest.approx((-ahead.high, -ahead.low), abs=0.05)


def test_no_interval_of_shares_goes_beyond_what_shares_allow() -> None:
    seeds = [card([share, 1.0, 0.0, share]) for share in (0.0, 1.0)]
    found = difference(NAME, seeds, [card([0.5, 1.0, 0.0, 0.0])])
    assert (found.low, found.high) == (-1.0, 1.0)
    losses = [card([nats, 1.0, 0.0, nats], unit="nats") for nats in (0.0, 1.0)]
    assert difference(NAME, losses, [card([0.5, 1.0, 0.0, 0.0], unit="nats")]).high > 1


def test_one_example_tells_nothing() -> None:
    with pytest.raises(EvaluationError, match="at least 2 examples to draw from, found 1"):
        difference(NAME, [card([1.0])], [card([0.0])])


def test_tenfold_sizes_with_tenfold_amounts_change_nothing() -> None:
    ours, theirs = noise(1, 30), noise(2, 30)
    once = difference(NAME, [card(list(ours))], [card(list(theirs))])
    tenfold = difference(
        NAME,
        [card(list(10 * ours), sizes=[10] * 30)],
        [card(list(10 * theirs), sizes=[10] * 30)],
    )
    assert (tenfold.low, tenfold.high) == pytest.approx((once.low, once.high), abs=1e-4)
