"""`evaluate --suite`: the paper's benchmarks from the command line, and what it refuses."""

import json
from pathlib import Path

import pytest
from tests.cli.test_main import fedgraft, refused
from tests.evaluation.exams import write_exams

from fedgraft.testing import save_tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_exams(tmp_path_factory.mktemp("exams"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


def test_benchmarks_end_with_their_scores_how_they_were_asked_and_the_scorecard(
    data: Path, model: Path, tmp_path: Path
) -> None:
    card = tmp_path / "scores" / "card.json"
    command = (
        *("evaluate", model, "--task", "mmlu", "--task", "piqa", "--benchmark-data", data),
        *("--limit", 3, "--fit", "--kept", tmp_path / "kept", "--out", card),
    )
    done = fedgraft(*command)
    assert done.exit_code == 0, done.output
    assert "benchmark/piqa/acc_norm" in done.stdout
    assert "benchmark/mmlu/acc " in done.stdout
    assert "benchmark/mmlu/acc/anatomy" not in done.stdout
    assert "mmlu: with 5 shots 5 of 5 questions take more" in done.stdout
    assert "mmlu: 5 of 6 questions, 4 of 5 shots" in done.stdout
    assert f"scorecard   {card}" in done.stdout
    written = json.loads(card.read_text())
    assert "benchmark/mmlu/acc/anatomy" in written["scores"]
    assert written["benchmarks"]["piqa"]["num_rows"] == 3
    assert "piqa: finished before" in fedgraft(*command).stdout


def test_what_is_for_benchmarks_is_refused_without_one(model: Path, tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_text("The heron stands in the river.")
    done = fedgraft("evaluate", model, "--data", tmp_path / "page.txt", "--limit", 3)
    assert done.exit_code == 2, done.output
    assert "--limit is for benchmarks, found none" in " ".join(done.output.split())


def test_files_that_cannot_be_read_are_told_before_any_benchmark_is_asked(
    data: Path, model: Path, tmp_path: Path
) -> None:
    done = fedgraft(
        *("evaluate", model, "--task", "piqa", "--benchmark-data", data, "--limit", 2),
        *("--kept", tmp_path / "kept", "--questions", tmp_path / "none.jsonl"),
    )
    assert "none.jsonl" in refused(done)
    assert not (tmp_path / "kept").exists()


def test_nobody_is_asked_for_an_answer_of_no_tokens(model: Path) -> None:
    done = fedgraft("chat", model, "--max-new-tokens", 0)
    assert done.exit_code == 2, done.output


def test_benchmarks_and_texts_of_ones_own_make_one_scorecard(
    data: Path, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "page.txt").write_text("The heron stands in the river.")
    done = fedgraft(
        *("evaluate", model, "--task", "piqa", "--benchmark-data", data, "--limit", 2),
        *("--kept", tmp_path / "kept", "--data", f"hr={tmp_path / 'page.txt'}"),
    )
    assert done.exit_code == 0, done.output
    assert "benchmark/piqa/acc " in done.stdout
    assert "perplexity/hr/nats_per_token" in done.stdout


def test_a_model_with_an_adapter_on_is_another_model(
    data: Path, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "page.txt").write_text("The heron stands in the river. " * 20)
    made = fedgraft(
        *("adapt", model, "--department", "hr", "--data", tmp_path / "page.txt", "--tokens", "1k"),
        *("--row-length", 64, "--out", tmp_path / "adapter"),
    )
    assert made.exit_code == 0, made.output
    asked = ("evaluate", model, "--task", "winogrande", "--benchmark-data", data)
    kept = ("--kept", tmp_path / "kept")
    alone, adapted = (
        fedgraft(*asked, *kept, *adapter) for adapter in ((), ("--adapter", tmp_path / "adapter"))
    )
    assert (alone.exit_code, adapted.exit_code) == (0, 0), adapted.output
    assert "finished before" not in adapted.stdout
    assert len(list((tmp_path / "kept").glob("*/winogrande-*.json"))) == 2


def test_an_unknown_task_is_refused_with_the_nearest(model: Path) -> None:
    message = refused(fedgraft("evaluate", model, "--task", "hellaswagg"))
    assert "did you mean hellaswag?" in message


def test_a_context_too_short_is_refused_with_the_shots_that_fit(
    data: Path, model: Path, tmp_path: Path
) -> None:
    message = refused(
        fedgraft(
            *("evaluate", model, "--suite", "paper", "--benchmark-data", data),
            *("--kept", tmp_path / "kept"),
        )
    )
    assert "what fits: 4 of 5 shots" in message
    assert "Run what fits with --fit" in message


def test_an_adapter_is_not_read_by_vllm_and_that_is_said(model: Path, tmp_path: Path) -> None:
    message = refused(
        fedgraft("evaluate", model, "--suite", "paper", "--backend", "vllm", "--adapter", tmp_path)
    )
    assert "expected a checkpoint alone for --backend vllm" in message
