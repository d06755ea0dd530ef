"""Laws of batches: each text once, like lengths together, within the budget."""

from hypothesis import given
from hypothesis import strategies as st

from fedgraft.evaluation.batches import by_length

lengths = st.lists(st.integers(0, 50), max_size=40)


@given(lengths, st.integers(1, 200))
def test_every_text_is_in_one_batch_and_shorter_ones_come_first(
    lengths: list[int], budget: int
) -> None:
    order = [number for batch in by_length(lengths, budget) for number in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[number] for number in order] == sorted(lengths)


@given(lengths, st.integers(1, 200))
def test_a_batch_padded_to_its_longest_text_stays_within_the_budget(
    lengths: list[int], budget: int
) -> None:
    for batch in by_length(lengths, budget):
        assert len(batch) == 1 or len(batch) * max(lengths[number] for number in batch) <= budget
