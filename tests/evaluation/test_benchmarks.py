"""Laws of the benchmarks' names and files: every row of the paper has a score, faults are named."""

import os
from pathlib import Path

import pytest
from tests.evaluation.exams import SUBJECTS, write_exams

from fedgraft.errors import EvaluationError
from fedgraft.evaluation.benchmarks import PAPER, PAPER_ROWS, chosen, find_files

DATA = Path(os.environ.get("FEDGRAFT_DATA", "../shared/data")) / "bench"


def test_every_row_of_the_papers_tables_has_a_score_of_a_benchmark_and_every_score_a_row() -> None:
    scores = [benchmark.score_name(key) for benchmark in PAPER.values() for key in benchmark.scores]
    assert sorted(PAPER_ROWS.values()) == sorted(scores)
    assert len(PAPER_ROWS) == len(set(scores)) == 16


def test_three_benchmarks_are_shown_five_answers_first_and_the_others_none() -> None:
    shown = {name: benchmark.num_shots for name, benchmark in PAPER.items() if benchmark.num_shots}
    assert shown == {"mmlu": 5, "mmlu_pro": 5, "gsm8k": 5}


def test_benchmarks_are_chosen_by_name_and_come_in_the_papers_order() -> None:
    assert [b.name for b in chosen(["piqa", "mmlu", "piqa"])] == ["mmlu", "piqa"]
    assert [b.name for b in chosen()] == list(PAPER)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gsmk8", "did you mean gsm8k"),
        ("MMLU-Pro", "did you mean mmlu_pro or mmlu"),
        ("xyzzy", "choose among: ifeval, mmlu,"),
    ],
)
def test_an_unknown_benchmark_is_refused_with_the_nearest_names(name: str, words: str) -> None:
    with pytest.raises(EvaluationError, match=f"found '{name}'; {words}"):
        chosen(["piqa", name])


def test_files_are_found_by_split_and_those_of_subjects_by_subject(tmp_path: Path) -> None:
    folder = write_exams(tmp_path)
    assert find_files(PAPER["piqa"], folder) == {"": {"validation": folder / "piqa_valid.jsonl"}}
    mmlu = find_files(PAPER["mmlu"], folder)
    assert tuple(mmlu) == SUBJECTS
    assert mmlu["anatomy"]["dev"] == folder / "mmlu" / "anatomy_dev.jsonl"
    assert find_files(PAPER["mmlu_pro"], folder)[""].keys() == {"test"}


@pytest.mark.parametrize(
    ("benchmark", "missing"),
    [("gsm8k", "gsm8k_train.jsonl"), ("mmlu", "mmlu/management_dev.jsonl"), ("piqa", "*.jsonl")],
)
def test_a_missing_file_is_named_with_its_benchmark(
    tmp_path: Path, benchmark: str, missing: str
) -> None:
    folder = write_exams(tmp_path)
    for file in [*folder.glob(missing)]:
        file.unlink()
    with pytest.raises(EvaluationError, match=f"for the benchmark {benchmark}, found none; put"):
        find_files(PAPER[benchmark], folder)


def test_a_folder_without_mmlu_is_told_what_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"expected one file mmlu/\*_test\.jsonl"):
        find_files(PAPER["mmlu"], tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no such folder; name another --benchmark-data"):
        find_files(PAPER["piqa"], tmp_path / "nowhere")


def test_two_files_of_one_split_are_refused_by_name(tmp_path: Path) -> None:
    folder = write_exams(tmp_path)
    (folder / "piqa_valid_2.jsonl").write_text("{}\n")
    with pytest.raises(EvaluationError, match=r"piqa_valid\.jsonl and piqa_valid_2\.jsonl; leave"):
        find_files(PAPER["piqa"], folder)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", "line 5: expected a JSON object with goal, .*, found Expecting property name"),
        ('{"goal": "x", "sol1": "y"}', "line 5: .*, found nothing under sol2, label; fetch"),
        ("[1]", "line 5: .*, found nothing under goal, sol1, sol2, label"),
        ("\udcff", "line 5: .*, found 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    folder = write_exams(tmp_path)
    with (folder / "piqa_valid.jsonl").open("a", errors="surrogateescape") as file:
        file.write(line + "\n")
    with pytest.raises(EvaluationError, match=words):
        find_files(PAPER["piqa"], folder)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    folder = write_exams(tmp_path)
    (folder / "piqa_valid.jsonl").write_text("")
    with pytest.raises(EvaluationError, match="found an empty file"):
        find_files(PAPER["piqa"], folder)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmarks at {DATA}: set FEDGRAFT_DATA")
def test_the_real_files_of_all_nine_are_found() -> None:
    found = {name: find_files(benchmark, DATA) for name, benchmark in PAPER.items()}
    assert len(found["mmlu"]) == 22
    assert all(found.values())
