"""Arms of a study of selection against their rivals."""

from statistics import fmean, stdev

import numpy as np
import pytest

from fedgraft.study.result import Compared, ScoredChoice
from fedgraft.study.rivals import against, over_seeds, told_by_chance, verdict


def test_differences_are_of_one_seed_each() -> None:
    values = {("a", 1): 0.50, ("a", 2): 0.60, ("a", 3): 0.55, ("b", 1): 0.40, ("b", 2): 0.52}
    values |= {("b", 3): 0.46}
    scored = [
        ScoredChoice(arm=arm, seed=seed, scores={"response/rouge_l": value})
        for (arm, seed), value in values.items()
    ]
    (found,) = against(scored, {"a": "b"})
    differences = [0.10, 0.08, 0.09]
    assert found.difference == pytest.approx(fmean(differences))
    assert found.stderr == pytest.approx(stdev(differences) / 3**0.5)
    assert found.told_apart
    (two,) = against([one for one in scored if one.seed < 3], {"a": "b"})
    assert not two.told_apart  # two seeds have no spread to speak of
    words = verdict(over_seeds(scored), [found], "b", {"a": "b"})
    assert "Ahead of b by more than two standard errors: a." in words
    words = verdict(over_seeds(scored), [two], "b", {"a": "b"})
    assert "Ahead of" not in words
    assert "With fewer than 3 seeds no arms are told apart." in words


@pytest.mark.parametrize("num_seeds", [2, 3, 5, 30])
def test_as_many_are_told_apart_by_chance_as_is_said(num_seeds: int) -> None:
    """Arms that do not differ, many times over."""
    draws = np.random.default_rng(num_seeds).standard_normal((5000, num_seeds))
    errors = draws.std(axis=1, ddof=1) / num_seeds**0.5
    compared = [
        Compared(arm="a", score="x", difference=mean, stderr=error, num_seeds=num_seeds)
        for mean, error in zip(draws.mean(axis=1).tolist(), errors.tolist(), strict=True)
    ]
    told = sum(one.told_apart for one in compared)
    assert told_by_chance(compared) == pytest.approx(told, rel=0.1, abs=0)
    assert bool(told) is (num_seeds >= 3)


def test_lower_is_better_for_a_loss() -> None:
    scored = [
        ScoredChoice(arm=arm, seed=seed, scores={"response/nats_per_token": loss})
        for arm, loss in (("a", 1.0), ("b", 2.0))
        for seed in (1, 2, 3)
    ]
    words = verdict(over_seeds(scored), against(scored, {"a": "b"}), "b", {"a": "b"})
    assert "1.000 nats with a, the best of 2 arms" in words
    assert "two standard errors: a." in words
    turned = {"b": "a"}
    words = verdict(over_seeds(scored), against(scored, turned), "a", turned)
    assert "No arm is ahead of its rival by more than two standard errors." in words


def test_each_arm_is_told_against_its_own_rival() -> None:
    rivals = {"start": "random", "little": "random", "choice": "random", "little-choice": "little"}
    losses = {"start": 3.0, "little": 2.5, "random": 1.0, "choice": 1.5, "little-choice": 2.0}
    scored = [
        ScoredChoice(arm=arm, seed=seed, scores={"response/nats_per_token": loss})
        for arm, loss in losses.items()
        for seed in (1, 2, 3)
    ]
    compared = against(scored, rivals)
    found = {one.arm: one.difference for one in compared}
    assert found == {"start": 2.0, "little": 1.5, "choice": 0.5, "little-choice": -0.5}
    words = verdict(over_seeds(scored), compared, "random", rivals)
    assert "Ahead of random" not in words
    assert words.startswith("Loss on the given answers, nats per token: 1.000 nats with random, ")
    assert "the best of 5 arms; 3.000 nats before any training." in words
    assert "Ahead of little by more than two standard errors: little-choice." in words
    assert "Of 3 comparisons of an arm with its rival 3 lie beyond two standard errors" in words
    assert words.count("\n") == 1  # a line for the score, and one of all
