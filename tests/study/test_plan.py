"""A plan says what a study would take, exactly where it can be known, and touches nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.study.small import write_material, write_study
from tests.study.test_shape import LLAMA3, QWEN2

from fedgraft.errors import StudyError
from fedgraft.pocket.company import write_company
from fedgraft.pocket.weights import folder as pocket
from fedgraft.study import kinds
from fedgraft.study.cost import graft_flops, tuning_ratio
from fedgraft.study.machine import HARDWARE, Machine, this_machine
from fedgraft.study.plan import memory_choices, plan
from fedgraft.study.recipes import LineageStudy
from fedgraft.study.shape import Shape
from fedgraft.study.study import Study
from fedgraft.testing import save_tiny
from fedgraft.weights.checkpoint import Checkpoint, fetched

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))
TRAINS_NOTHING = {
    "table3_llama3_8b",
    "table3_qwen2_1.5b",
    "table4_llama3_8b",
    "cross_family_qwen_0.5b",
}
H100 = HARDWARE["h100"]
HUB = {"base": "nobody/base-of-no-one", "instruct": "nobody/instruct-of-no-one"}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data as a plan may find it: no text, and a model in place of the encoder."""
    folder = tmp_path_factory.mktemp("places")
    save_tiny(folder / "data" / "weights" / "stories260K-hf")
    return {
        "pocket": pocket,
        "company": write_company(folder / "company"),
        "data": folder / "data",
        "place": write_material(folder / "material"),
    }


def of_the_project(name: str, places: dict[str, Path]) -> Study:
    return Study.load(STUDIES[0].with_name(f"{name}.yaml"), places, dry=True)


def small(tmp_path: Path, places: dict[str, Path], **changes: Any) -> Study:
    return Study.load(write_study(tmp_path / "study.yaml", **changes), places, dry=True)


@pytest.mark.parametrize("hardware", HARDWARE)
@pytest.mark.parametrize("file", STUDIES, ids=lambda file: str(file.stem))
def test_every_study_of_the_project_is_planned(
    file: Path, hardware: str, places: dict[str, Path]
) -> None:
    study = kinds.load(file, places, dry=True)
    planned = kinds.plan(study, HARDWARE[hardware])
    assert planned.study == file.stem
    assert (planned.seconds > 0) != (file.stem in TRAINS_NOTHING)
    assert planned.num_grafts > 0 or study.kind in ("departments", "selection")
    assert planned.flops == sum(t.num_runs * t.operations.total for t in planned.trainings)
    for training in planned.trainings:
        assert training.num_tokens == training.num_rows * training.row_length
        chosen = [m for m in memory_choices(planned, training).values() if m == training.memory]
        assert chosen


@pytest.mark.parametrize(
    ("name", "parameters", "tokens"),
    [("qwen2_0.5b", 494_032_768, 16_000_000), ("llama3_8b", 8_030_261_248, 1_000_000_000)],
)
def test_the_real_sized_studies_have_the_known_models_and_budgets(
    name: str, parameters: int, tokens: int, places: dict[str, Path]
) -> None:
    study = of_the_project(name, places)
    planned = plan(study, H100)
    pretraining = planned.trainings[0]
    assert planned.shape.num_parameters == parameters
    assert pretraining.num_tokens == pytest.approx(tokens, rel=0.001)
    assert pretraining.paper_flops == 6 * parameters * pretraining.num_tokens
    assert pretraining.num_runs == 2 * len(study.seeds)
    assert study.row_length == 4096


def test_the_study_of_llama_3_has_the_papers_budgets_and_its_ratio_of_2048(
    places: dict[str, Path],
) -> None:
    study = of_the_project("llama3_8b", places)
    planned = plan(study, H100, num_processes=8)
    assert study.tuning
    assert tuning_ratio(study.tuning, study.pretrain.budgets[0]) == 2048
    assert planned.tuning_ratio == pytest.approx(204.8)
    assert planned.trainings[0].checkpoints == (10**8, 5 * 10**8, 10**9)
    assert planned.trainings[0].bytes_left == 3 * 2 * 8_030_261_248
    assert planned.notes == ()
    assert "../runs/news/train.jsonl" in planned.not_there


@pytest.mark.parametrize(
    ("name", "columns", "num_checkpoints"),
    [
        ("table2_llama3_8b", 11, 3),
        ("table3_llama3_8b", 6, 0),
        ("table3_qwen2_1.5b", 6, 0),
        ("table4_llama3_8b", 3, 0),
    ],
)
def test_the_papers_tables_have_a_study_with_each_of_their_columns(
    name: str, columns: int, num_checkpoints: int, places: dict[str, Path]
) -> None:
    study = kinds.load(STUDIES[0].with_name(f"{name}.yaml"), places, dry=True)
    assert isinstance(study, LineageStudy)
    assert len(study.arms) == columns
    planned = plan(study, H100, num_processes=8)
    assert sum(len(one.checkpoints) for one in planned.trainings) == num_checkpoints
    assert all(one.num_runs == 2 for one in planned.trainings)
    parameters = {"llama": 8_030_261_248, "qwen2": 1_543_714_304}
    assert planned.shape.num_parameters == parameters[planned.shape.model_type]


def test_the_sizes_of_qwen2_are_those_that_its_makers_state(places: dict[str, Path]) -> None:
    study = kinds.load(STUDIES[0].with_name("sizes_qwen2.yaml"), places, dry=True)
    assert isinstance(study, LineageStudy)
    for name, arm in study.arms.items():
        shape = study.shape_of(study.root(name))
        assert shape
        assert shape.num_parameters == arm.at


def test_models_residuals_and_grafts_of_several_sizes_are_counted_each_in_its_own(
    places: dict[str, Path],
) -> None:
    study = kinds.load(STUDIES[0].with_name("sizes_qwen2.yaml"), places, dry=True)
    assert isinstance(study, LineageStudy)
    planned = plan(study, H100)
    numbers = 494_032_768 + 1_543_714_304 + 7_615_616_512
    assert planned.disk["models to fetch"] == 2 * 2 * numbers
    assert planned.disk["residual"] == 4 * numbers
    assert planned.disk["grafts"] == 2 * 7_615_616_512  # each goes once it is scored
    assert planned.graft_flops == sum(
        len(study.seeds) * graft_flops(count)
        for count in (494_032_768, 1_543_714_304, 7_615_616_512)
    )


def test_llama_3_on_one_h100_does_not_fit_and_the_plan_says_what_would(
    places: dict[str, Path],
) -> None:
    (note,) = plan(of_the_project("llama3_8b", places), H100).notes
    assert note.startswith("pre-training does not fit: ")
    assert "a process, 80.0 GB on H100 80 GB; 4 processes with gradient_checkpointing: true" in note
    assert plan(of_the_project("llama3_8b", places), H100, num_processes=4).notes == ()


def test_what_does_not_fit_is_told_with_the_first_remedy_that_helps(
    tmp_path: Path, places: dict[str, Path]
) -> None:
    def note(rows: int, machine: Machine, **changes: Any) -> str:
        study = small(tmp_path, places, adapters=None, pretrain=settings(rows) | changes)
        return " ".join(n for n in plan(study, machine).notes if "fit" in n)

    def settings(rows: int) -> dict[str, Any]:
        return {"num_tokens": 10**6, "learning_rate": 1e-3, "batch_tokens": 64 * rows}

    def holds(rows: int, **changes: Any) -> Machine:
        study = small(tmp_path, places, adapters=None, pretrain=settings(rows) | changes)
        return replace(H100, memory_bytes=plan(study, H100).trainings[0].memory.total)

    recompute = {"gradient_checkpointing": True}
    assert note(8, holds(8)) == ""
    assert "set micro_batch_rows: 1 (the result" in note(8, holds(1))
    assert "set gradient_checkpointing: true and micro" in note(8, holds(1, **recompute))
    assert "take LoRA, more rows a step for more" in note(1, replace(H100, memory_bytes=1000))


def test_a_model_at_hand_is_read_from_its_headers(tmp_path: Path, places: dict[str, Path]) -> None:
    planned = plan(small(tmp_path, places), H100)
    checkpoint = Checkpoint.open(places["place"] / "base")
    assert planned.at_hand
    assert planned.shape.num_parameters == checkpoint.num_parameters
    assert len(planned.shape.tensors) == len(checkpoint.tensors)
    assert planned.not_there == ()


def test_steps_and_tokens_are_those_that_training_takes(
    tmp_path: Path, places: dict[str, Path]
) -> None:
    """1,024 tokens in rows of 64, two rows a step; two departments and two seeds."""
    pretraining, adapters = plan(small(tmp_path, places), H100).trainings
    assert (pretraining.num_rows, pretraining.num_steps, pretraining.num_runs) == (16, 8, 4)
    assert (adapters.num_rows, adapters.num_steps, adapters.num_runs) == (4, 2, 4)
    assert (adapters.rank, pretraining.rank) == (2, None)


def test_a_plan_is_pure_and_leaves_nothing_behind(tmp_path: Path, places: dict[str, Path]) -> None:
    study = small(tmp_path, places)

    def everything() -> list[tuple[Path, int]]:
        found = [*tmp_path.rglob("*"), *places["place"].rglob("*")]
        return sorted((path, path.stat().st_mtime_ns) for path in found)

    before = everything()
    assert plan(study, H100) == plan(study, H100)
    assert everything() == before


def test_twice_the_processes_or_twice_the_share_take_half_the_time(
    tmp_path: Path, places: dict[str, Path]
) -> None:
    study = small(tmp_path, places)
    one = plan(study, H100, share=0.4)
    assert plan(study, H100, share=0.8).seconds == pytest.approx(one.seconds / 2)
    assert plan(study, H100, num_processes=2, share=0.4).seconds == pytest.approx(one.seconds / 2)


def test_checkpointing_costs_time_and_lora_saves_memory(
    tmp_path: Path, places: dict[str, Path]
) -> None:
    settings = {"num_tokens": 1024, "learning_rate": 1e-3, "batch_tokens": 128}

    def run(**changes: Any) -> Any:
        return plan(small(tmp_path, places, pretrain=settings | changes), H100).trainings[0]

    plain, again, lora = run(), run(gradient_checkpointing=True), run(lora={"rank": 2})
    assert again.seconds > plain.seconds
    assert again.memory.activations < plain.memory.activations
    assert lora.memory.optimizer < plain.memory.optimizer
    assert lora.num_trained == Shape.of(
        Checkpoint.open(places["place"] / "base")
    ).adapter_parameters(2)


def test_float32_is_planned_at_the_rate_of_float32(tmp_path: Path, places: dict[str, Path]) -> None:
    settings = {"num_tokens": 1024, "learning_rate": 1e-3, "batch_tokens": 128}
    both = [
        plan(small(tmp_path, places, pretrain=settings | {"precision": precision}), H100)
        for precision in ("float32", "bfloat16")
    ]
    first, second = (one.trainings[0].seconds for one in both)
    assert first / second == pytest.approx(989 / 67)


def test_all_settings_that_could_not_start_are_told_at_once(
    tmp_path: Path, places: dict[str, Path]
) -> None:
    pretrain = {"num_tokens": 63, "learning_rate": 1e-3, "budgets": [20]}
    adapters = {"num_tokens": 640, "learning_rate": 1e-3, "batch_tokens": 192, "rank": 33}
    with pytest.raises(StudyError) as error:
        plan(small(tmp_path, places, pretrain=pretrain, adapters=adapters), H100)
    message = str(error.value)
    assert "study small: found 3 settings with which training could not start" in message
    for fault in (
        "pretrain.num_tokens: expected at least one row of 64 tokens, found 63; raise it",
        "pretrain.budgets: expected token counts from one row (64) to below num_tokens (63), ",
        "adapters.rank: expected at most 16, the model's narrowest layer, found 33; choose a sma",
    ):
        assert fault in message


def test_a_budget_that_the_run_does_not_pass_is_refused(
    tmp_path: Path, places: dict[str, Path]
) -> None:
    pretrain = {"num_tokens": 640, "learning_rate": 1e-3, "budgets": [64, 640]}
    with pytest.raises(StudyError, match=r"found 1 settings .*\n  pretrain.budgets: .*found 640"):
        plan(small(tmp_path, places, pretrain=pretrain), H100)


@pytest.mark.parametrize(
    ("settings", "processes", "message"),
    [
        ({"batch_tokens": 192}, 2, "the 3 rows of a step to be shared out evenly among 2 proc"),
        ({"micro_batch_rows": 3, "batch_tokens": 256}, 1, "a divisor of the 4 rows that a process"),
        ({"micro_batch_rows": 3, "batch_tokens": 512}, 2, "found 3; choose a divisor"),
    ],
)
def test_rows_that_cannot_be_shared_out_are_refused(
    settings: dict[str, Any],
    processes: int,
    message: str,
    tmp_path: Path,
    places: dict[str, Path],
) -> None:
    pretrain = {"num_tokens": 1024, "learning_rate": 1e-3} | settings
    study = small(tmp_path, places, pretrain=pretrain, adapters=None)
    with pytest.raises(StudyError, match=message):
        plan(study, H100, num_processes=processes)


def test_a_model_that_is_neither_at_hand_nor_described_is_refused(
    tmp_path: Path, places: dict[str, Path]
) -> None:
    study = small(tmp_path, places, family=HUB)
    with pytest.raises(StudyError, match=r"sizes in `family.shape`, found nobody/base-of-no-one "):
        plan(study, H100)


def test_a_described_model_needs_not_be_at_hand(tmp_path: Path, places: dict[str, Path]) -> None:
    planned = plan(small(tmp_path, places, family=HUB | {"shape": QWEN2}), H100)
    assert not planned.at_hand
    assert planned.shape == Shape.model_validate(QWEN2)
    assert planned.not_there == tuple(HUB.values())
    assert planned.disk["models to fetch"] == 2 * 2 * 494_032_768


def test_sizes_that_are_not_the_checkpoints_are_refused_with_both(
    tmp_path: Path, places: dict[str, Path]
) -> None:
    family = {"base": "place:base", "instruct": "place:instruct", "shape": LLAMA3}
    with pytest.raises(
        StudyError, match=r"family.shape.model_type: expected qwen2, which .*base has, found llama"
    ):
        plan(small(tmp_path, places, family=family), H100)


def test_sizes_that_are_the_checkpoints_are_welcome(
    tmp_path: Path, places: dict[str, Path]
) -> None:
    shape = Shape.of(Checkpoint.open(places["place"] / "base")).model_dump(exclude_none=True)
    family = {"base": "place:base", "instruct": "place:instruct", "shape": shape}
    assert plan(small(tmp_path, places, family=family), H100).at_hand


def test_long_rows_and_short_batches_are_noted(tmp_path: Path, places: dict[str, Path]) -> None:
    pretrain = {"num_tokens": 10_000, "learning_rate": 1e-3, "batch_tokens": 100}
    adapters = {"num_tokens": 1000, "learning_rate": 1e-3, "rank": 2}
    notes = plan(
        small(tmp_path, places, row_length=512, pretrain=pretrain, adapters=adapters), H100
    ).notes
    assert any("rows of 512 tokens are longer than the model's 256 positions" in n for n in notes)
    assert any("batch_tokens is below a row (512)" in note for note in notes)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.01])
def test_a_share_that_no_machine_reaches_is_refused(
    share: float, tmp_path: Path, places: dict[str, Path]
) -> None:
    with pytest.raises(StudyError, match="above 0 and at most 1, found"):
        plan(small(tmp_path, places), H100, share=share)


def test_no_process_is_refused(tmp_path: Path, places: dict[str, Path]) -> None:
    with pytest.raises(StudyError, match="expected at least 1 process, found 0"):
        plan(small(tmp_path, places), H100, num_processes=0)


def test_this_machine_is_measured() -> None:
    machine = this_machine()
    assert 1e8 < machine.flops("float32") < 1e16
    assert machine.memory_bytes > 10**8


def test_a_model_of_the_hub_that_was_not_fetched_is_not_asked_for(tmp_path: Path) -> None:
    assert fetched(HUB["base"]) is None
    assert fetched(tmp_path) == tmp_path
    assert fetched("no name of the hub at all") is None


def test_a_study_of_departments_pre_trains_the_base_alone_and_counts_every_client_and_round(
    tmp_path: Path, places: dict[str, Path]
) -> None:
    training = {"num_tokens": 256, "learning_rate": 1e-3, "batch_tokens": 128, "rank": 2}
    federation = {"partition": {"num_clients": 3}, "num_rounds": 4, "training": training}
    changes = {"adapters": None, "scale": None, "tuning": None}
    rules = {**federation, "rules": ["fedavg", "ffa"]}
    pretraining, adapters = plan(
        small(tmp_path, places, federation=rules, **changes), H100
    ).trainings
    assert pretraining.num_runs == 2  # seeds
    assert adapters.num_runs == (2 + 4) * 2 * 3 * 4 * 2  # arms, departments, clients, rounds, seeds
    pretraining, adapters = plan(
        small(tmp_path, places, federation=federation, **changes), H100
    ).trainings
    assert pretraining.num_runs == 4
    assert adapters.num_runs == 2 * 3 * 4 * 2
