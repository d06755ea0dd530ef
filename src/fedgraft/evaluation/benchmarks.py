"""The nine benchmarks of arXiv 2410.10739: shots, scores, local files, rows of its tables.

Knows no lm_eval, so that tables and reports look names up without it; `harness.py` runs them.

benchmark/<name>/<score>            e.g. benchmark/gsm8k/exact_match_strict
benchmark/<name>/<score>/<part>     the same for one subject of MMLU or MMLU-Pro
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pydantic import BaseModel, ConfigDict

from fedgraft.errors import EvaluationError


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """What is asked, how often it is shown first, and what comes out."""

    name: str
    """As lm-eval names the task."""
    scores: Mapping[str, str]
    """lm-eval's `metric,filter` -> the name of our score."""
    num_shots: int = 0
    files: Mapping[str, str]
    """Split -> the file's name below a folder of benchmark data: a pattern that one file matches,
    or, with `{part}`, one file for each subject."""
    optional: str = ""
    """The split that may be missing: shots then come from the head of the file that is scored."""
    fields: tuple[str, ...]
    """What each line of those files holds."""

    def score_name(self, key: str) -> str:
        """`acc,none` -> `benchmark/piqa/acc`."""
        return f"benchmark/{self.name}/{self.scores[key]}"


ACC = MappingProxyType({"acc,none": "acc"})
ACC_AND_NORM = MappingProxyType({"acc,none": "acc", "acc_norm,none": "acc_norm"})
PAPER: Mapping[str, Benchmark] = MappingProxyType(
    {
        benchmark.name: benchmark
        for benchmark in (
            Benchmark(
                name="ifeval",
                scores={
                    f"{level}_level_{how}_acc,none": f"{level}_level_{how}_acc"
                    for level in ("inst", "prompt")
                    for how in ("loose", "strict")
                },
                files={"train": "ifeval_input_data*.jsonl"},
                fields=("key", "prompt", "instruction_id_list", "kwargs"),
            ),
            Benchmark(
                name="mmlu",
                scores=ACC,
                num_shots=5,
                files={"test": "mmlu/{part}_test.jsonl", "dev": "mmlu/{part}_dev.jsonl"},
                fields=("question", "choices", "answer"),
            ),
            Benchmark(
                name="mmlu_pro",
                scores={"exact_match,custom-extract": "exact_match"},
                num_shots=5,
                files={
                    "test": "mmlu_pro_test*.jsonl",
                    "validation": "mmlu_pro_validation*.jsonl",
                },
                optional="validation",
                fields=("question", "options", "answer", "category", "cot_content"),
            ),
            Benchmark(
                name="gsm8k",
                scores={
                    "exact_match,flexible-extract": "exact_match_flexible",
                    "exact_match,strict-match": "exact_match_strict",
                },
                num_shots=5,
                files={"train": "gsm8k_train*.jsonl", "test": "gsm8k_test*.jsonl"},
                fields=("question", "answer"),
            ),
            Benchmark(
                name="winogrande",
                scores=ACC,
                files={"validation": "winogrande_xl_dev*.jsonl"},
                fields=("sentence", "option1", "option2", "answer"),
            ),
            Benchmark(
                name="hellaswag",
                scores=ACC_AND_NORM,
                files={"validation": "hellaswag_val*.jsonl"},
                fields=("ctx_a", "ctx_b", "activity_label", "endings", "label"),
            ),
            Benchmark(
                name="arc_easy",
                scores=ACC_AND_NORM,
                files={
                    "test": "arc_easy_test*.jsonl",
                    "validation": "arc_easy_validation*.jsonl",
                },
                fields=("question", "choices", "answerKey"),
            ),
            Benchmark(
                name="piqa",
                scores=ACC_AND_NORM,
                files={"validation": "piqa_valid*.jsonl"},
                fields=("goal", "sol1", "sol2", "label"),
            ),
            Benchmark(
                name="truthfulqa_mc2",
                scores=ACC,
                files={"validation": "truthfulqa_mc*.jsonl"},
                fields=("question", "mc1_targets", "mc2_targets"),
            ),
        )
    }
)
"""The paper's suite by name: MMLU, MMLU-Pro and GSM8K with five shots, all others with none."""

PAPER_ROWS: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("IFEval", "ILL_acc"): "benchmark/ifeval/inst_level_loose_acc",
        ("IFEval", "ILS_acc"): "benchmark/ifeval/inst_level_strict_acc",
        ("IFEval", "PLL_acc"): "benchmark/ifeval/prompt_level_loose_acc",
        ("IFEval", "PLS_acc"): "benchmark/ifeval/prompt_level_strict_acc",
        ("MMLU", "acc"): "benchmark/mmlu/acc",
        ("MMLU-Pro", "EM"): "benchmark/mmlu_pro/exact_match",
        ("GSM8K", "EM"): "benchmark/gsm8k/exact_match_flexible",
        ("GSM8K", "strict-EM"): "benchmark/gsm8k/exact_match_strict",
        ("Winogrande", "acc"): "benchmark/winogrande/acc",
        ("Hellaswag", "acc"): "benchmark/hellaswag/acc",
        ("Hellaswag", "acc_n"): "benchmark/hellaswag/acc_norm",
        ("ARC_easy", "acc"): "benchmark/arc_easy/acc",
        ("ARC_easy", "acc_n"): "benchmark/arc_easy/acc_norm",
        ("Piqa", "acc"): "benchmark/piqa/acc",
        ("Piqa", "acc_n"): "benchmark/piqa/acc_norm",
        ("TruthfulQA", "mc2"): "benchmark/truthfulqa_mc2/acc",
    }
)
"""The 16 rows of the paper's tables 2, 3 and 4, in its order and words -> the score of each.

The paper prints per cent; a score is a share.
"""


class Asked(BaseModel):
    """How a benchmark was asked, which decides on what its scores may be set beside."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: tuple[str, ...]
    """Of the task, as lm-eval numbers them; a group's first, then its subjects'."""
    lm_eval: str
    data: str
    """The content hash of the local files, or `hub`."""
    num_rows: int
    """Questions that were asked."""
    num_rows_held: int
    """Questions that there are."""
    num_shots: int
    num_shots_wanted: int
    answer_tokens: int | None
    """Longest answer; None where answers are given and the model chooses among them."""
    answer_tokens_wanted: int | None
    num_cut: int
    """Questions whose beginning was cut off because even so they were too long."""
    shots_without_reasoning: bool
    """MMLU-Pro without its validation file: shots show the answer's letter alone."""
    chat_template: bool
    precision: str
    backend: str
    batch_size: int | None
    """None where the backend found it by trying."""

    @property
    def shortcomings(self) -> str:
        """What was left out, shortened or replaced, in words; empty where nothing was."""
        answer, wanted = self.answer_tokens or 0, self.answer_tokens_wanted or 0
        parts = (
            (self.num_rows < self.num_rows_held)
            * f"{self.num_rows:,} of {self.num_rows_held:,} questions",
            (self.num_shots < self.num_shots_wanted)
            * f"{self.num_shots} of {self.num_shots_wanted} shots",
            (self.num_shots > 0 and self.shots_without_reasoning) * "shots that show no reasoning",
            (answer < wanted) * f"answers of {answer:,} of {wanted:,} tokens",
            bool(self.num_cut) * f"{self.num_cut:,} questions without their beginning",
        )
        return ", ".join(filter(None, parts))


def benchmark_of(score: str) -> str:
    """`benchmark/gsm8k/exact_match_strict` -> `gsm8k`."""
    return score.split("/")[1]


def chosen(names: Iterable[str] = ()) -> tuple[Benchmark, ...]:
    """The benchmarks of these names in the paper's order, all where none is named.

    Raises EvaluationError for a name that is none, with the nearest ones.
    """
    wanted = set(names)
    for name in sorted(wanted - PAPER.keys()):
        near = difflib.get_close_matches(name.lower(), PAPER, n=3, cutoff=0.4)
        nearest = f"did you mean {' or '.join(near)}? All of them" if near else "choose among"
        raise EvaluationError(
            f"expected a benchmark of the paper's suite, found {name!r}; {nearest}: "
            f"{', '.join(PAPER)}"
        )
    return tuple(b for name, b in PAPER.items() if not wanted or name in wanted)


def find_files(benchmark: Benchmark, folder: Path) -> dict[str, dict[str, Path]]:
    """Part of the benchmark (`` where it has none) -> split -> the file in `folder`.

    Every line is read once: it must be a JSON object that has the benchmark's fields.

    Raises EvaluationError where a file is missing, stands there twice, or has a broken line.
    """
    if not folder.is_dir():
        raise EvaluationError(
            f"expected a folder with the benchmarks' files at {folder}, found no such folder; "
            "name another --benchmark-data, or leave it out to read them from the hub"
        )
    parts: Iterable[str] = ("",)
    if any("{part}" in name for name in benchmark.files.values()):
        before, _, after = benchmark.files["test"].partition("{part}")
        found = folder.glob(f"{before}*{after}")
        parts = sorted(p.name.removesuffix(after) for p in found) or ("*",)
    files: dict[str, dict[str, Path]] = {}
    for part in parts:
        files[part] = {
            split: _the_one(benchmark, folder, pattern.replace("{part}", part))
            for split, pattern in benchmark.files.items()
            if split != benchmark.optional or any(folder.glob(pattern))
        }
        for file in files[part].values():
            _check_lines(file, benchmark.fields)
    return files


def _the_one(benchmark: Benchmark, folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        listed = " and ".join(path.name for path in found) or "none"
        raise EvaluationError(
            f"{folder}: expected one file {pattern} for the benchmark {benchmark.name}, found "
            f"{listed}; {'leave one of them' if found else 'put it there'}, or leave the benchmark "
            "out by naming others with --task"
        )
    return found[0]


def _check_lines(file: Path, fields: Sequence[str]) -> None:
    number = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:
                found = f"{error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
            else:
                lacking = [f for f in fields if not isinstance(row, dict) or f not in row]
                if not lacking:
                    continue
                found = f"nothing under {', '.join(lacking)}"
            raise EvaluationError(
                f"{file}, line {number}: expected a JSON object with {', '.join(fields)}, found "
                f"{found}; fetch the file again or mend the line"
            )
    if not number:
        raise EvaluationError(
            f"{file}: expected questions, one a line, found an empty file; fetch it again"
        )
