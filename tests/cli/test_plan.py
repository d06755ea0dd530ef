"""`fedgraft study plan`: a table in plain words, and nothing on disk."""

from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_main import fedgraft, refused
from tests.study.small import write_study

STUDIES = Path(__file__).parents[2] / "studies"


def of_the_pocket(folder: Path, **changes: Any) -> Path:
    """A small study of the embedded family; its text is not there, which a plan does not need."""
    family = {"base": "pocket:base", "instruct": "pocket:instruct"}
    asked = {"dialogues": None, "questions": None, "replay": None, "scale": None}
    whole = {"family": family, "departments": {"hr": {"corpus": ["hr.jsonl"]}}} | asked
    return write_study(folder / "study.yaml", **whole | changes)


def test_a_plan_names_parameters_steps_memory_time_and_what_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDGRAFT_DATA", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    options = ("--hardware", "h100", "--processes", 8)
    done = fedgraft("study", "plan", STUDIES / "llama3_8b.yaml", *options)
    assert done.exit_code == 0, done.output
    for words in (
        "8,030,261,248 parameters in 291 tensors",
        "8 x H100 80 GB, 45% of 989 TFLOP/s each",
        "full, recompute *",
        "244,096 x 4,096",
        "100M, 500M, 1B",
        "FLOPs, 6 N T (the paper)",
        "4.82e+19",
        "10.0 hours of training",
        "../runs/news/train.jsonl",
        "make text with `fedgraft corpus`",
    ):
        assert words in done.output
    assert list(tmp_path.iterdir()) == []


def test_a_study_whose_data_are_missing_is_planned_and_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDGRAFT_DATA", str(tmp_path / "nowhere"))
    file = STUDIES / "qwen2_0.5b.yaml"
    planned = fedgraft("study", "plan", file)
    assert planned.exit_code == 0, planned.output
    assert "494,032,768 parameters in 290 tensors" in planned.output
    assert "data:dept/hr.jsonl yet" in planned.output
    assert "found nothing there" in refused(fedgraft("study", "run", file, "--out", tmp_path / "o"))


def test_the_machine_at_hand_is_measured_when_it_is_asked_for(tmp_path: Path) -> None:
    done = fedgraft("study", "plan", of_the_pocket(tmp_path), "--hardware", "this")
    assert done.exit_code == 0, done.output
    assert "2,362,304 parameters in 50 tensors" in done.output
    assert "(from its config and headers)" in done.output


def test_arms_that_do_the_same_work_share_a_column_of_the_plan() -> None:
    done = fedgraft("study", "plan", STUDIES / "selection.yaml")
    assert done.exit_code == 0, done.output
    tables = [line for line in done.output.splitlines() if line.strip().startswith("runs")]
    # reading; fedit with the four of 5%; the two other budgets; all examples at one place
    assert [line.split()[1:] for line in tables] == [["5", "1,500", "1,200", "2,100"], ["25"]]
    names = " ".join(done.output.split())
    assert all(arm in names for arm in ("fedit", "random-0.5", "coverage-1.5", "pooled-1.5"))


def test_a_share_that_cannot_be_is_one_message(tmp_path: Path) -> None:
    file = of_the_pocket(tmp_path)
    assert "at most 1, found 45" in refused(fedgraft("study", "plan", file, "--share", 45))


def test_a_budget_below_one_row_is_refused_with_its_bound(tmp_path: Path) -> None:
    file = of_the_pocket(tmp_path, pretrain={"num_tokens": 50, "learning_rate": 1e-3})
    message = refused(fedgraft("study", "plan", file))
    assert "pretrain.num_tokens: expected at least one row of 64 tokens, found 50; rai" in message


def test_unknown_hardware_is_a_usage_error() -> None:
    result = fedgraft("study", "plan", STUDIES / "quickstart.yaml", "--hardware", "abacus")
    assert result.exit_code == 2
    assert "a100" in result.stderr


def test_a_plan_of_a_selection_names_its_arms_once_and_what_they_hold_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDGRAFT_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setenv("COLUMNS", "220")
    file = STUDIES / "selection_dolly_qwen2_1.5b.yaml"
    done = fedgraft("study", "plan", file, "--hardware", "h100")
    assert done.exit_code == 0, done.output
    for words in (
        "Qwen/Qwen2-1.5B: 1,543,714,304 parameters in 338 tensors",
        "aligned-new",
        "clients' adapters, while an arm runs",
        "the text is not there, so each client is taken to train as long as it may",
        "data:instruct/databricks-dolly-15k.jsonl yet",
    ):
        assert words in done.output
    assert done.output.count("memory      of") == 1
    assert "graft" not in done.output.replace("FEDGRAFT", "").replace("fedgraft", "")


def test_with_prices_a_plan_tells_energy_and_money(tmp_path: Path) -> None:
    prices = {"currency": "EUR", "watts": 700, "per_kwh": 0.3}
    done = fedgraft("study", "plan", of_the_pocket(tmp_path, prices=prices))
    assert done.exit_code == 0, done.output
    assert "kWh of training" in done.output
    assert " EUR of training" in done.output
    without = fedgraft("study", "plan", of_the_pocket(tmp_path))
    assert "kWh" not in without.output


def test_prices_with_an_unknown_key_are_refused_by_name(tmp_path: Path) -> None:
    prices = {"currency": "EUR", "per_hour": 2.5, "per_month": 9}
    assert "prices.per_month" in refused(
        fedgraft("study", "plan", of_the_pocket(tmp_path, prices=prices))
    )
