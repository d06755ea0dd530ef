"""What training costs, by the paper's formula."""

import pytest

from fedgraft.study.cost import Tuning, training_flops, tuning_ratio


def test_the_papers_example_gives_its_ratio_of_2048() -> None:
    tuning = Tuning(num_tokens=25_000_000 * 8192, epochs=5)
    assert tuning_ratio(tuning, num_pretraining_tokens=100_000_000, epochs=5) == 2048


def test_the_ratio_is_that_of_the_flops() -> None:
    tuning = Tuning(num_tokens=7_000, epochs=3)
    spent = training_flops(1_000, 500, epochs=2), training_flops(1_000, 7_000, epochs=3)
    assert tuning_ratio(tuning, 500, epochs=2) == pytest.approx(spent[1] / spent[0])
    assert spent[0] == 6 * 1_000 * 500 * 2
