"""A whole study, tiny and real: the arms are comparable, and nothing is done twice."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.study.small import DEPARTMENTS, page, write_lines, write_material, write_study

from fedgraft.errors import StudyError
from fedgraft.evaluation.scorecard import FOLLOWED, Scorecard, evaluate
from fedgraft.provenance import RECORD, Record
from fedgraft.report.page import render
from fedgraft.study import arms
from fedgraft.study.arms import run
from fedgraft.study.material import Material
from fedgraft.study.result import ARMS, Result
from fedgraft.study.run import Run
from fedgraft.study.stage import code_hash
from fedgraft.study.study import Study
from fedgraft.weights.checkpoint import Checkpoint
from fedgraft.weights.residual import Residual


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A study that was run, and what was said on the way."""

    material: Path
    out: Path
    result: Result
    said: list[str] = field(default_factory=list)

    def again(self, **changes: Any) -> "Ran":
        return run_small(self.material, self.out, **changes)

    @property
    def stages_done(self) -> list[str]:
        """Titles of the stages that were not skipped."""
        titles = [line for line in self.said if not line.startswith(" ")]
        return [title for title in titles if not title.endswith(": done already")]


def run_small(material: Path, out: Path, *, num_processes: int = 1, **changes: Any) -> Ran:
    study = Study.load(write_study(out.with_suffix(".yaml"), **changes), {"place": material})
    said: list[str] = []
    result = run(study, out, say=said.append, num_processes=num_processes)
    return Ran(material=material, out=out, result=result, said=said)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def ran(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Two seeds, run once from nothing."""
    return run_small(material, tmp_path_factory.mktemp("study") / "out")


def cards(result: Result) -> dict[str, tuple[Scorecard, ...]]:
    return {arm.arm: arm.scorecards for arm in result.arms}


def without_times(result: Result) -> dict[str, Any]:
    """A result without what a clock measured."""
    found = result.model_dump()
    for cost in found["costs"]:
        del cost["seconds"]
    for estimate in found["estimates"]:
        del estimate["seconds"], estimate["rate"]
    return found


def trained(ran: Ran, arm: str, seed: int) -> Record:
    record = Record.read(ran.out / f"seed-{seed}" / arm / "model")
    assert record
    return record


def test_s1_and_the_base_read_the_same_rows_in_the_same_order(ran: Ran) -> None:
    for seed in (1, 2):
        s1, base = trained(ran, "s1", seed), trained(ran, "pretrained_base", seed)
        assert s1.inputs["rows"] == base.inputs["rows"]
        assert s1.settings == base.settings
        assert s1.figures["num_tokens"] == base.figures["num_tokens"] > 0
        assert s1.inputs["model"] != base.inputs["model"]


def test_another_seed_reads_in_another_order(ran: Ran) -> None:
    one, two = trained(ran, "s1", 1), trained(ran, "s1", 2)
    assert one.inputs["rows"] != two.inputs["rows"]
    assert one.settings["seed"] != two.settings["seed"]


def test_all_arms_are_scored_on_the_same_held_out_set(ran: Ran) -> None:
    counted = [
        {name: score.num for name, score in card.scores.items()}
        for found in cards(ran.result).values()
        for card in found
    ]
    assert counted[0]
    assert all(counts == counted[0] for counts in counted)


def test_an_arm_that_no_seed_changes_is_scored_once(ran: Ran) -> None:
    seeds = {arm: [card.seed for card in found] for arm, found in cards(ran.result).items()}
    assert tuple(seeds) == ARMS
    assert seeds["base"] == seeds["instruct"] == [None]
    assert seeds["s1"] == seeds["pretrained_base"] == seeds["graft"] == [1, 2]


def test_the_graft_is_the_pretrained_base_plus_the_scaled_residual(ran: Ran) -> None:
    residual = Residual.open(ran.out / "residual" / "residual")
    for curve in ran.result.scales:
        folder = ran.out / f"seed-{curve.seed}"
        before = Checkpoint.open(folder / "pretrained_base" / "model")
        grafted = Checkpoint.open(folder / "graft" / "model")
        for name in grafted.tensors:
            expected = before.read(name) + np.float32(curve.chosen) * residual.read(name)
            assert np.array_equal(grafted.read(name), expected), name


def test_the_scale_is_the_best_of_its_curve(ran: Ran) -> None:
    for curve in ran.result.scales:
        scores = {point.scale: point.scores[curve.metric] for point in curve.points}
        assert list(scores) == [0.5, 1.0]
        assert scores[curve.chosen] == max(scores.values())


def test_the_search_for_a_scale_leaves_no_model_behind(ran: Ran) -> None:
    files = sorted(file.name for file in (ran.out / "seed-1" / "scale").rglob("*"))
    assert files == ["curve.json", RECORD]


def test_each_department_has_an_adapter_over_each_graft(ran: Ran) -> None:
    made = [(adapter.department, adapter.seed) for adapter in ran.result.adapters]
    assert sorted(made) == [(name, seed) for name in sorted(DEPARTMENTS) for seed in (1, 2)]
    for adapter in ran.result.adapters:
        graft = cards(ran.result)["graft"][adapter.seed - 1]
        name = f"perplexity/{adapter.department}/nats_per_token"
        assert adapter.nats_per_token_before == graft.scores[name].value
        assert adapter.nats_per_token_after < adapter.nats_per_token_before


def test_training_costs_six_flops_a_parameter_and_token(ran: Ran) -> None:
    costs = [cost for cost in ran.result.costs if cost.stage.startswith(("s1", "pretrained"))]
    for cost in costs:
        assert cost.flops == 6 * ran.result.residual["num_parameters"] * cost.num_tokens
    assert ran.result.tokens == max(cost.num_tokens for cost in costs)
    assert ran.result.tuning["ratio"] == 4096 / ran.result.tokens


def test_what_training_takes_is_estimated_before_and_measured_after(ran: Ran) -> None:
    estimates = {one.work: one for one in ran.result.estimates}
    assert estimates.keys() == {"training", "adapters"}
    reads = [c for c in ran.result.costs if c.stage.startswith(("s1", "pretrained_base"))]
    assert estimates["training"].num_runs == len(reads) == 4
    assert estimates["training"].paper_flops == pytest.approx(
        sum(cost.flops for cost in reads), rel=0.1
    )
    for one in estimates.values():
        assert one.seconds == pytest.approx(one.operations / (0.45 * one.rate))


def test_the_result_names_no_place_on_this_machine(ran: Ran) -> None:
    text = (ran.out / "result.json").read_text(encoding="utf-8")
    assert ran.result.settings["family"]["base"] == "place:base"
    assert str(ran.material) not in text
    assert str(ran.out) not in text


def test_a_finished_study_is_not_run_again(ran: Ran) -> None:
    again = ran.again()
    assert again.stages_done == []
    assert again.result == ran.result


def test_one_more_seed_runs_that_seed_alone(ran: Ran, tmp_path: Path) -> None:
    first = run_small(ran.material, tmp_path / "out", seeds=[1], adapters=None)
    more = first.again(seeds=[1, 2], adapters=None)
    assert more.stages_done
    assert all("seed 2" in title for title in more.stages_done)
    assert cards(more.result) == cards(ran.result)


def test_other_ways_to_score_train_nothing_again(ran: Ran, tmp_path: Path) -> None:
    few: dict[str, Any] = {"seeds": [1], "adapters": None}
    first = run_small(ran.material, tmp_path / "out", **few)
    again = first.again(**few, evaluation={"window": 16, "max_new_tokens": 2})
    assert [title for title in again.stages_done if "pre-train" in title] == []
    assert len([title for title in again.stages_done if title.startswith("score")]) == len(ARMS)


def test_another_share_of_replay_trains_again(ran: Ran, tmp_path: Path) -> None:
    few: dict[str, Any] = {"seeds": [1], "adapters": None, "scale": None}
    first = run_small(ran.material, tmp_path / "out", **few)
    again = first.again(**few, replay={"corpus": ["place:replay.jsonl"], "share": 0.5})
    trained_again = [title for title in again.stages_done if "pre-train" in title]
    assert trained_again == ["seed 1: pre-train s1", "seed 1: pre-train pretrained_base"]


def test_a_study_without_dialogues_grafts_the_plain_sum_and_claims_nothing(
    ran: Ran, tmp_path: Path
) -> None:
    plain = run_small(
        ran.material,
        tmp_path / "out",
        dialogues=None,
        questions=None,
        scale=None,
        adapters=None,
        replay=None,
        seeds=[1],
    ).result
    assert plain.scales[0].chosen == 1.0
    assert plain.claims == ()
    assert plain.adapters == ()
    assert set(plain.summary["graft"]) == {
        f"perplexity/{name}/{unit}"
        for name in DEPARTMENTS
        for unit in ("nats_per_token", "bits_per_byte")
    }


def test_held_out_text_is_not_read_as_replay(ran: Ran, tmp_path: Path) -> None:
    pages = [page("hr", number) for number in range(30)] + [page("archive", 0)]
    write_lines(tmp_path / "leak.jsonl", pages)
    file = write_study(
        tmp_path / "study.yaml", replay={"corpus": [str(tmp_path / "leak.jsonl")], "share": 0.2}
    )
    found = Material.load(Study.load(file, {"place": ran.material}))
    held_out = {d.text for s in found.splits.values() for d in (*s.validation, *s.test)}
    replayed = {document.text for document in found.replay}
    assert held_out
    assert replayed & held_out == set()
    assert page("archive", 0)["text"] in replayed


def test_a_study_may_score_some_groups_alone(ran: Ran, tmp_path: Path) -> None:
    dialogues = {part: f"place:dialogues/{part}.jsonl" for part in ("validation", "test")}
    file = write_study(tmp_path / "study.yaml", dialogues={**dialogues, "groups": ["old"]})
    found = Material.load(Study.load(file, {"place": ran.material}))
    asked = (*found.validation_dialogues, *found.test_dialogues)
    assert {dialogue.group for dialogue in asked} == {"old"}


def test_a_group_that_nobody_asks_for_is_refused(ran: Ran, tmp_path: Path) -> None:
    dialogues = {part: f"place:dialogues/{part}.jsonl" for part in ("validation", "test")}
    file = write_study(tmp_path / "study.yaml", dialogues={**dialogues, "groups": ["older"]})
    with pytest.raises(StudyError, match=r"of the groups older, found only new, old"):
        Material.load(Study.load(file, {"place": ran.material}))


def test_a_department_with_too_little_text_is_refused_by_name(ran: Ran, tmp_path: Path) -> None:
    write_lines(tmp_path / "one.jsonl", [page("hr", 0)])
    departments = {"hr": {"corpus": [str(tmp_path / "one.jsonl")]}}
    with pytest.raises(StudyError, match="department hr: expected enough documents to hold some"):
        run_small(ran.material, tmp_path / "out", departments=departments)
    assert not (tmp_path / "out").exists()


def test_an_unknown_metric_is_refused_with_those_there_are_after_one_point(
    ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = {"grid": [0.5, 1.0], "metric": "instructions/best"}
    scored: list[str] = []

    def counted(*given: Any, arm: str, **more: Any) -> Scorecard:
        scored.append(arm)
        return evaluate(*given, arm=arm, **more)

    monkeypatch.setattr(arms, "evaluate", counted)
    with pytest.raises(
        StudyError, match=r"scale\.metric: .*prompt_strict.*found instructions/best"
    ):
        run_small(ran.material, tmp_path / "out", scale=scale, seeds=[1])
    assert scored == ["graft at scale 0.5"]


def test_a_template_that_was_edited_in_place_makes_other_models_of_both_sides(
    ran: Ran, tmp_path: Path
) -> None:
    """Both read, and are asked, by the instruct model's."""
    material = shutil.copytree(ran.material, tmp_path / "material")
    study = Study.load(write_study(tmp_path / "study.yaml"), {"place": material})

    def now() -> set[str]:
        return set(Run(study, tmp_path / "out", lambda _: None).hashes.values())

    before = now()
    with (material / "instruct" / "chat_template.jinja").open("a") as file:
        file.write(" ")
    assert len(before) == 2
    assert not now() & before


def test_a_gate_may_name_any_arm_of_the_seed(ran: Ran, tmp_path: Path) -> None:
    rule = {"score": FOLLOWED, "bound": 0.5, "words": "follows as far as S1 does"}
    gate = [rule | {"reference": arm} for arm in ("s1", "pretrained_base")]
    out = shutil.copytree(ran.out, tmp_path / "out")
    reasons = run_small(ran.material, out, gate=gate).result.decisions[0].reasons
    assert len(reasons) == 2
    assert not any("there are no scores" in reason.text for reason in reasons)


@pytest.mark.slow
def test_a_study_in_two_processes_finds_what_one_finds_and_goes_on_in_one(
    ran: Ran, tmp_path: Path
) -> None:
    two = run_small(ran.material, tmp_path / "out", num_processes=2, seeds=[1])
    for arm in ("s1", "pretrained_base"):
        ours, theirs = trained(ran, arm, 1), trained(two, arm, 1)
        assert theirs.inputs["rows"] == ours.inputs["rows"]
        assert theirs.settings == ours.settings
        assert theirs.figures["num_tokens"] == ours.figures["num_tokens"]
        for (step, loss), (other, told) in zip(
            ours.figures["losses"], theirs.figures["losses"], strict=True
        ):
            assert (step, loss) == (other, pytest.approx(told, abs=2e-4))
    for arm in ARMS:
        (found,) = cards(two.result)[arm]
        for name, score in cards(ran.result)[arm][0].scores.items():
            if "nats" in score.unit:
                assert found.value(name) == pytest.approx(score.value, abs=1e-3)
    assert run_small(ran.material, tmp_path / "out", seeds=[1]).stages_done == []


RUNNER = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from fedgraft.study import stage
from fedgraft.study.arms import run
from fedgraft.study.study import Study
file, place, out = map(Path, sys.argv[1:4])
stage.code_hash = lambda: sys.argv[4]  # of the process that started this one
run(Study.load(file, {"place": place}), out, say=lambda line: print(line, flush=True))
"""


def kill_at(file: Path, ran: Ran, out: Path, title: str, begun: str) -> None:
    """Run a study in a process of its own and kill it when a stage that was announced has begun:
    when something below `out` matches."""
    command = [sys.executable, "-c", RUNNER, str(file), str(ran.material), str(out), code_hash()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            if line.strip() == title:
                while process.poll() is None and not any(out.glob(begun)):
                    time.sleep(0.001)
                process.kill()
    assert process.returncode == -signal.SIGKILL, f"ended before {title}"


def test_killed_and_resumed_equals_never_killed(ran: Ran, tmp_path: Path) -> None:
    """kill -9 in training and in the search; each run goes on from the last finished stage."""
    out = tmp_path / "out"
    file = write_study(tmp_path / "study.yaml")
    kill_at(file, ran, out, "seed 1: pre-train pretrained_base", "seed-1/pretrained_base/.*")
    assert (out / "seed-1" / "s1" / RECORD).exists()
    assert not (out / "seed-1" / "pretrained_base" / RECORD).exists()
    kill_at(file, ran, out, "seed 2: choose the scale", "seed-2/scale")
    resumed = run_small(ran.material, out)
    assert resumed.stages_done[0] == "seed 2: choose the scale"
    assert without_times(resumed.result) == without_times(ran.result)
    kept = {path.relative_to(out) for path in out.rglob("*")}
    assert kept == {path.relative_to(ran.out) for path in ran.out.rglob("*")}


def test_the_result_is_json_that_others_can_read(ran: Ran) -> None:
    found = json.loads((ran.out / "result.json").read_text(encoding="utf-8"))
    assert tuple(found) == tuple(Result.model_fields)


def test_the_scale_is_chosen_on_every_group_however_few_dialogues_are_asked(
    material: Path, tmp_path: Path
) -> None:
    """The company's validation file is sorted by group."""
    asked = [
        {
            "id": f"validation/{number}",
            "group": "old" if number < 4 else "unseen_pairs",
            "messages": [{"role": "user", "content": f"Who looks after {number}?"}],
            "constraints": [{"kind": "max_words", "argument": "9"}],
        }
        for number in range(6)
    ]
    file = tmp_path / "validation.jsonl"
    write_lines(file, asked)
    ran = run_small(
        material,
        tmp_path / "out",
        dialogues={"validation": str(file), "test": "place:dialogues/test.jsonl"},
        evaluation={"window": 32, "max_new_tokens": 3, "max_dialogues": 3},
        adapters=None,
        seeds=[1],
    )
    for point in ran.result.scales[0].points:
        assert {f"{FOLLOWED}/old", f"{FOLLOWED}/unseen_pairs"} <= point.scores.keys()


def test_ways_to_merge_get_a_scale_and_test_scores_each(material: Path, tmp_path: Path) -> None:
    ways = {
        "TIES 0.2": {"method": {"name": "ties", "density": 0.2}},
        "nothing": {"factors": {"kinds": {"embedding": 0, "mlp": 0, "attention": 0, "norm": 0}}},
        "the same": {},
        "packed": {"form": {"name": "packed"}},
        "1 bit": {"form": {"name": "sign"}},
    }
    ran = run_small(material, tmp_path / "out", merging=ways, adapters=None, seeds=[1])
    result = ran.result
    assert {way: found.words for way, found in result.merging.items()} == {
        "TIES 0.2": "ties, density 0.2",
        "nothing": "plain, attention x 0, embedding x 0, mlp x 0, norm x 0",
        "the same": "plain",
        "packed": "plain, packed",
        "1 bit": "plain, 1 bit a number",
    }
    plain = result.summary["graft"]
    assert result.merging["the same"].summary == plain
    assert result.merging["the same"].scales == result.scales
    assert result.merging["packed"].summary == plain
    stored = Residual.open(tmp_path / "out" / "residuals" / "1 bit a number" / "residual")
    assert stored.form == "sign"
    assert result.merging["1 bit"].summary["perplexity/hr/nats_per_token"] not in (
        plain["perplexity/hr/nats_per_token"],
        result.summary["pretrained_base"]["perplexity/hr/nats_per_token"],
    )
    perplexity = "perplexity/hr/nats_per_token"
    assert (
        result.merging["nothing"].summary[perplexity]
        == result.summary["pretrained_base"][perplexity]
    )
    assert result.merging["TIES 0.2"].summary[perplexity] != plain[perplexity]
    page = render(result)
    for words in ("Ways to add the residual", "TIES 0.2", "plain addition", "ties, density 0.2"):
        assert words in page
    told = {
        way: next(one.told for one in found.comparisons if one.score == FOLLOWED)
        for way, found in result.merging.items()
    }
    assert told["the same"] == told["packed"] == "the same"
    against = {(one.arm, one.against) for f in result.merging.values() for one in f.comparisons}
    assert against == {(way, "graft") for way in ways}
    same = ", ".join(way for way in result.merging if told[way] == "the same")
    assert "by prompts followed in full: example by example against graft, " in result.verdict
    assert f"{same} are the same" in result.verdict
