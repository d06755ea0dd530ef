"""Laws of marks: form and content are judged apart, and what nobody can tell is not judged."""

import pytest
from tests.evaluation.lessons import dialogue

from fedgraft.errors import EvaluationError
from fedgraft.evaluation.following import constraints_of, mark
from fedgraft.evaluation.instructions import Constraint
from fedgraft.text.dialogues import Demand

CAPITALS = Demand(kind="upper_case")
SHORT = Demand(kind="max_words", argument="3")


def test_a_prompt_is_followed_when_each_of_its_constraints_is() -> None:
    asked = dialogue("Where?", demands=(CAPITALS, SHORT), accepted=("Riga",))
    shouted, mumbled = mark([asked, asked], ["IN RIGA", "in Riga"])
    assert shouted.strict == (True, True)
    assert shouted.as_instructed
    assert mumbled.strict == (False, True)
    assert not mumbled.as_instructed


def test_right_and_as_instructed_takes_both() -> None:
    asked = dialogue("Where?", demands=(CAPITALS,), accepted=("Riga",))
    answers = ["IN RIGA", "in Riga", "IN OSLO", "in Oslo"]
    marks = mark([asked] * 4, answers)
    assert [m.right for m in marks] == [True, True, False, False]
    assert [m.right_and_as_instructed for m in marks] == [True, False, False, False]


def test_the_loose_check_forgives_a_first_line() -> None:
    asked = dialogue("Where?", demands=(CAPITALS,))
    (marks,) = mark([asked], ["Sure, here it is:\nIN RIGA"])
    assert marks.strict == (False,)
    assert marks.loose == (True,)


def test_without_accepted_phrases_nobody_can_tell_what_is_right() -> None:
    (marks,) = mark([dialogue("Write a poem.", demands=(CAPITALS,))], ["ROSES"])
    assert marks.right is None
    assert marks.right_and_as_instructed is None


def test_demands_become_constraints() -> None:
    expected = (Constraint(kind="upper_case"), Constraint(kind="max_words", argument="3"))
    assert constraints_of(dialogue("Where?", demands=(CAPITALS, SHORT))) == expected


@pytest.mark.parametrize(
    "demand", [Demand(kind="haiku"), Demand(kind="max_words", argument="some")]
)
def test_a_demand_that_no_program_can_check_is_refused_with_its_dialogue(demand: Demand) -> None:
    asked = dialogue("Where?", demands=(CAPITALS, demand))
    with pytest.raises(EvaluationError, match=f"dialogue 'Where\\?': .*found '{demand.kind}'"):
        mark([asked], ["RIGA"])
