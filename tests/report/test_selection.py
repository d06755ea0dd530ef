"""The page of a study of selection says what was measured, and marks what was not."""

import pytest

from fedgraft.noise import Spent
from fedgraft.report.page import render
from fedgraft.study.result import Holding, Holdings, Mapped, Marked, ScoredChoice, Selections
from fedgraft.study.rivals import WORDS, against, over_seeds

RIGHT, ROUGE, LEGACY, NATS = WORDS
RIVALS = dict.fromkeys(("start", "fedit", "aligned"), "random")


def result(*, spent: Spent | None = None, num_not_asked: int = 0) -> Selections:
    values = {
        "start": (0.30, 2.0),
        "fedit": (0.50, 1.0),
        "random": (0.40, 1.5),
        "aligned": (0.45, 1.2),
    }
    scored = tuple(
        ScoredChoice(
            arm=arm,
            seed=seed,
            scores={RIGHT: share + seed / 100, NATS: loss},
            num_examples={"start": 0, "fedit": 400}.get(arm, 8),
            num_distinct=8,
            coverage=0.75,
            seconds_choosing=1.0 if arm == "aligned" else 0.0,
            seconds_training={"fedit": 90.0}.get(arm, 5.0),
            spent=spent if arm == "aligned" else None,
        )
        for seed in (1, 2, 3)
        for arm, (share, loss) in values.items()
    )
    return Selections(
        name="tiny",
        question="Which?",
        verdict="Some.",
        seeds=(1, 2, 3),
        words={"fedit": "all examples", "random": "by chance", "aligned": "<b>FedHDS</b>"},
        against="random",
        rivals=RIVALS,
        num_examples=400,
        num_left_out=7,
        num_test=50,
        num_not_asked=num_not_asked,
        scored=scored,
        summary=over_seeds(scored),
        compared=against(scored, RIVALS),
        partition=Holdings(
            words="two clients",
            labels=("a", "b"),
            clients=(
                Holding(client="c1", department="o", counts=(3, 1), num_train=4, num_held_out=0),
            ),
            skew=0.5,
        ),
        residual={},
        losses={},
        costs=(),
        settings={
            "arms": {
                "fedit": {"method": "all"},
                "random": {"method": "random"},
                "aligned": {"method": "federated"},
            }
        },
        inputs={},
        versions={"fedgraft": "0"},
    )


@pytest.fixture(scope="module")
def page() -> str:
    return render(result())


def test_the_same_result_gives_the_same_page(page: str) -> None:
    assert render(result()) == page


def test_every_arm_has_its_scores_its_difference_and_its_cost(page: str) -> None:
    assert "+5.0 points" in page  # aligned less random
    assert "15.0x" in page  # 90 s over 1 + 5
    assert "2.0%" in page  # 8 of 400
    assert "-0.3000" in page  # loss of aligned less random


def test_what_was_not_scored_has_no_table(page: str) -> None:
    assert "Rouge-L" not in page


def test_what_was_left_out_is_told(page: str) -> None:
    assert "7 more are longer than a row" in page
    assert "were not asked" not in page
    assert "3 test dialogues leave no room" in render(result(num_not_asked=3))


def test_privacy_is_spoken_of_where_it_was_spent_alone(page: str) -> None:
    assert "epsilon" not in page
    spent = Spent(
        epsilon=3.2, delta=1e-5, num_rounds=2, noise_multiplier=1.0, max_norm=1.0, words="Of one."
    )
    private = render(result(spent=spent))
    assert "aligned: epsilon 3.2 at delta 1e-05. Of one." in private


def test_names_are_shown_as_text(page: str) -> None:
    assert "<b>FedHDS</b>" not in page
    assert "&lt;b&gt;FedHDS&lt;/b&gt;" in page


def test_a_map_shows_two_arms_by_cluster_where_they_have_some() -> None:
    arms = {
        "aligned": Marked(clusters=(0, 0, -1, 0), chosen=(0, 3)),
        "random": Marked(clusters=(), chosen=(1,)),
    }
    mapped = Mapped(
        words="t-SNE of all layers",
        plane=((0.0, 1.0), (1.0, 1.5), (2.0, 0.0), (3.0, 3.0)),
        clients=("c1", "c1", "c2", "c2"),
        arms=arms,
    )
    page = render(result().model_copy(update={"mapped": mapped}))
    for words in (
        "aligned, by cluster",
        "aligned, by client",
        "random, by client",
        "drawn by t-SNE of all layers",
        "aligned, seed 1: a ring is trained on in some round.",
    ):
        assert words in page
    assert "random, by cluster" not in page
    assert "What was chosen of what there is" not in render(result())
