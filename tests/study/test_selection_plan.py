"""A plan of a study of selection counts what its arms train, from the text where it is there."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedgraft.errors import StudyError
from fedgraft.federation.history import History
from fedgraft.pocket.weights import folder as pocket
from fedgraft.study import kinds
from fedgraft.study.machine import HARDWARE
from fedgraft.study.plan import Plan, Training
from fedgraft.study.selection import SelectionStudy, run
from fedgraft.study.selection_plan import TEMPLATE_TOKENS, plan
from fedgraft.testing import save_tiny

H100 = HARDWARE["h100"]
STUDIES = Path(__file__).parents[2] / "studies"
REAL = sorted(STUDIES.glob("selection_*_qwen2_*.yaml"))
SHAPE = {
    **{"model_type": "qwen2", "hidden_size": 8, "num_hidden_layers": 3, "intermediate_size": 16},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32},
    "max_position_embeddings": 64,
}
ALONE = {"min_cluster_size": 2, "noise": "singletons"}
LETTERS = 40
"""Of an example."""
TOKENS = TEMPLATE_TOKENS + LETTERS / 4


def dialogue(number: int) -> dict[str, Any]:
    asked, said = "q" * (LETTERS // 2), f"{number:0{LETTERS // 2}}"
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"id": f"{number}", "messages": turns, "group": f"topic-{number % 4}"}


def load(place: Path, *, count: int | None = 40, **changes: Any) -> SelectionStudy:
    if count is not None:
        rows = "".join(json.dumps(dialogue(number)) + "\n" for number in range(count))
        (place / "text.jsonl").write_text(rows, encoding="utf-8")
    content = {
        "name": "tiny",
        "question": "How long?",
        "model": "nobody/model-of-no-one",
        "shape": SHAPE,
        "train": {"file": "text.jsonl"},
        "test": {"file": "text.jsonl"},
        "partition": {"name": "iid", "num_clients": 4},
        "row_length": 64,
        "federation": {
            "num_rounds": 5,
            "passes": 2,
            "sampled": 0.5,
            "training": {"num_tokens": 4000, "learning_rate": 1e-3, "batch_tokens": 64, "rank": 2},
        },
        "arms": {
            "fedit": {"method": "all"},
            "random": {"method": "random", "budget": 0.1},
            "few": {"method": "random", "budget": 0.02},
            "one-place": {"method": "local", "budget": 0.1, "pooled": True, "clustering": ALONE},
            "aligned": {
                "budget": 0.1,
                "sampled": 1.0,
                "encoding": {"layers": [1]},
                "clustering": ALONE,
                "server_clustering": ALONE,
            },
        },
        "seeds": [1, 2],
    } | changes
    file = place / "study.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return SelectionStudy.load(file, {}, dry=True)


def by_arm(planned: Plan) -> dict[str, Training]:
    return {one.stage: one for one in planned.trainings}


def test_an_arm_trains_as_often_as_its_clients_are_asked_and_have_something(
    tmp_path: Path,
) -> None:
    """Four clients of ten examples, two asked in each of five rounds, two seeds."""
    arms = by_arm(plan(load(tmp_path), H100))
    runs = {name: arm.num_runs for name, arm in arms.items()}
    assert runs == {"fedit": 20, "random": 20, "few": 10, "one-place": 10, "aligned": 40}
    asked = {"fedit": 10, "random": 1, "few": 1, "one-place": 4, "aligned": 1}
    for name, examples in asked.items():
        rows = max(1, round(2 * examples * TOKENS / 64))
        assert arms[name].num_rows == rows, name


def test_features_are_counted_once_for_each_encoding(tmp_path: Path) -> None:
    reading = plan(load(tmp_path), H100).reading
    assert reading
    assert (reading.num_examples, reading.num_tokens) == (40, round(40 * TOKENS))
    assert reading.num_times == 2
    assert reading.num_bytes == 40 * (4 + 1) * 8 * 4  # every layer for one, one layer for another
    matrices = 3 * (4 * 8 * 8 + 3 * 8 * 16)
    assert reading.flops > 2 * 2 * reading.num_tokens * matrices
    chance = {"random": {"method": "random", "budget": 0.1}}
    assert plan(load(tmp_path, arms=chance), H100).reading is None


def test_what_is_chosen_without_a_budget_is_said_to_be_a_guess(tmp_path: Path) -> None:
    arms = {"random": {"method": "random", "budget": 0.1}, "paper": {}}
    notes = " ".join(plan(load(tmp_path, arms=arms), H100).notes)
    assert "paper: without a budget only the run knows how many are chosen; 1.5% is taken" in notes


def test_text_that_is_not_there_is_told_and_the_most_is_counted(tmp_path: Path) -> None:
    planned = plan(load(tmp_path, count=None), H100)
    assert planned.not_there == ("text.jsonl", "text.jsonl", "nobody/model-of-no-one")
    assert {arm.num_rows for arm in planned.trainings} == {round(4000 / 64)}
    assert "each client is taken to train as long as it may" in planned.notes[0]
    assert planned.reading is None


def test_a_plan_counts_the_trainings_that_a_run_has(tmp_path: Path) -> None:
    """All of them where each client gives its share; where few are chosen, not all may be asked."""
    save_tiny(tmp_path / "model", num_layers=1)
    small = load(tmp_path, model="model", shape=None, row_length=256, seeds=[1])
    planned = by_arm(plan(small, H100))
    run(small, tmp_path / "out")
    for name, arm in planned.items():
        written = (tmp_path / f"out/seed-1/{name}/history.json").read_bytes()
        rounds = History.model_validate_json(written).rounds
        trained = sum(part.counted for done in rounds for part in done.parts)
        if name == "aligned":
            assert 0 < trained <= arm.num_runs
        else:
            assert trained == arm.num_runs, name


@pytest.mark.parametrize("file", REAL, ids=lambda file: str(file.stem))
def test_the_real_sized_studies_have_the_papers_settings(file: Path, tmp_path: Path) -> None:
    places = {"data": tmp_path / "data", "pocket": pocket}
    study = kinds.load(file, places, dry=True)
    assert isinstance(study, SelectionStudy)
    training = study.federation.training
    assert (training.rank, training.alpha, training.schedule) == (8, 16, "constant")
    assert study.evaluation.max_new_tokens == 128
    assert study.prompt == "alpaca"
    arms = study.arms["paper"], study.arms["turbo"]
    assert all((arm.projection.name, arm.projection.num_dimensions) == ("tsne", 2) for arm in arms)
    if "dolly" in file.stem:
        assert (study.federation.num_rounds, training.learning_rate) == (60, 3e-5)
        assert round(study.federation.sampled * study.partition.num_clients) == 10
        assert study.partition.alpha == (5.0 if "even" in file.stem else 0.5)
        assert arms[0].clustering.min_cluster_size == 2
    else:
        assert (study.federation.num_rounds, training.learning_rate) == (40, 3e-4)
        assert arms[0].clustering.min_cluster_size == 5
    for hardware in HARDWARE.values():
        planned = plan(study, hardware)
        parameters = 494_032_768 if "0.5b" in file.stem else 1_543_714_304
        assert planned.shape.num_parameters == parameters
        assert not any("does not fit" in note for note in planned.notes)


def test_there_are_six_real_sized_studies() -> None:
    assert len(REAL) == 6


def test_settings_with_which_no_client_could_start_are_refused(tmp_path: Path) -> None:
    training = {"num_tokens": 40, "learning_rate": 1e-3, "batch_tokens": 64, "rank": 9}
    study = load(tmp_path, federation={"num_rounds": 1, "training": training})
    with pytest.raises(StudyError, match="found 2 settings with which training could not") as told:
        plan(study, H100)
    assert "federation.training.num_tokens: expected at least one row of 64" in str(told.value)
    assert "federation.training.rank: expected at most 8, the model's narrowest" in str(told.value)


def test_a_model_that_is_not_at_hand_needs_its_sizes(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="expected a model at hand or its sizes in `shape`"):
        plan(load(tmp_path, shape=None), H100)
    with pytest.raises(StudyError, match="the sizes of a graft go to"):
        load(tmp_path, model=None, graft=GRAFT)


GRAFT: dict[str, Any] = {
    "family": {"base": "nobody/base", "instruct": "nobody/instruct"},
    "departments": {"hr": {"corpus": ["hr.txt"]}},
    "pretrain": {"num_tokens": 512, "learning_rate": 1e-3},
}


def test_a_graft_is_counted_before_its_arms(tmp_path: Path) -> None:
    family = {**GRAFT["family"], "shape": SHAPE}
    study = load(tmp_path, model=None, shape=None, graft={**GRAFT, "family": family})
    planned = plan(study, H100)
    assert planned.trainings[0].stage == "pre-training"
    assert (planned.trainings[0].num_runs, planned.num_grafts) == (2, 2)
    assert planned.disk["newer bases and grafts"] == 4 * 2 * planned.shape.num_parameters
