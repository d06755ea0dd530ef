"""The result of a study goes to its file and back, and says when it cannot."""

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from tests.study.small import content

from fedgraft.errors import ReportError
from fedgraft.evaluation.scorecard import Score, Scorecard
from fedgraft.study import result as module
from fedgraft.study.result import (
    FILE,
    ArmResult,
    Departments,
    Federation,
    Forgetting,
    Lineages,
    Result,
    Selections,
    load_result,
)

KEYS = r"^    (\w+(?:, \w+)*)  "
KINDS: dict[str, type[BaseModel]] = {
    "arms": Result,
    "forgetting": Forgetting,
    "departments": Departments,
    "selection": Selections,
    "lineage": Lineages,
    "federation": Federation,
}


def some_result() -> Result:
    scores = {"instructions/prompt_strict": Score(value=0.5, num=10, stderr=0.16, unit="share")}
    card = Scorecard(arm="base", seed=None, scores=scores)
    return Result(
        name="small",
        question="Does it run?",
        verdict="It does.",
        claims=(),
        decisions=(),
        arms=(ArmResult(arm="base", words="as it came", scorecards=(card,)),),
        summary={},
        comparisons=(),
        scales=(),
        adapters=(),
        residual={"num_parameters": 10},
        losses={"s1, seed 1": ((1, 2.5),)},
        costs=(),
        tuning={},
        tokens=1024,
        settings=content(),
        inputs={"base": "sha256:1"},
        versions={"fedgraft": "0.1.0"},
    )


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = some_result()
    assert result.write(tmp_path) == tmp_path / FILE
    assert Result.load(tmp_path) == result
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    first = some_result().write(tmp_path).read_bytes()
    assert some_result().write(tmp_path).read_bytes() == first


def explained() -> dict[str, list[str]]:
    """Kind -> the keys that the head of the file explains, `study` for those of every study."""
    parts = re.split(r"\n(?=A study of |What `fedgraft federate`)", module.__doc__ or "")
    return {
        name: [key for line in re.findall(KEYS, part, re.MULTILINE) for key in line.split(", ")]
        for name, part in zip(("study", *KINDS), parts, strict=True)
    }


def test_every_key_is_explained_at_the_head_of_the_file(tmp_path: Path) -> None:
    keys = explained()
    assert keys["study"] + keys["arms"] == list(
        json.loads(some_result().write(tmp_path).read_bytes())
    )
    for name, kind in KINDS.items():
        shared = [] if name == "federation" else keys["study"]
        assert sorted(shared + keys[name]) == sorted(kind.model_fields), name


def test_the_keys_of_every_study_come_first_in_each() -> None:
    shared = explained()["study"]
    for name in ("arms", "forgetting", "departments"):
        assert list(KINDS[name].model_fields)[: len(shared)] == shared


def test_a_result_is_loaded_as_the_kind_that_it_is(tmp_path: Path) -> None:
    result = some_result()
    result.write(tmp_path)
    assert load_result(tmp_path) == result
    with pytest.raises(ReportError, match="expected a result of format 1"):
        Forgetting.load(tmp_path)


def test_a_folder_without_a_result_says_how_to_get_one(tmp_path: Path) -> None:
    for load in (Result.load, load_result):
        with pytest.raises(
            ReportError, match=r"result\.json, found nothing there; run `fedgraft st"
        ):
            load(tmp_path / "none")


@pytest.mark.parametrize("text", ['{"format": 2}', "not JSON", "[]"])
def test_a_result_of_another_format_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE).write_text(text, encoding="utf-8")
    for load in (Result.load, load_result):
        with pytest.raises(ReportError, match=r"of format 1, found .*run the study again"):
            load(tmp_path)
