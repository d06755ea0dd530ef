"""The nine benchmarks in a few short questions each, in the fields and files of the real ones."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SUBJECTS = ("anatomy", "management")
CATEGORIES = (
    *("biology", "business", "chemistry", "computer science", "economics", "engineering", "health"),
    *("history", "law", "math", "other", "philosophy", "physics", "psychology"),
)
NUM = 4
"""Questions of each benchmark and of each subject."""


def write_exams(folder: Path, *, num: int = NUM) -> Path:
    """Write a folder of benchmark data; of MMLU two subjects, the second with half the rows."""
    numbers = range(num)
    write(
        folder / "ifeval_input_data.jsonl",
        (
            {
                "key": n,
                "prompt": f"Say {n} without commas, in two sentences.",
                "instruction_id_list": [
                    "punctuation:no_comma",
                    "length_constraints:number_sentences",
                ][: 1 + n % 2],
                "kwargs": [{}, {"relation": "at least", "num_sentences": 2}][: 1 + n % 2],
            }
            for n in numbers
        ),
    )
    for subject in SUBJECTS:
        held = num if subject == SUBJECTS[0] else max(2, num // 2)
        for split, rows in (("test", range(held)), ("dev", range(5))):
            write(
                folder / "mmlu" / f"{subject}_{split}.jsonl",
                (
                    {"question": f"{n} + 1?", "choices": ["1", "2", "3", "4"], "answer": n % 4}
                    for n in rows
                ),
            )
    write(
        folder / "mmlu_pro_test.jsonl",
        (
            {
                "question": f"Which is {n}?",
                "options": ["zero", "one"],
                "answer": "AB"[n % 2],
                "category": category,
                "cot_content": "",
            }
            for category in CATEGORIES
            for n in range(5 + 2)
        ),
    )
    for split, rows in (("train", range(8)), ("test", numbers)):
        write(
            folder / f"gsm8k_{split}.jsonl",
            ({"question": f"{n} and 1?", "answer": f"{n}+1\n#### {n + 1}"} for n in rows),
        )
    write(
        folder / "winogrande_xl_dev.jsonl",
        (
            {
                "sentence": f"The heron saw {n} fish, and _ flew.",
                "option1": "the heron",
                "option2": "the fish",
                "answer": "1",
            }
            for n in numbers
        ),
    )
    write(
        folder / "hellaswag_val.jsonl",
        (
            {
                "activity_label": "Baking",
                "ctx_a": f"The baker takes {n} loaves.",
                "ctx_b": "the baker",
                "endings": ["sleeps", "sells them", "sings", "swims away"],
                "label": "1",
            }
            for n in numbers
        ),
    )
    for split in ("test", "validation"):
        write(
            folder / f"arc_easy_{split}.jsonl",
            (
                {
                    "question": f"What flies? ({n})",
                    "choices": {"text": ["a mill", "a heron"], "label": ["A", "B"]},
                    "answerKey": "B",
                }
                for n in numbers
            ),
        )
    write(
        folder / "piqa_valid.jsonl",
        ({"goal": f"Open door {n}", "sol1": "push", "sol2": "sing", "label": 0} for n in numbers),
    )
    targets = {"choices": ["Yes.", "No.", "At times."], "labels": [1, 0, 0]}
    write(
        folder / "truthfulqa_mc.jsonl",
        (
            {"question": f"Is {n} even?", "mc1_targets": targets, "mc2_targets": targets}
            for n in numbers
        ),
    )
    return folder


def write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
