"""The benchmarks' figures are those of lm-eval's own command, on the same files and pocket graft.

The task files below are written as lm-eval's guide has it (`include:` a stock file), not by the
code under test; shots and answer lengths are those that the result states.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedgraft.evaluation.benchmarks import PAPER, PAPER_ROWS, Asked, chosen
from fedgraft.evaluation.harness import BenchmarkSettings, run_benchmarks
from fedgraft.models import open_model
from fedgraft.pocket.company import write_company
from fedgraft.pocket.weights import folder as pocket
from fedgraft.weights.checkpoint import Checkpoint

DATA = Path(os.environ.get("FEDGRAFT_DATA", "../shared/data")) / "bench"
SUBJECTS = ("anatomy", "management", "college_computer_science")
LIMIT = 3
STOCK = {
    "ifeval": "ifeval/ifeval.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "winogrande": "winogrande/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "piqa": "piqa/piqa.yaml",
    "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2.yaml",
}
FILES = {
    "ifeval": {"train": "ifeval_input_data.jsonl"},
    "gsm8k": {"train": "gsm8k_train.jsonl", "test": "gsm8k_test.jsonl"},
    "winogrande": {"validation": "winogrande_xl_dev.jsonl"},
    "hellaswag": {"validation": "hellaswag_val_1000.jsonl"},
    "arc_easy": {"validation": "arc_easy_validation.jsonl", "test": "arc_easy_test.jsonl"},
    "piqa": {"validation": "piqa_valid.jsonl"},
    "truthfulqa_mc2": {"validation": "truthfulqa_mc.jsonl"},
}
NO_TRAINING_FILE = {"winogrande", "hellaswag", "arc_easy", "piqa"}
SHOTS = """
import json
CATEGORY = {name: name.replace("_", " ") for name in ["computer_science"]}
def rows(data, subject):
    return data.filter(lambda row: row["category"] == CATEGORY.get(subject, subject))
def answered(row):
    return {"cot_content": "A: Let's think step by step. The answer is (" + row["answer"] + ")."}
"""
RUN = (
    "from langdetect import DetectorFactory; DetectorFactory.seed = 0\n"
    "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
)


@pytest.fixture(scope="module")
def graft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pocket base after some of the company's second year, and its instructions."""
    place = tmp_path_factory.mktemp("graft")
    write_company(place / "company")
    year = place / "company" / "year2" / "hr.jsonl"
    base, instruct = pocket / "base", pocket / "instruct"
    rate = ("--learning-rate", "4e-4", "--row-length", "256")
    fedgraft("pretrain", base, "--data", year, "--tokens", "16k", *rate, "--out", place / "newer")
    fedgraft("residual", "extract", base, instruct, "--out", place / "residual")
    fedgraft("graft", place / "newer", place / "residual", "--out", place / "grafted")
    return place / "grafted"


def fedgraft(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "fedgraft", *map(str, words)], check=True)


def material(folder: Path) -> Path:
    """A folder with the real files, of MMLU three subjects."""
    (folder / "mmlu").mkdir(parents=True)
    for file in DATA.glob("*.jsonl"):
        (folder / file.name).symlink_to(file.absolute())
    for subject in SUBJECTS:
        for split in ("test", "dev"):
            file = DATA / "mmlu" / f"{subject}_{split}.jsonl"
            (folder / "mmlu" / file.name).symlink_to(file.absolute())
    return folder


def write_tasks(folder: Path, data: Path, asked: Mapping[str, Asked]) -> list[str]:
    """Task files for lm-eval's command; returns the names to run."""
    import lm_eval.tasks

    folder.mkdir()
    stock = Path(str(lm_eval.tasks.__file__)).parent

    def local(**files: str) -> dict[str, Any]:
        paths = {split: str(data / name) for split, name in files.items()}
        return {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": paths},
        }

    def write(name: str, content: dict[str, Any], functions: str = "") -> None:
        text = yaml.safe_dump(content, sort_keys=False)
        (folder / f"{name}.yaml").write_text(text + functions)

    for name in STOCK.keys() & asked.keys():
        content: dict[str, Any] = {"include": str(stock / STOCK[name]), "task": f"own_{name}"}
        content |= local(**FILES[name]) | {"num_fewshot": asked[name].num_shots}
        if name in NO_TRAINING_FILE:
            content["training_split"] = None
        if name == "ifeval":
            kwargs = {"until": [], "do_sample": False, "temperature": 0.0}
            content["generation_kwargs"] = kwargs | {"max_gen_toks": asked[name].answer_tokens}
        write(name, content)
    if "mmlu" in asked:
        for subject in SUBJECTS:
            content = {"include": str(stock / f"mmlu/default/mmlu_{subject}.yaml")}
            content |= local(test=f"mmlu/{subject}_test.jsonl", dev=f"mmlu/{subject}_dev.jsonl")
            content |= {"task": f"own_mmlu_{subject}", "tag": None}
            write(f"mmlu_{subject}", content | {"num_fewshot": asked["mmlu"].num_shots})
        group = {"group": "own_mmlu", "task": [f"own_mmlu_{subject}" for subject in SUBJECTS]}
        write(
            "mmlu", group | {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
        )
    if "mmlu_pro" in asked:
        code, names = SHOTS, []
        for file in sorted((stock / "mmlu_pro").glob("mmlu_pro_*.yaml")):
            subject = file.stem.removeprefix("mmlu_pro_")
            names.append(f"own_mmlu_pro_{subject}")
            code += (
                f"def others_{subject}(data):\n"
                f"    found = rows(data, {subject!r})\n"
                "    return found.select(range(5, len(found)))\n"
                f"def shots_{subject}(data):\n"
                f"    return rows(data, {subject!r}).select(range(5)).map(answered)\n"
            )
            content = {"include": str(file), "task": names[-1]}
            content |= local(test="mmlu_pro_test_2100.jsonl", validation="mmlu_pro_test_2100.jsonl")
            content |= {"num_fewshot": asked["mmlu_pro"].num_shots}
            kwargs = {"until": ["Question:"], "do_sample": False, "temperature": 0.0}
            content["generation_kwargs"] = kwargs | {
                "max_gen_toks": asked["mmlu_pro"].answer_tokens
            }
            write(
                f"mmlu_pro_{subject}",
                content,
                f"process_docs: !function own.others_{subject}\n"
                "fewshot_config:\n  sampler: first_n\n"
                f"  process_docs: !function own.shots_{subject}\n"
                "  doc_to_text: !function own.fewshot_to_text\n"
                "  doc_to_target: !function own.fewshot_to_target\n",
            )
        code += "from lm_eval.tasks.mmlu_pro.utils import fewshot_to_text, fewshot_to_target\n"
        (folder / "own.py").write_text(code)
        how = {"metric": "exact_match", "weight_by_size": True, "filter_list": "custom-extract"}
        write("mmlu_pro", {"group": "own_mmlu_pro", "task": names, "aggregate_metric_list": [how]})
    return [f"own_{name}" for name in asked]


def by_command(
    model: Path, place: Path, data: Path, kept: Path, asked: Mapping[str, Asked], *flags: str
) -> dict[str, dict[str, Any]]:
    """What `lm-eval run` says of the model, by benchmark."""
    names = write_tasks(place / "tasks", data, asked)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            *(sys.executable, "-c", RUN, "run", "--model", "hf", "--batch_size", "1"),
            *("--model_args", f"pretrained={model},dtype=float32", "--device", "cpu"),
            *("--include_path", str(place / "tasks"), "--tasks", ",".join(names)),
            *("--limit", str(LIMIT), "--output_path", str(place / "out.json"), *flags),
        ],
        env=os.environ | offline | {"NLTK_DATA": str(kept / "nltk_data")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = place.glob("out*.json")
    results: dict[str, dict[str, Any]] = json.loads(file.read_text())["results"]
    return {name.removeprefix("own_"): figures for name, figures in results.items()}


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmarks at {DATA}: set FEDGRAFT_DATA")
@pytest.mark.parametrize(
    ("names", "chat"), [(tuple(PAPER), False), (("ifeval", "mmlu", "gsm8k", "arc_easy"), True)]
)
def test_figures_are_those_of_lm_evals_own_command(
    graft: Path, tmp_path: Path, names: tuple[str, ...], chat: bool
) -> None:
    data, kept = material(tmp_path / "data"), tmp_path / "kept"
    card = run_benchmarks(
        Checkpoint.open(graft),
        arm="pocket",
        benchmarks=chosen(names),
        settings=BenchmarkSettings(
            data=data, limit=LIMIT, fit=True, batch_size=1, chat_template=chat
        ),
        kept=kept,
        open_network=lambda _: open_model(graft),
    )
    flags = ("--apply_chat_template",) if chat else ()
    theirs = by_command(graft, tmp_path, data, kept, card.benchmarks, *flags)
    expected = {
        PAPER[name].score_name(key): (theirs[name][key], theirs[name][key.replace(",", "_stderr,")])
        for name in names
        for key in PAPER[name].scores
    }
    ours = {name: (card.scores[name].value, card.scores[name].stderr) for name in expected}
    given = {name for name in expected if expected[name][1] != "N/A"}
    assert {name: ours[name][0] for name in expected} == {n: v for n, (v, _) in expected.items()}
    assert {name: ours[name] for name in given} == {name: expected[name] for name in given}
    assert expected.keys() - given == {n for n in expected if "inst_level" in n}
    assert chat or set(PAPER_ROWS.values()) == expected.keys()
