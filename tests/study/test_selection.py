"""Laws of a study of selection: every arm has the same clients and rounds."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml

from fedgraft.errors import DialogueError, StudyError
from fedgraft.federation.history import History
from fedgraft.selection.projection import Name, Projection
from fedgraft.study import kinds
from fedgraft.study.result import Selections, load_result
from fedgraft.study.rivals import START
from fedgraft.study.selection import (
    NAMES,
    Arm,
    SelectionStudy,
    Source,
    first_by_hash,
    in_words,
    load_source,
    run,
)
from fedgraft.testing import save_tiny

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("selection*.yaml"))
TOPICS = ("river", "mill", "bread")
ALIGNED = {
    "method": "federated",
    "budget": 0.3,
    "projection": {"name": "random", "num_dimensions": 4},
    "clustering": {"min_cluster_size": 2, "noise": "singletons"},
    "server_clustering": {"min_cluster_size": 2, "noise": "singletons"},
}
OWN = {key: value for key, value in ALIGNED.items() if key != "server_clustering"}


def dialogue(number: int, *, long: bool = False) -> dict[str, Any]:
    topic = TOPICS[number % 3]
    question = f"What of the {topic} number {number}?" * (20 if long else 1)
    return {
        "id": f"{topic}/{number}",
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"The {topic} is {number}."},
        ],
        "group": topic,
    }


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def content(**changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "question": "Does it matter which?",
        "model": "graft",
        "train": {"file": "train.jsonl"},
        "test": {"file": "test.jsonl"},
        "partition": {"name": "dirichlet", "field": "group", "alpha": 1.0, "num_clients": 3},
        "federation": {
            "num_rounds": 2,
            "passes": 1,
            "training": {"num_tokens": 400, "learning_rate": 5e-3, "batch_tokens": 64, "rank": 2},
        },
        "row_length": 64,
        "arms": {
            "fedit": {"method": "all"},
            "random": {"method": "random", "budget": 0.3},
            "aligned": ALIGNED,
            "one-place": {**OWN, "method": "local", "pooled": True},
        },
        "seeds": [1, 2],
        "evaluation": {"max_new_tokens": 8},
    } | changes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("study")
    save_tiny(folder / "graft", num_layers=1)
    write(folder / "train.jsonl", [dialogue(n, long=n == 7) for n in range(40)])
    write(folder / "test.jsonl", [dialogue(n) for n in range(100, 106)])
    return folder


def load(place: Path, **changes: Any) -> SelectionStudy:
    file = place / "study.yaml"
    file.write_text(yaml.safe_dump(content(**changes), sort_keys=False), encoding="utf-8")
    return SelectionStudy.load(file, {})


@pytest.fixture(scope="module")
def ran(place: Path) -> tuple[Path, Selections]:
    out = place / "out"
    return out, run(load(place), out)


def test_every_arm_and_the_start_are_scored_for_every_seed(ran: tuple[Path, Selections]) -> None:
    _, result = ran
    found = [(one.arm, one.seed) for one in result.scored]
    arms = (START, "fedit", "random", "aligned", "one-place")
    assert found == [(arm, seed) for seed in (1, 2) for arm in arms]
    for one in result.scored:
        assert {"response/nats_per_token", "response/rouge_l"} <= one.scores.keys()


def test_what_is_longer_than_a_row_is_left_out_and_told(ran: tuple[Path, Selections]) -> None:
    _, result = ran
    assert (result.num_examples, result.num_left_out) == (39, 1)
    assert sum(one.num_train for one in result.partition.clients) == 39


def test_the_budget_is_what_is_trained_on(ran: tuple[Path, Selections]) -> None:
    _, result = ran
    for one in result.scored:
        match one.arm:
            case "fedit":
                assert (one.num_examples, one.num_distinct, one.coverage) == (39, 39, 1)
            case "start":
                assert one.num_examples == 0
            case _:
                assert one.num_examples == round(0.3 * 39)
                assert one.num_examples <= one.num_distinct <= 2 * one.num_examples


def test_arms_have_the_same_clients(ran: tuple[Path, Selections]) -> None:
    out, _ = ran
    plans = [
        History.model_validate_json((out / "seed-1" / arm / "history.json").read_bytes()).plan
        for arm in ("fedit", "random", "aligned")
    ]
    assert plans[0]["departments"] == plans[1]["departments"] == plans[2]["departments"]
    assert plans[0]["seed"] == plans[1]["seed"] == plans[2]["seed"]


def test_clients_learn_in_the_prompt_that_they_are_asked_in(place: Path) -> None:
    study = load(place, prompt="alpaca")
    assert all(study.plan(arm, ["a", "b"], seed=1).prompt == "alpaca" for arm in study.arms)


def test_the_start_in_another_prompt_is_another_stage(place: Path, tmp_path: Path) -> None:
    random = {"random": {"method": "random", "budget": 0.3}}
    for again, prompt in ((False, "chat"), (True, "chat"), (False, "alpaca")):
        said: list[str] = []
        study = load(place, arms=random, seeds=[1], prompt=prompt, row_length=512)
        run(study, tmp_path, say=said.append)
        assert ("seed 1: score the start: done already" in said) == again


def test_the_map_has_every_example_and_what_was_chosen_of_them(
    ran: tuple[Path, Selections],
) -> None:
    out, result = ran
    mapped = result.mapped
    assert mapped
    held = {one.client: one.num_train for one in result.partition.clients}
    assert {name: mapped.clients.count(name) for name in held} == held
    assert len(mapped.plane) == len(mapped.clients) == 39
    assert np.isfinite(mapped.plane).all()
    assert set(mapped.arms) == {"aligned", "random"}  # the only one with clusters, and `against`
    assert mapped.arms["random"].clusters == ()
    assert len(mapped.arms["aligned"].clusters) == 39
    first = {one.arm: one for one in result.scored if one.seed == 1}
    for arm, marked in mapped.arms.items():
        assert len(set(marked.chosen)) == len(marked.chosen) == first[arm].num_distinct
        history = History.model_validate_json((out / f"seed-1/{arm}/history.json").read_bytes())
        trained = {part.client for done in history.rounds for part in done.parts}
        assert {mapped.clients[place] for place in marked.chosen} == trained


def test_a_study_without_clusters_has_no_map(place: Path, tmp_path: Path) -> None:
    random = {"random": {"method": "random", "budget": 0.3}, "fedit": {"method": "all"}}
    assert run(load(place, arms=random, seeds=[1]), tmp_path).mapped is None


def test_what_is_finished_is_not_run_again(ran: tuple[Path, Selections], place: Path) -> None:
    out, result = ran
    said: list[str] = []
    again = run(load(place), out, say=said.append)
    assert all("done already" in line or "longer than a row" in line for line in said)
    assert again == result
    assert load_result(out) == result


def test_an_arm_is_compared_with_the_one_that_it_names_and_else_with_that_of_the_study(
    place: Path,
) -> None:
    arms = {
        "little": {"method": "random", "budget": 0.1},
        "random": {"method": "random", "budget": 0.2},
        "choice": {"budget": 0.2},
        "little-choice": {"budget": 0.1, "against": "little"},
    }
    assert load(place, arms=arms).rivals == {
        **{"start": "random", "little": "random", "choice": "random"},
        "little-choice": "little",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"against": "nobody"}, "against: nobody is none of the other arms fedit, random"),
        (
            {"arms": {"random": {"method": "random", "budget": 0.1, "against": "nobody"}}},
            "arms.random.against: nobody is none of the other arms random",
        ),
        (
            {"arms": {"random": {"method": "random", "budget": 0.1, "against": "random"}}},
            "arms.random.against: random is none of the other arms random",
        ),
        ({"model": None}, "expected either model or graft, found neither"),
        ({"arms": {"start": {"method": "all"}}, "against": "start"}, "model before training"),
        ({"arms": {"random": {"method": "random"}}}, "expected a budget"),
        (
            {"partition": {"name": "iid", "num_clients": 3, "seed": 1}},
            "partition: the seed comes from `seeds`",
        ),
        (
            {"federation": {**content()["federation"], "selection": ALIGNED}},
            "federation.selection: comes from arms",
        ),
        (
            {"federation": {**content()["federation"], "prompt": "alpaca"}},
            "federation.prompt: comes from prompt",
        ),
        ({"typo": 1}, "typo: Extra inputs are not permitted"),
    ],
)
def test_a_contradictory_file_is_refused(
    changes: dict[str, Any], message: str, place: Path
) -> None:
    with pytest.raises(Exception, match=re.escape(message)):
        load(place, **changes)


def test_groups_can_be_held_out(place: Path) -> None:
    held = load_source(Source(file=str(place / "train.jsonl"), only=("mill",)))
    rest = load_source(Source(file=str(place / "train.jsonl"), without=("mill",)))
    assert {one.group for one in held} == {"mill"}
    assert {one.group for one in rest} == {"river", "bread"}
    assert len(held) + len(rest) == 40
    assert len(first_by_hash(held, 5)) == 5
    assert first_by_hash(held[::-1], 5) == first_by_hash(held, 5)
    with pytest.raises(StudyError, match="found bread, mill, river"):
        load_source(Source(file=str(place / "train.jsonl"), only=("sea",)))


def test_documents_are_no_dialogues(tmp_path: Path) -> None:
    file = write(tmp_path / "text.jsonl", [{"text": "The mill stands."}])
    with pytest.raises(DialogueError, match=r"expected dialogues .* or instr.*, found documents"):
        load_source(Source(file=str(file)))


def test_every_projection_is_named_for_the_report() -> None:
    assert set(NAMES) == set(get_args(Name))
    arm = Arm(projection=Projection(name="tsne", num_dimensions=2), budget=0.1)
    assert in_words(arm) == "FedHDS, t-SNE in 2 dimensions, 10% of all, none twice"


def test_examples_that_cannot_be_shared_out_are_told(place: Path, tmp_path: Path) -> None:
    study = load(place, partition={"name": "iid", "num_clients": 60})
    with pytest.raises(StudyError, match="tiny, partition: expected"):
        run(study, tmp_path)


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: str(file.stem))
def test_every_study_of_selection_loads(file: Path, tmp_path: Path) -> None:
    text = file.read_text(encoding="utf-8")
    places = {}
    for name in ("pocket", "company", "data"):
        places[name] = tmp_path / name
        for path in re.findall(rf"{name}:([\w./-]+)", text):
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).touch()
    study = kinds.load(file, places, dry=True)
    assert isinstance(study, SelectionStudy)
    assert study.name == file.stem
