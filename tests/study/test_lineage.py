"""A study of lineages, tiny and real: models are what recipes say, and nothing is done twice."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.evaluation.exams import write_exams
from tests.study import small
from tests.study.lineages import (
    RESIDUAL,
    SCORES,
    TRAINING,
    only,
    with_models,
    write_lessons,
    write_study,
)

from fedgraft.errors import ResidualError, StudyError
from fedgraft.evaluation.benchmarks import PAPER_ROWS
from fedgraft.evaluation.scorecard import FOLLOWED, RESPONSE_NATS, Score, Scorecard, evaluate
from fedgraft.models import open_model, open_tokenizer, save_model
from fedgraft.provenance import RECORD, Record
from fedgraft.study import arms, kinds
from fedgraft.study.comparison import compare
from fedgraft.study.lineage import TUNED_ON, _Lineages, parted, run, verdict
from fedgraft.study.machine import machine
from fedgraft.study.plan import plan
from fedgraft.study.recipes import LineageStudy
from fedgraft.study.result import Forecast, Lineages, Summary, load_result
from fedgraft.study.study import Study
from fedgraft.text.dialogues import Dialogue, Message, load_dialogues
from fedgraft.training import pretrain
from fedgraft.weights.checkpoint import Checkpoint
from fedgraft.weights.inspection import inspect
from fedgraft.weights.residual import Residual

GRAFT: dict[str, Any] = {"residual": RESIDUAL}
NEWER: dict[str, Any] = {"from": "base", "pretrain": TRAINING}
LESSONS: dict[str, Any] = {"lessons": {"file": "place:lessons.jsonl", "scored": 5}}
THREE: dict[str, Any] = {
    "newer": NEWER,
    "graft": {"from": "newer", "graft": GRAFT},
    "tuned": {"from": "graft", "tune": {**TRAINING, "examples": ["lessons"]}},
}
"""Each made of the one before."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A study that was run, and what was said on the way."""

    out: Path
    study: LineageStudy
    result: Lineages
    said: list[str] = field(default_factory=list)

    @property
    def stages_done(self) -> list[str]:
        titles = [line for line in self.said if not line.startswith(" ")]
        return [title for title in titles if not title.endswith(": done already")]

    def model(self, name: str, seed: int | None = 1) -> Path:
        return self.out / ("models" if seed is None else f"seed-{seed}") / name / "model"

    def record(self, name: str, seed: int | None = 1) -> Record:
        record = Record.read(self.model(name, seed))
        assert record
        return record

    def scores(self, arm: str, seed: int | None = 1) -> dict[str, Score]:
        found = {one.arm: one.scorecards for one in self.result.arms}[arm]
        return next(card.scores for card in found if card.seed == seed)


def run_small(material: Path, out: Path, **changes: Any) -> Ran:
    said: list[str] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    study = kinds.load(write_study(out.with_suffix(".yaml"), **changes), {"place": material})
    assert isinstance(study, LineageStudy)
    return Ran(out=out, study=study, result=run(study, out, say=said.append), said=said)


def numbers(path: Path) -> dict[str, Any]:
    checkpoint = Checkpoint.open(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lessons(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def ran(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Two seeds, run once from nothing."""
    models = {
        "newer": {"from": "base", "pretrain": {**TRAINING, "budgets": [512]}},
        "half way": {"from": "newer@512", "graft": {**GRAFT, "scale": 0.5}},
        "tuned": {"from": "graft", "tune": {**TRAINING, "examples": ["lessons"]}},
        "taught": {"from": "base", "tune": {**TRAINING, "examples": ["lessons"]}, "once": True},
        "of taught": {"from": "newer", "graft": {"residual": ["base", "taught"]}},
        "signs": {"from": "newer", "graft": {**GRAFT, "form": {"name": "sign"}}},
    }
    scored = ("instruct", "newer@512", "newer", "graft", "half way", "tuned", "of taught", "signs")
    changes = with_models(*scored, **models) | {"examples": LESSONS, "against": "graft"}
    del changes["models"]["s1"]
    return run_small(material, tmp_path_factory.mktemp("study") / "out", **changes)


def test_it_equals_a_study_of_arms_that_makes_the_same_models(
    material: Path, tmp_path: Path
) -> None:
    ours = run_small(material, tmp_path / "lineage")
    evaluation = {"window": 32, "max_new_tokens": 3}
    changes: dict[str, Any] = {"scale": {"grid": [1.0]}, "adapters": None, "tuning": None}
    file = small.write_study(tmp_path / "arms.yaml", evaluation=evaluation, **changes)
    theirs = arms.run(Study.load(file, {"place": material}), tmp_path / "arms")
    names = {"pretrained_base": "newer"}
    for arm in theirs.arms:
        for card in arm.scorecards:
            assert ours.scores(names.get(arm.arm, arm.arm), card.seed) == card.scores


def test_a_graft_is_its_target_plus_the_scaled_residual(ran: Ran) -> None:
    residual = Residual.open(ran.out / "residuals" / "instruct, less base" / "residual")
    before, grafted = numbers(ran.model("newer")), numbers(ran.model("graft"))
    for name, tensor in grafted.items():
        assert np.array_equal(tensor, before[name] + residual.read(name)), name


def test_a_checkpoint_on_the_way_is_the_one_that_was_left(ran: Ran) -> None:
    left = ran.model("newer").with_name("model-512")
    record = Record.read(ran.out / "scores" / "half way-seed-1")
    assert record
    at_512 = Record.read(left)
    assert at_512
    assert at_512.settings["budget"] == 512
    assert record.settings["scale"] == 0.5
    assert ran.scores("newer@512") != ran.scores("newer")


def test_a_graft_that_nothing_is_made_of_is_scored_and_goes(ran: Ran) -> None:
    assert not ran.model("half way").exists()
    folder = ran.out / "scores" / "half way-seed-1"
    assert sorted(file.name for file in folder.iterdir()) == [RECORD, "scorecard.json"]
    assert ran.model("graft").is_dir()  # `tuned` is made of it
    assert set(ran.record("tuned").residuals) == set(ran.record("graft").residuals)


def test_a_residual_in_another_form_is_added_in_that_form(ran: Ran) -> None:
    small_one = Residual.open(
        ran.out / "residuals" / "instruct, less base, 1 bit a number" / "residual"
    )
    assert small_one.form == "sign"
    record = Record.read(ran.out / "scores" / "signs-seed-1")
    assert record
    assert record.inputs["residual"] == small_one.content_hash
    assert ran.scores("signs") != ran.scores("graft")


def test_what_no_seed_changes_is_made_and_scored_once(ran: Ran) -> None:
    seeds = {arm.arm: [card.seed for card in arm.scorecards] for arm in ran.result.arms}
    assert seeds["instruct"] == [None]
    assert seeds["newer"] == seeds["of taught"] == [1, 2]
    assert ran.model("taught", None).is_dir()
    assert (ran.out / "residuals" / "taught, less base").is_dir()
    assert sum(title.split()[-1] == "taught" and "tune" in title for title in ran.said) == 1


def test_another_seed_reads_and_tunes_in_another_order(ran: Ran) -> None:
    for name in ("newer", "tuned"):
        one, two = ran.record(name, 1), ran.record(name, 2)
        assert one.inputs["rows"] != two.inputs["rows"]
        assert one.settings["seed"] != two.settings["seed"]


def test_held_out_answers_are_scored_beside_those_that_were_tuned_on(ran: Ran) -> None:
    names = [f"{RESPONSE_NATS}/lessons{suffix}" for suffix in ("", TUNED_ON)]
    for arm in ("instruct", "newer", "tuned"):
        scores = ran.scores(arm, None if arm == "instruct" else 1)
        assert [name for name in scores if name.startswith("response/nats")] == names
    before, after = ran.scores("graft"), ran.scores("tuned")
    assert after[names[1]].value < before[names[1]].value
    lessons = load_dialogues(ran.study.examples["lessons"].file)
    model, speaker = open_model(ran.model("tuned")), ran.study.checkpoints["instruct"]
    for name, dialogues in zip(names, parted(lessons, 5, lambda _: True, 99)[:2], strict=True):
        card = evaluate(model, open_tokenizer(speaker), arm="tuned", responses=dialogues[:5])
        assert card.scores[RESPONSE_NATS] == after[name]


def test_a_residual_is_inspected_before_its_graft_is_asked(ran: Ran) -> None:
    titles = [line for line in ran.said if not line.startswith(" ")]
    looked = titles.index("seed 1: inspect instruct, less base, on newer")
    assert looked < titles.index("score graft, seed 1")
    residual = Residual.open(ran.out / "residuals" / "instruct, less base" / "residual")
    study = ran.study
    found = inspect(residual, study.checkpoints["base"], newer_base=ran.model("newer"))
    told = next(one for one in ran.result.forecasts if (one.arm, one.seed) == ("graft", 1))
    assert told.strength == found.forecast.strength
    assert told.outcome == found.forecast.outcome
    assert told.relative_norm == found.whole.relative_norm
    followed = [ran.scores(*arm)[SCORES].value for arm in (("graft", 1), ("instruct", None))]
    assert told.kept == (followed[0] / followed[1] if followed[1] else None)


def test_a_template_that_was_edited_in_place_makes_other_models(
    material: Path, tmp_path: Path
) -> None:
    ours = shutil.copytree(material, tmp_path / "material")
    study = kinds.load(write_study(tmp_path / "study.yaml"), {"place": ours})
    assert isinstance(study, LineageStudy)
    speaker = study.checkpoints[study.speaker]

    def now() -> set[str]:
        return set(_Lineages(study, tmp_path / "out", lambda _: None, 1).hashes.values())

    before = now()
    with (Path(speaker) / "chat_template.jinja").open("a") as file:
        file.write(" ")
    assert before
    assert not now() & before


def test_residuals_of_names_with_dashes_stand_apart(material: Path, tmp_path: Path) -> None:
    """`a-b` less `c`, and `a` less `b-c`, were one folder."""
    changes = only(
        "instruct",
        "one",
        "two",
        **{
            "c": NEWER,
            "b-c": NEWER,
            "a": {"from": "b-c", "pretrain": TRAINING},
            "a-b": {"from": "c", "pretrain": TRAINING},
            "one": {"from": "c", "graft": {"residual": ["c", "a-b"]}},
            "two": {"from": "b-c", "graft": {"residual": ["b-c", "a"]}},
        },
    )
    ran = run_small(material, tmp_path / "out", seeds=[1], **changes)
    places = sorted(place.name for place in (ran.out / "seed-1" / "residuals").iterdir())
    assert places == ["a, less b-c", "a-b, less c"]


def test_forecasts_are_made_of_plain_grafts_alone(ran: Ran) -> None:
    assert {one.arm for one in ran.result.forecasts} == {"graft", "of taught"}


def test_a_finished_study_is_not_run_again(ran: Ran, material: Path) -> None:
    study = kinds.load(ran.out.with_suffix(".yaml"), {"place": material})
    said: list[str] = []
    again = kinds.run(study, ran.out, say=said.append)
    assert [t for t in said if not t.startswith(" ") and not t.endswith(": done already")] == []
    assert again == ran.result


def test_one_more_seed_makes_what_it_changes_alone(material: Path, tmp_path: Path) -> None:
    changes = only(
        "instruct", "newer", "graft", newer=NEWER, graft={"from": "newer", "graft": GRAFT}
    )
    run_small(material, tmp_path / "out", seeds=[1], **changes)
    more = run_small(material, tmp_path / "out", seeds=[1, 2], **changes)
    assert more.stages_done
    assert all("seed 2" in title for title in more.stages_done)


def test_killed_and_resumed_equals_never_killed(
    ran: Ran, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the weights of the tuned model are written."""
    changes = only("graft", "tuned", **THREE) | {"examples": LESSONS, "seeds": [1]}

    def killed(model: Any, tokenizer: Any, folder: Path, **more: Any) -> None:
        if (tmp_path / "out/seed-1/graft/model").exists():
            raise KeyboardInterrupt
        save_model(model, tokenizer, folder, **more)

    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "save_model", killed)
        with pytest.raises(KeyboardInterrupt):
            run_small(material, tmp_path / "out", **changes)
    assert not (tmp_path / "out/seed-1/tuned" / RECORD).exists()
    resumed = run_small(material, tmp_path / "out", **changes)
    assert not any("pre-train" in title for title in resumed.stages_done)
    for arm in ("graft", "tuned"):
        assert resumed.scores(arm) == ran.scores(arm)


UNTIL_KILLED = """
import os, signal, sys, threading
from pathlib import Path
import torch
from fedgraft.study import kinds
torch.set_num_threads(1)
file, material, out, last = sys.argv[1:]
begun = []
def say(line):
    if not line.startswith(" ") and not line.endswith(": done already"):
        begun.append(line)
        if len(begun) == int(last):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGKILL)).start()
kinds.run(kinds.load(Path(file), {"place": Path(material)}), Path(out), say=say)
"""
"""Killed by the system a moment after it has begun so many stages."""


@pytest.mark.slow
def test_killed_by_the_system_again_and_again_it_ends_as_if_never_killed(
    ran: Ran, material: Path, tmp_path: Path
) -> None:
    changes = only("graft", "tuned", **THREE) | {"examples": LESSONS, "seeds": [1]}
    out = tmp_path / "out"
    file = write_study(out.with_suffix(".yaml"), **changes)
    for last in (2, 1, 2, 1):
        command = [sys.executable, "-c", UNTIL_KILLED, str(file), str(material), str(out)]
        process = subprocess.run([*command, str(last)], capture_output=True, text=True)
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert not (out / "result.json").exists()
    resumed = run_small(material, out, **changes)
    assert not any("pre-train" in title for title in resumed.stages_done)
    assert not list(out.rglob("*.partial-*"))
    for arm in ("graft", "tuned"):
        assert resumed.scores(arm) == ran.scores(arm)


def test_a_recipe_reads_texts_by_their_shares(material: Path, tmp_path: Path) -> None:
    reading = {**TRAINING, "num_tokens": 2048, "texts": {"hr": 0.75, "finance": 0.25}}
    texts = {name: {"corpus": [f"place:{name}.jsonl"]} for name in ("hr", "finance")}
    changes = only("mixed", mixed={"from": "base", "pretrain": reading})
    mixed = run_small(material, tmp_path / "out", texts=texts, seeds=[1], **changes)
    assert mixed.record("mixed").inputs["rows"]
    shares = {**reading, "texts": {"hr": 0.25, "finance": 0.75}}
    changes = only("mixed", mixed={"from": "base", "pretrain": shares})
    other = run_small(material, tmp_path / "other", texts=texts, seeds=[1], **changes)
    assert mixed.record("mixed").inputs["rows"] != other.record("mixed").inputs["rows"]


def test_replay_may_be_left_out_by_a_recipe(material: Path, tmp_path: Path) -> None:
    models = {"with": NEWER, "without": {"from": "base", "pretrain": {**TRAINING, "replay": 0}}}
    both = run_small(material, tmp_path / "out", seeds=[1], **only("with", "without", **models))
    assert both.record("with").settings["replay_share"] == 0.25
    assert both.record("without").settings["replay_share"] == 0


def test_random_weights_have_the_sizes_asked_for_and_hang_on_the_seed_alone(
    material: Path, tmp_path: Path
) -> None:
    sizes = {"num_hidden_layers": 1, "intermediate_size": 48}
    models = {"start": {"from": "base", "fresh": sizes}, "same": {"from": "base", "fresh": {}}}
    one = run_small(material, tmp_path / "one", **only("start", "same", **models))
    two = run_small(material, tmp_path / "two", seeds=[2], **only("start", "same", **models))
    start = Checkpoint.open(one.model("start"))
    assert start.config["num_hidden_layers"] == 1
    assert start.tensors["model.layers.0.mlp.up_proj.weight"].shape == (48, 32)
    assert not any(".layers.1." in name for name in start.tensors)
    base = Checkpoint.open(material / "base")
    same = Checkpoint.open(one.model("same"))
    assert same.tensors.keys() == base.tensors.keys()
    first, again, other = (
        numbers(found.model("start", seed))["model.embed_tokens.weight"]
        for found, seed in ((one, 2), (two, 2), (one, 1))
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not one.record("start").ancestors


def test_sizes_that_do_not_go_together_are_refused(material: Path, tmp_path: Path) -> None:
    changes = only("start", start={"from": "base", "fresh": {"hidden_size": 33}})
    with pytest.raises(Exception, match="expected a config that a model of other sizes can be"):
        run_small(material, tmp_path / "out", **changes)


def test_a_residual_goes_where_it_does_not_belong_where_that_is_asked_for(
    material: Path, tmp_path: Path
) -> None:
    models = {
        "stranger": {"from": "base", "fresh": {}},
        "crossed": {"from": "stranger", "graft": {**GRAFT, "any_parent": True}},
        "s1": {"from": "instruct", "pretrain": TRAINING},
        "again": {"from": "s1", "graft": {**GRAFT, "any_parent": True, "again": True}},
        "taught": {"from": "base", "tune": {**TRAINING, "examples": ["lessons"]}},
        "second": {"from": "s1", "graft": {"residual": ["base", "taught"], "any_parent": True}},
    }
    changes = only("crossed", "again", "second", "s1", **models) | {"examples": LESSONS}
    found = run_small(material, tmp_path / "out", seeds=[1], **changes)
    assert found.scores("again") != found.scores("s1")
    assert [one.arm for one in found.result.forecasts] == ["crossed"]


def test_a_residual_between_models_of_other_shapes_is_refused(
    material: Path, tmp_path: Path
) -> None:
    models = {
        "narrow": {"from": "base", "fresh": {"intermediate_size": 48}},
        "crossed": {"from": "narrow", "graft": {**GRAFT, "any_parent": True}},
    }
    with pytest.raises(ResidualError, match="intermediate_size is 48 and 64"):
        run_small(material, tmp_path / "out", seeds=[1], **only("crossed", **models))


def test_a_tuned_model_speaks_the_template_that_it_was_tuned_with(tmp_path: Path) -> None:
    silent = tmp_path / "silent"
    write_lessons(silent)
    tokenizer = open_tokenizer(silent / "base")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(silent / "base")
    (silent / "base" / "chat_template.jinja").unlink(missing_ok=True)
    assert open_tokenizer(silent / "base").chat_template is None
    tuned = {"from": "base", "tune": {**TRAINING, "examples": ["lessons"]}}
    changes = only("tuned", "instruct", tuned=tuned) | {"examples": LESSONS, "seeds": [1]}
    found = run_small(silent, tmp_path / "out", tokenizer="instruct", **changes)
    template = open_tokenizer(silent / "instruct").chat_template
    assert open_tokenizer(found.model("tuned")).chat_template == template


def test_models_in_which_a_token_has_another_id_are_refused(tmp_path: Path) -> None:
    folder = write_lessons(tmp_path / "material")
    file = folder / "base" / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(StudyError, match=r"models.base: expected the ids of instruct, with whose"):
        run_small(folder, tmp_path / "out", tokenizer="instruct", **only("base", "instruct"))


def test_examples_of_which_none_is_left_are_refused(material: Path, tmp_path: Path) -> None:
    tuned = {"from": "base", "tune": {**TRAINING, "examples": ["lessons"]}}
    few = {"lessons": {"file": "place:lessons.jsonl", "scored": 99}}
    with pytest.raises(StudyError, match=r"examples.lessons: expected dialogues to tune on that"):
        run_small(material, tmp_path / "out", examples=few, **only("tuned", tuned=tuned))


def test_dialogues_that_are_longer_than_a_row_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = write_lessons(tmp_path / "material")
    with (folder / "lessons.jsonl").open("a") as stream:
        turn = {"role": "user", "content": "far too long " * 40}
        said = {"role": "assistant", "content": "Yes."}
        stream.write(json.dumps({"id": "long", "messages": [turn, said]}) + "\n")
    tuned = {"from": "base", "tune": {**TRAINING, "examples": ["lessons"]}}
    changes = only("tuned", tuned=tuned) | {"examples": LESSONS, "seeds": [1]}
    found = run_small(folder, tmp_path / "out", **changes)
    assert found.result.num_left_out == {"lessons": 1}
    assert any("1 dialogues are longer than a row of 64 tokens" in line for line in found.said)


def lesson(number: int, answer: int) -> Dialogue:
    turns = (
        Message(role="user", content=f"Question {number}?"),
        Message(role="assistant", content=f"Answer {answer}."),
    )
    return Dialogue(id=f"{number}/{answer}", messages=turns)


@given(
    asked=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), unique=True, max_size=30),
    num_scored=st.integers(0, 12),
)
def test_no_prompt_is_both_scored_and_tuned_on(
    asked: list[tuple[int, int]], num_scored: int
) -> None:
    dialogues = [lesson(*one) for one in asked]
    scored, others, left_out = parted(dialogues, num_scored, lambda _: True, 99)
    prompts = {dialogue.messages[0] for dialogue in dialogues}
    assert left_out == 0
    assert len(scored) == min(num_scored, len(prompts))
    assert len({d.messages[0] for d in scored}) == len(scored)
    assert not {d.messages[0] for d in scored} & {d.messages[0] for d in others}
    assert {d.messages[0] for d in (*scored, *others)} == prompts


def test_what_is_scored_and_tuned_on_hangs_on_the_prompts_alone() -> None:
    dialogues = [lesson(number, 0) for number in range(20)]
    scored, others, _ = parted(dialogues, 3, lambda _: True, 99)
    again = parted(reversed(dialogues), 3, lambda _: True, 99)
    assert again == (scored, others, 0)
    assert parted(dialogues, 3, lambda _: True, 5) == (scored, others[:5], 0)
    odd = parted(dialogues, 3, lambda d: int(d.id.split("/")[0]) % 2 == 1, 99)
    assert odd[2] == 10
    assert [len(part) for part in odd[:2]] == [3, 7]


def test_fewer_examples_are_a_part_of_more(material: Path, tmp_path: Path) -> None:
    def tuned(limit: int | None) -> dict[str, Any]:
        lesson = {**TRAINING, "examples": ["lessons"], "max_examples": limit}
        return {"from": "base", "tune": lesson}

    models = {"few": tuned(3), "many": tuned(None)}
    capped = {"lessons": {**LESSONS["lessons"], "max_examples": 3}}
    cap = only("many", many=tuned(None)) | {"examples": capped, "seeds": [1]}
    three = run_small(material, tmp_path / "capped", **cap).record("many").inputs["rows"]
    changes = only("few", "many", **models) | {"examples": LESSONS, "seeds": [1]}
    found = run_small(material, tmp_path / "out", **changes)
    few, many = (found.record(name).inputs["rows"] for name in ("few", "many"))
    assert few == three != many


def test_the_plan_counts_what_is_made(ran: Ran) -> None:
    planned = plan(ran.study, machine("h100"))
    runs = {name: one.num_runs for one in planned.trainings for name in one.stage.split(", ")}
    assert runs == {"newer": 2, "tuned": 3, "taught": 3}  # alike, so they stand together
    made = {cost.stage for cost in ran.result.costs}
    assert len([stage for stage in ran.result.losses if stage.startswith("tu")]) == 2
    grafts = [s for s in made if s.startswith(("graft,", "scores/half", "scores/of", "scores/sig"))]
    assert planned.num_grafts == len(grafts) == 8
    assert planned.disk["residual"] == 2 * 4 * planned.shape.num_parameters


def test_the_plan_names_the_recipe_that_could_not_start(material: Path, tmp_path: Path) -> None:
    tuned = {"from": "base", "tune": {**TRAINING, "num_tokens": 63, "examples": ["lessons"]}}
    changes = only("tuned", tuned=tuned) | {"examples": LESSONS}
    study = kinds.load(write_study(tmp_path / "s.yaml", **changes), {"place": material})
    assert isinstance(study, LineageStudy)
    with pytest.raises(StudyError, match=r"models.tuned.tune.num_tokens: expected at least one"):
        plan(study, machine("h100"))


def test_models_of_other_sizes_are_planned_with_their_own(material: Path, tmp_path: Path) -> None:
    models = {
        "start": {"from": "base", "fresh": {"num_hidden_layers": 1}},
        "narrow": {"from": "start", "pretrain": TRAINING},
        "newer": NEWER,
    }
    file = write_study(tmp_path / "s.yaml", **only("narrow", "newer", **models))
    study = kinds.load(file, {"place": material})
    assert isinstance(study, LineageStudy)
    newer, narrow = plan(study, machine("h100")).trainings
    assert (newer.stage, narrow.stage) == ("newer", "narrow")
    assert narrow.num_trained < newer.num_trained


def test_the_result_is_read_as_what_it_is(ran: Ran) -> None:
    assert load_result(ran.out) == ran.result
    found = json.loads((ran.out / "result.json").read_text(encoding="utf-8"))
    assert tuple(found) == tuple(Lineages.model_fields)
    assert str(ran.out) not in json.dumps(found)


def test_the_papers_benchmarks_are_asked_of_every_arm_and_kept(
    material: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `bench`")
    write_exams(material / "exams")
    models = {"plain": {"from": "base", "graft": {**GRAFT, "scale": 0.5}}}
    part = {"data": "place:exams", "names": ["piqa", "winogrande"], "limit": 3}
    changes = only("instruct", "plain", **models) | {"benchmarks": part, "dialogues": None}
    found = run_small(material, tmp_path / "out", **changes)
    for arm in ("instruct", "plain"):
        scores = found.scores(arm, None)
        names = {name for name in scores if name.startswith("benchmark/")}
        assert names == {
            "benchmark/piqa/acc",
            "benchmark/piqa/acc_norm",
            "benchmark/winogrande/acc",
        }
    (one,) = {arm.arm: arm for arm in found.result.arms}["plain"].scorecards
    assert {name: asked.num_rows for name, asked in one.benchmarks.items()} == {
        "piqa": 3,
        "winogrande": 3,
    }
    kept = list((tmp_path / "out" / "benchmarks").glob("*/*.json"))
    assert len(kept) == 4
    again = run_small(material, tmp_path / "out", **changes)
    assert again.stages_done == []


def card(arm: str, seed: int | None, value: float) -> Scorecard:
    return Scorecard(
        arm=arm, seed=seed, scores={FOLLOWED: Score(value=value, num=9, stderr=0, unit="share")}
    )


def test_every_arm_is_compared_with_the_one_that_the_study_names(ran: Ran) -> None:
    found = {(one.arm, one.score): one for one in ran.result.comparisons}
    arms = {arm.arm for arm in ran.result.arms}
    assert {one.against for one in ran.result.comparisons} == {"graft"}
    assert {arm for arm, _ in found} == arms - {"graft"}
    assert ran.result.comparisons[0].score == SCORES
    for (arm, score), one in found.items():
        assert one.difference, score
        assert one.difference.paired
        assert one.difference.num_seeds == 2  # the graft is made anew by each
        cards = {a.arm: a.scorecards for a in ran.result.arms}
        means = [np.mean([card.scores[score].value for card in cards[a]]) for a in (arm, "graft")]
        assert one.difference.value == pytest.approx(means[0] - means[1], abs=1e-5)


def test_answers_to_tune_on_and_held_out_are_compared_too(ran: Ran) -> None:
    scores = {one.score for one in ran.result.comparisons if one.arm == "tuned"}
    assert {f"{RESPONSE_NATS}/lessons{suffix}" for suffix in ("", TUNED_ON)} <= scores
    assert any(score.endswith("/nats_per_token") for score in scores)


def test_without_an_arm_to_compare_with_nothing_is(material: Path, tmp_path: Path) -> None:
    found = run_small(material, tmp_path / "out", **only("base", "instruct"))
    assert found.result.comparisons == ()
    assert "Example by example" not in found.result.verdict


def test_the_verdict_follows_from_the_figures(material: Path, tmp_path: Path) -> None:
    study = kinds.load(write_study(tmp_path / "s.yaml"), {"place": material})
    assert isinstance(study, LineageStudy)
    study = study.model_copy(update={"against": "graft", "score": FOLLOWED, "axis": "dialogues"})
    cards = {
        arm: [card(arm, seed, value + seed / 1000) for seed in (1, 2, 3)]
        for arm, value in (("graft", 0.8), ("s1", 0.4), ("few", 0.5), ("many", 0.9))
    }
    summary = {
        arm: {FOLLOWED: Summary.of([c.scores[FOLLOWED].value for c in found], "share")}
        for arm, found in cards.items()
    }
    lines = {"S2": ((10, "few"), (1000, "many"))}
    promise = Forecast(
        arm="graft",
        seed=1,
        residual="instruct - base",
        target="newer",
        relative_norm=0.1,
        effective_rank=2,
        residual_strength=0.1,
        strength=0.05,
        outcome="holds",
        kept=0.9,
    )
    broken = promise.model_copy(update={"outcome": "breaks"})
    pairs = [(arm, "graft") for arm in cards if arm != "graft"]
    told = verdict(study, summary, compare(cards, pairs), lines, (promise, broken))
    for part in (
        "By prompts followed in full, many is best, with 90.2% (90.1% to 90.3%).",
        "graft has 80.2% (80.1% to 80.3%).",
        "Example by example against graft, s1 is worse (95% intervals over 9",
        "S2 is level with graft from 1,000 on (dialogues).",
        "Of 2 grafts that inspection made a forecast for, before they were asked anything, 1 came",
    ):
        assert part in told
    for points, words in (
        (("few",), "S2 falls short of graft at every point (dialogues)."),
        (("many", "graft"), "S2 is level with graft or above it at every point (dialogues)."),
        (("many", "graft", "few"), "S2 is level with graft up to 1 (dialogues)."),
        (("few", "many", "s1"), "S2 is level with graft at 1 (dialogues)."),
    ):
        line = {"S2": tuple((float(at), arm) for at, arm in enumerate(points))}
        assert words in verdict(study, summary, (), line, ())
    alike = {name: ((10.0, arm),) for name, arm in (("S2", "few"), ("S1", "s1"), ("on", "many"))}
    alone = verdict(study.model_copy(update={"against": None}), summary, (), lines, ())
    assert "Along dialogues: S2 from 50.2% (50.1% to 50.3%) at 10 to 90.2%" in alone
    assert alone.endswith("at 1,000.")
    told = verdict(study, summary, (), alike, ())
    assert "S2, S1 fall short of graft at every point (dialogues). on is level with" in told
    level = dict.fromkeys(summary, summary["graft"])
    assert verdict(study, level, (), {}, ()).startswith(
        "By prompts followed in full, all are level, with 80.2% (80.1% to 80.3%)."
    )
    asked = study.model_copy(update={"score": PAPER_ROWS["IFEval", "PLS_acc"]})
    scored = {arm: {asked.score: found[FOLLOWED]} for arm, found in summary.items()}
    assert verdict(asked, scored, (), {}, ()).startswith("By IFEval PLS_acc, many is best, with")
    assert verdict(study, {}, (), {}, ()).startswith("The study's score was not taken")
