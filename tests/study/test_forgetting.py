"""A curve of forgetting, tiny and real: its points are comparable, and nothing is done twice."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.evaluation.cards import card as card_of
from tests.study.small import dialogues, page, write_lines, write_material, write_study

from fedgraft.errors import StudyError
from fedgraft.evaluation.scorecard import FOLLOWED
from fedgraft.models import save_model
from fedgraft.provenance import RECORD, Record
from fedgraft.study import arms
from fedgraft.study.comparison import compare, summarise
from fedgraft.study.forgetting import run, verdict
from fedgraft.study.machine import machine
from fedgraft.study.material import at_equal_distances
from fedgraft.study.plan import plan
from fedgraft.study.result import (
    CURVE_ARMS,
    FORGOTTEN,
    NEW_FACTS,
    OLD_FACTS,
    TEXT,
    CurvePoint,
    DomainResult,
    Forgetting,
    Summary,
    Way,
    WayCompared,
    load_result,
)
from fedgraft.study.study import Study
from fedgraft.text.dialogues import Dialogue, Message
from fedgraft.training import pretrain
from fedgraft.weights.checkpoint import Checkpoint
from fedgraft.weights.residual import Residual

BUDGETS = (256, 512, 1024)
PRETRAIN: dict[str, Any] = {
    "num_tokens": 1024,
    "budgets": [256, 512],
    "learning_rate": 1e-3,
    "batch_tokens": 128,
    "schedule": "constant",
    "warmup": 0,
}
DOMAINS: dict[str, Any] = {
    "num_tokens": 512,
    "texts": {"far away": {"corpus": ["place:far.jsonl"]}},
}
CURVE: dict[str, Any] = {
    "scale": None,
    "adapters": None,
    "tuning": None,
    "pretrain": PRETRAIN,
    "evaluation": {"window": 32, "max_new_tokens": 3, "max_dialogues": 8},
    "curve": {"domains": DOMAINS},
}


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A curve that was run, and what was said on the way."""

    out: Path
    result: Forgetting
    said: list[str] = field(default_factory=list)

    @property
    def stages_done(self) -> list[str]:
        titles = [line for line in self.said if not line.startswith(" ")]
        return [title for title in titles if not title.endswith(": done already")]

    def point(self, arm: str, num_tokens: int, seed: int = 1, replay: float = 0.0) -> Path:
        """Where the model of a point stands."""
        place = self.out / "curve" / f"rate-0.001-replay-{replay:g}" / f"seed-{seed}" / arm
        return place / ("model" if num_tokens == BUDGETS[-1] else f"model-{num_tokens}")


def load(material: Path, file: Path, **changes: Any) -> Study:
    return Study.load(write_study(file, **{**CURVE, **changes}), {"place": material})


def run_small(material: Path, out: Path, **changes: Any) -> Ran:
    said: list[str] = []
    study = load(material, out.with_suffix(".yaml"), **changes)
    return Ran(out=out, result=run(study, out, say=said.append), said=said)


def trained(folder: Path) -> Record:
    record = Record.read(folder)
    assert record
    return record


def summary(mean: float, spread: float = 0.02) -> Summary:
    return Summary(
        mean=mean,
        lowest=mean - spread,
        highest=mean + spread,
        stdev=spread,
        num_seeds=3,
        unit="share",
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_material(tmp_path_factory.mktemp("material"))
    write_lines(folder / "far.jsonl", [page("far away", number) for number in range(30)])
    return folder


@pytest.fixture(scope="module")
def ran(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Two seeds, with and without replay, run once from nothing."""
    return run_small(material, tmp_path_factory.mktemp("study") / "out")


def test_all_arms_see_the_same_tokens_at_every_point(ran: Ran) -> None:
    for budget in BUDGETS:
        for replay in (0.0, 0.25):
            s1 = trained(ran.point("s1", budget, replay=replay))
            base = trained(ran.point("pretrained_base", budget, replay=replay))
            assert s1.inputs["rows"] == base.inputs["rows"]
            assert s1.figures["num_tokens"] == base.figures["num_tokens"] > 0
            assert s1.inputs["model"] != base.inputs["model"]


def test_with_replay_other_rows_are_read_than_without(ran: Ran) -> None:
    rows = {trained(ran.point("s1", 1024, replay=share)).inputs["rows"] for share in (0.0, 0.25)}
    assert len(rows) == 2


def test_a_point_is_the_same_whether_its_run_went_on_or_not(
    ran: Ran, material: Path, tmp_path: Path
) -> None:
    """The run whose last budget is 512 ends where the longer one passed by."""
    short = {**PRETRAIN, "num_tokens": 512, "budgets": [256]}
    alone = run_small(material, tmp_path / "out", pretrain=short, seeds=[1], replay=None, curve={})
    ended = Checkpoint.open(alone.out / "curve/rate-0.001-replay-0/seed-1/s1/model")
    passed = Checkpoint.open(ran.point("s1", 512))
    assert ended.tensors.keys() == passed.tensors.keys()
    for name in ended.tensors:
        assert np.array_equal(ended.read(name), passed.read(name)), name
    scores = {
        (p.arm, p.num_tokens): p.scores
        for p in ran.result.points
        if p.seed == 1 and not p.way.replay
    }
    for point in alone.result.points:
        assert point.scores == scores[point.arm, point.num_tokens]


def test_every_arm_has_a_point_at_every_budget_for_each_way_and_seed(ran: Ran) -> None:
    found = [(p.arm, p.way.replay, p.num_tokens, p.seed) for p in ran.result.points]
    assert sorted(found) == sorted(
        (arm, replay, budget, seed)
        for arm in CURVE_ARMS
        for replay in (0.0, 0.25)
        for budget in BUDGETS
        for seed in (1, 2)
    )
    wanted = {FOLLOWED, OLD_FACTS, NEW_FACTS, TEXT}
    assert all(wanted <= point.scores.keys() for point in ran.result.points)


def test_a_curve_is_the_mean_and_spread_of_its_seeds(ran: Ran) -> None:
    for curve in ran.result.curves:
        values = [
            point.scores[TEXT]
            for point in ran.result.points
            if (point.arm, point.way, point.num_tokens) == (curve.arm, curve.way, curve.num_tokens)
        ]
        score = curve.scores[TEXT]
        assert len(values) == score.num_seeds == 2
        assert (score.lowest, score.highest) == (min(values), max(values))
        assert score.mean == pytest.approx(sum(values) / 2)


def test_the_arms_of_each_way_are_compared_after_the_most_tokens(ran: Ran) -> None:
    assert [found.way.replay for found in ran.result.comparisons] == [0.0, 0.25]
    for found in ran.result.comparisons:
        last = {p.arm: p for p in ran.result.curves if (p.way, p.num_tokens) == (found.way, 1024)}
        before = ran.result.references["instruct"]
        pairs = {(one.arm, one.against) for one in found.comparisons}
        assert pairs == {("graft", "instruct"), ("graft", "s1"), ("s1", "instruct")}
        told = [one for one in found.comparisons if one.difference]  # of old facts one is asked
        assert {FOLLOWED, NEW_FACTS, TEXT} <= {one.score for one in told}
        for one in told:
            assert one.difference
            assert one.difference.paired
            assert one.difference.num_seeds == 2
            other = (
                before[one.score]
                if one.against == "instruct"
                else last[one.against].scores[one.score].mean
            )
            value = last[one.arm].scores[one.score].mean - other
            assert one.difference.value == pytest.approx(value, abs=1e-5)


def test_the_graft_of_a_point_is_scored_and_then_taken_away(ran: Ran) -> None:
    folder = ran.out / "curve/rate-0.001-replay-0/seed-1/scores/graft-512"
    assert sorted(file.name for file in folder.iterdir()) == [RECORD, "scorecard.json"]
    residual = Residual.open(ran.out / "residual" / "residual")
    record = trained(folder)
    assert record.inputs["residual"] == residual.content_hash
    assert record.settings["scale"] == 1.0
    by_arm = {
        p.arm: p.scores[TEXT]
        for p in ran.result.points
        if (p.seed, p.num_tokens, p.way.replay) == (1, 512, 0.0)
    }
    assert by_arm["graft"] != by_arm["pretrained_base"]


def test_a_domain_is_as_far_as_the_base_finds_it_before_reading(ran: Ran) -> None:
    own, far = ran.result.domains
    assert (own.domain, far.domain) == ("own text", "far away")
    assert own.nats_per_token == ran.result.references["base"][TEXT]
    followed = ran.result.references["instruct"][FOLLOWED]
    for domain in (own, far):
        assert domain.num_tokens == 512
        assert domain.arms.keys() == {"s1", "graft"}
        for scores in domain.arms.values():
            assert scores[FORGOTTEN].mean == pytest.approx(followed - scores[FOLLOWED].mean)
            assert scores[TEXT].mean < domain.nats_per_token  # it was read


def test_the_own_text_among_the_domains_is_a_point_of_the_curve(ran: Ran) -> None:
    point = next(
        curve
        for curve in ran.result.curves
        if (curve.arm, curve.way.replay, curve.num_tokens) == ("s1", 0.0, 512)
    )
    assert ran.result.domains[0].arms["s1"][TEXT] == point.scores[TEXT]


def test_the_rate_is_the_same_at_each_step_whatever_the_budget(
    material: Path, tmp_path: Path
) -> None:
    warm = run_small(
        material, tmp_path / "out", pretrain={**PRETRAIN, "warmup": 0.25}, seeds=[1], replay=None
    )
    rates = {stage: dict(rates) for stage, rates in warm.result.learning_rates.items()}
    long = rates["s1, rate 0.001, no replay, seed 1"]
    short = rates["s1, far away, seed 1"]
    assert len(short) >= 3
    assert all(long[step] == rate for step, rate in short.items())
    assert long[1] < long[max(long)] == pytest.approx(1e-3)


def test_a_run_that_was_killed_keeps_the_checkpoints_that_it_had_left(
    ran: Ran, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the last weights are written: it goes on from its state, past both budgets."""
    changes: dict[str, Any] = {
        "pretrain": {**PRETRAIN, "checkpoint_every": 1},
        "seeds": [1],
        "replay": None,
        "curve": {},
    }

    def killed(model: Any, tokenizer: Any, folder: Path, **more: Any) -> None:
        if (tmp_path / "out/curve/rate-0.001-replay-0/seed-1/s1/model-512").exists():
            raise KeyboardInterrupt
        save_model(model, tokenizer, folder, **more)

    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "save_model", killed)
        with pytest.raises(KeyboardInterrupt):
            run_small(material, tmp_path / "out", **changes)
    place = tmp_path / "out/curve/rate-0.001-replay-0/seed-1/s1"
    assert not (place / RECORD).exists()
    left = (place / "model-256" / RECORD).stat().st_mtime_ns
    resumed = run_small(material, tmp_path / "out", **changes)
    assert (place / "model-256" / RECORD).stat().st_mtime_ns == left
    assert sorted(file.name for file in place.iterdir()) == [
        RECORD,
        "model",
        "model-256",
        "model-512",
    ]
    scores = {
        (p.arm, p.num_tokens): p.scores
        for p in ran.result.points
        if p.seed == 1 and not p.way.replay
    }
    assert {(p.arm, p.num_tokens): p.scores for p in resumed.result.points} == scores


def test_a_finished_study_is_not_run_again(ran: Ran, material: Path) -> None:
    again = run_small(material, ran.out)
    assert again.stages_done == []
    assert again.result == ran.result


def test_one_more_seed_runs_that_seed_alone(material: Path, tmp_path: Path) -> None:
    short = {**PRETRAIN, "num_tokens": 256, "budgets": [128]}
    few: dict[str, Any] = {"pretrain": short, "replay": None, "curve": {}}
    run_small(material, tmp_path / "out", seeds=[1], **few)
    more = run_small(material, tmp_path / "out", seeds=[1, 2], **few)
    assert more.stages_done
    assert all("seed 2" in title for title in more.stages_done)


def test_the_plan_counts_the_runs_that_are_made(ran: Ran, material: Path, tmp_path: Path) -> None:
    planned = plan(load(material, tmp_path / "study.yaml"), machine("h100"))
    of_curve = [stage for stage in ran.result.losses if ", rate " in stage]
    of_domains = [stage for stage in ran.result.losses if ", far away, " in stage]
    runs = {training.stage: training.num_runs for training in planned.trainings}
    assert runs == {"pre-training": len(of_curve), "domains": len(of_domains)}
    scored = [cost.stage for cost in ran.result.costs if "/scores" in cost.stage]
    assert planned.num_grafts == sum("graft" in stage for stage in scored)


def test_the_result_is_read_as_what_it_is(ran: Ran) -> None:
    assert load_result(ran.out) == ran.result
    found = json.loads((ran.out / "result.json").read_text(encoding="utf-8"))
    assert tuple(found) == tuple(Forgetting.model_fields)
    assert str(ran.out) not in json.dumps(found)


def test_a_study_of_one_kind_is_not_run_as_the_other(material: Path, tmp_path: Path) -> None:
    curve = load(material, tmp_path / "curve.yaml")
    with pytest.raises(StudyError, match=r"expected a study of arms, found one with `curve`"):
        arms.run(curve, tmp_path / "out")
    plain = Study.load(write_study(tmp_path / "arms.yaml"), {"place": material})
    with pytest.raises(StudyError, match=r"expected a study with `curve`, found one of arms"):
        run(plain, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": {"grid": [1.0]}}, r"grafts the plain residual and tunes nothing; take `scale`"),
        ({"tuning": {"num_tokens": 5}}, r"take `tuning` out"),
        ({"dialogues": None}, r"a curve of forgetting needs dialogues"),
        ({"pretrain": {**PRETRAIN, "budgets": []}}, r"expected budgets to draw a curve through"),
        (
            {"pretrain": {**PRETRAIN, "schedule": "cosine"}},
            r"pretrain\.schedule: expected constant, .* found cosine",
        ),
        (
            {"curve": {"learning_rates": [1e-2]}},
            r"learning_rates: expected that of pretrain, 0\.001, among them, found \[0\.01\]",
        ),
        (
            {"curve": {"learning_rates": [1e-3, 1e-3]}},
            r"learning_rates: expected each rate once, found \[0\.001, 0\.001\]",
        ),
        (
            {"curve": {"domains": {**DOMAINS, "num_tokens": 500}}},
            r"expected one of the budgets \[256, 512, 1024\], beyond .*, found 500",
        ),
        (
            {"pretrain": {**PRETRAIN, "warmup": 0.6}},
            r"beyond the warm-up of 614\.4 tokens, found 512",
        ),
        (
            {"curve": {"domains": {**DOMAINS, "own": "far away"}}},
            r"far away is what the study's own text is called; take another name",
        ),
    ],
)
def test_a_curve_that_cannot_be_is_refused(
    material: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(StudyError, match=message):
        load(material, tmp_path / "study.yaml", **changes)


def test_a_curve_whose_dialogues_demand_nothing_is_refused_before_anything_is_done(
    material: Path, tmp_path: Path
) -> None:
    asked = dialogues("test")
    write_lines(tmp_path / "test.jsonl", [one | {"constraints": []} for one in asked])
    parts = dict.fromkeys(("validation", "test"), str(tmp_path / "test.jsonl"))
    with pytest.raises(
        StudyError, match=r"dialogues\.test: expected some with constraints, .*none"
    ):
        run_small(material, tmp_path / "out", dialogues=parts)
    assert not (tmp_path / "out").exists()


def test_a_domain_with_too_little_text_is_refused_by_name(material: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "one.jsonl", [page("hr", 0)])
    domains = {**DOMAINS, "texts": {"tiny": {"corpus": [str(tmp_path / "one.jsonl")]}}}
    with pytest.raises(StudyError, match="domain tiny: expected enough documents to hold some"):
        run_small(material, tmp_path / "out", curve={"domains": domains})


def test_there_is_a_way_for_each_rate_without_replay_and_with(
    material: Path, tmp_path: Path
) -> None:
    curve = {"learning_rates": [5e-4, 1e-3]}
    found = load(material, tmp_path / "study.yaml", curve=curve).ways
    assert [way.words for way in found] == [
        "rate 0.0005, no replay",
        "rate 0.0005, replay 25%",
        "rate 0.001, no replay",
        "rate 0.001, replay 25%",
    ]
    assert len(load(material, tmp_path / "study.yaml", curve={}, replay=None).ways) == 1


@given(count=st.integers(1, 60), limit=st.none() | st.integers(1, 80))
def test_fewer_dialogues_are_taken_at_equal_distances(count: int, limit: int | None) -> None:
    asked = [
        Dialogue(id=str(n), messages=(Message(role="user", content="?"),)) for n in range(count)
    ]
    taken = [int(one.id) for one in at_equal_distances(asked, limit)]
    assert len(taken) == min(count, limit or count)
    assert taken == sorted(set(taken))
    steps = {b - a for a, b in pairwise(taken)}
    assert not steps or max(steps) - min(steps) <= 1


def told(material: Path, tmp_path: Path, s1: float, graft: float, *, replayed: float = 0.9) -> str:
    """The verdict on following after the last budget."""
    study = load(material, tmp_path / "study.yaml")
    curves = [
        CurvePoint(
            arm=arm,
            way=Way(learning_rate=1e-3, replay=replay),
            num_tokens=1024,
            scores={FOLLOWED: summary(value), NEW_FACTS: summary(0.5)},
        )
        for arm, plain in (("s1", s1), ("graft", graft))
        for replay, value in ((0.0, plain), (0.25, replayed))
    ]
    domains = [
        DomainResult(
            domain=name,
            nats_per_token=nats,
            num_tokens=512,
            arms={arm: {FORGOTTEN: summary(lost)} for arm in ("s1", "graft")},
        )
        for name, nats, lost in (("near", 1.0, 0.1), ("middle", 2.0, 0.3), ("far", 3.0, 0.2))
    ]
    return verdict(study, {"instruct": {FOLLOWED: 0.95}, "base": {}}, curves, domains)


def test_the_verdict_follows_from_the_figures(material: Path, tmp_path: Path) -> None:
    words = told(material, tmp_path, 0.45, 0.85, replayed=0.9)
    for part in (
        "The instruct model follows 95% of the prompts. After 1,024 tokens at rate 0.001 without",
        "(S1) loses 50 points, the graft loses 10 points.",
        "With 25% of replay S1 loses 5 points, the graft loses 5 points.",
        "S1 then knows 50% of the new facts, the graft 50%.",
        "Of 3 texts, near is nearest to what the base knows and far farthest: S1 loses 10 points "
        "on near and 20 points on far (rank correlation of distance and loss +0.50)",
    ):
        assert part in words


def test_the_verdict_says_how_sure_it_is_that_the_graft_is_ahead(
    material: Path, tmp_path: Path
) -> None:
    study = load(material, tmp_path / "study.yaml", replay=None)
    way = Way(learning_rate=1e-3, replay=0)
    cards = {
        arm: [card_of([1.0] * right + [0.0] * (40 - right), arm=arm, name=FOLLOWED)]
        for arm, right in (("instruct", 38), ("s1", 10), ("graft", 35))
    }
    curves = [
        CurvePoint(arm=arm, way=way, num_tokens=1024, scores=summarise(cards[arm])[arm])
        for arm in ("s1", "graft")
    ]
    references = {"instruct": {FOLLOWED: 0.95}}
    compared = WayCompared(way=way, comparisons=compare(cards))
    words = verdict(study, references, curves, (), (compared,))
    assert "Prompt by prompt against S1, the graft is better by 62.5 points (" in words
    assert "a 95% interval over 40 prompts of one seed." in words


def test_the_verdict_does_not_call_a_gain_a_loss(material: Path, tmp_path: Path) -> None:
    words = told(material, tmp_path, 0.45, 0.98, replayed=0.96)
    assert "(S1) loses 50 points, the graft gains 3 points." in words
    assert "With 25% of replay S1 gains 1 point, the graft gains 1 point." in words
