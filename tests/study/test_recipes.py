"""A file of lineages is understood wholly, or refused: names, circles, recipes without meaning."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.study.lineages import RESIDUAL, TRAINING, only, with_models, write_lessons, write_study

from fedgraft.errors import StudyError
from fedgraft.study import kinds
from fedgraft.study.recipes import VERBS, Addition, Lesson, LineageStudy, Reading, in_words
from fedgraft.study.study import Study
from fedgraft.training.settings import PretrainSettings

GRAFT: dict[str, Any] = {"residual": RESIDUAL}
NEWER: dict[str, Any] = {"from": "base", "pretrain": TRAINING}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"place": write_lessons(tmp_path_factory.mktemp("material"))}


@pytest.fixture
def load(tmp_path: Path, places: dict[str, Path]) -> Any:
    def loaded(**changes: Any) -> LineageStudy:
        return LineageStudy.load(write_study(tmp_path / "study.yaml", **changes), places)

    return loaded


def refused(load: Any, **changes: Any) -> str:
    with pytest.raises(StudyError) as error:
        load(**changes)
    return str(error.value)


def test_a_file_with_models_is_one_of_lineages(tmp_path: Path, places: dict[str, Path]) -> None:
    file = write_study(tmp_path / "study.yaml")
    assert isinstance(kinds.load(file, places), LineageStudy)
    with pytest.raises(StudyError, match="models: Extra inputs are not permitted"):
        Study.load(file, places)


def test_models_are_made_after_what_they_are_made_of(load: Any) -> None:
    models = {
        "graft": {"from": "newer", "graft": GRAFT},
        "newer": NEWER,
        "base": "place:base",
        "instruct": "place:instruct",
    }
    study = load(models=models, arms={"graft": "the graft"})
    assert list(study.recipes) == ["newer", "graft"]
    assert study.checkpoints.keys() == {"base", "instruct"}


def test_a_checkpoint_may_bring_its_own_sizes(load: Any, places: dict[str, Path]) -> None:
    models = {"base": {"checkpoint": "place:base"}, "instruct": "place:instruct"}
    study = load(models=models, arms={"base": "b", "instruct": "i"})
    assert study.checkpoints["base"] == str(places["place"] / "base")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({**NEWER, "graft": GRAFT}, "found pretrain and graft; a recipe does one thing, make a"),
        ({"from": "base"}, "expected one of pretrain, tune, graft, fresh, found none; a recipe"),
        ({**NEWER, "speed": 1}, "models.x.speed: Extra inputs are not permitted"),
        ({"pretrain": TRAINING}, "models.x.from: Field required"),
        ({"from": "base", "pretrain": {**TRAINING, "seed": 3}}, "the seed comes from `seeds`"),
        ({"from": "base", "tune": TRAINING}, "models.x.tune.examples: Field required"),
        ({"from": "base", "graft": {"residual": ["base"]}}, "models.x.graft.residual.1: Field req"),
        ({"from": "base", "fresh": {"hidden_size": 0}}, "hidden_size: Input should be greater"),
    ],
)
def test_a_recipe_that_is_none_is_refused(load: Any, recipe: dict[str, Any], message: str) -> None:
    assert message in refused(load, **only("x", x=recipe))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"from": "bass", "pretrain": TRAINING}, "models.x: bass is no model; known are base, ins"),
        (
            {"from": "base", "graft": {"residual": ["base", "tuned"]}},
            "models.x: tuned is no model; known are base, instruct, x",
        ),
        (
            {"from": "base@64", "pretrain": TRAINING},
            "models.x: base leaves no checkpoint at 64; its budgets are none",
        ),
        (
            {"from": "base", "tune": {**TRAINING, "examples": ["dolly"]}},
            "models.x: dolly is none of the study's `examples` (there are none); name one",
        ),
        (
            {"from": "base", "pretrain": {**TRAINING, "texts": {"news": 1}}},
            "models.x: news is none of the study's `texts` (there are none); name one",
        ),
    ],
)
def test_a_name_of_nothing_is_refused(load: Any, recipe: dict[str, Any], message: str) -> None:
    assert message in refused(load, **only("x", x=recipe))


def test_a_budget_that_is_not_left_is_refused_with_those_that_are(load: Any) -> None:
    left = {"from": "base", "pretrain": {**TRAINING, "budgets": [256, 512]}}
    changes = only("x", "newer@300", newer=left, x={"from": "newer@128", "graft": GRAFT})
    message = refused(load, **changes)
    assert "models.x: newer leaves no checkpoint at 128; its budgets are 256, 512" in message
    assert "arms: newer leaves no checkpoint at 300; its budgets are 256, 512" in message


def test_models_that_are_made_of_each_other_are_refused(load: Any) -> None:
    one = {"from": "two", "pretrain": TRAINING}
    two = {"from": "one", "pretrain": TRAINING}
    message = refused(load, **only("one", one=one, two=two))
    assert "models: one, two are made of each other, in a circle; break it" in message
    assert "in a circle" in refused(load, **only("x", x={"from": "x", "pretrain": TRAINING}))


def test_other_names_of_nothing_are_refused(load: Any) -> None:
    assert "arms: stranger is no model" in refused(load, arms={"stranger": "who?"})
    assert "against: s2 is none of the arms" in refused(load, against="s2")
    assert "tokenizer: newer is no model as it comes" in refused(load, tokenizer="newer")


def test_what_nothing_scored_is_made_of_is_refused(load: Any) -> None:
    changes = with_models(idle={"from": "newer", "pretrain": TRAINING})
    assert "models.idle: nothing that is scored is made of it; take it out" in refused(
        load, **changes
    )


@pytest.mark.parametrize(
    ("graft", "message"),
    [
        ({"residual": ["base", "base"]}, "the residual of base with itself is nothing"),
        (
            {"residual": ["newer", "instruct"]},
            "instruct was not made from newer, so they are no family; correct it, or ask for it",
        ),
        (
            {"residual": ["other", "tuned"]},
            "newer was not made from other, the residual's base; correct it, or ask for it with "
            "`any_parent: true`",
        ),
    ],
)
def test_a_residual_without_meaning_is_refused_unless_asked_for(
    load: Any, graft: dict[str, Any], message: str
) -> None:
    models = {
        "newer": NEWER,
        "other": {"from": "base", "pretrain": {**TRAINING, "learning_rate": 2e-3}},
        "tuned": {"from": "other", "pretrain": TRAINING},
        "x": {"from": "newer", "graft": graft},
    }
    changes = only("x", "other", "tuned", **models)
    assert message in refused(load, **changes)
    changes["models"]["x"] = {"from": "newer", "graft": {**graft, "any_parent": True}}
    if graft["residual"][0] != graft["residual"][1]:
        load(**changes)


def test_a_target_that_has_instructions_is_refused_unless_asked_for(load: Any) -> None:
    models = {
        "newer": NEWER,
        "graft": {"from": "newer", "graft": GRAFT},
        "read on": {"from": "graft", "pretrain": TRAINING},
        "x": {"from": "read on", "graft": GRAFT},
    }
    assert "models.x: read on has the instructions of graft already; graft onto what" in refused(
        load, **only("x", **models)
    )
    models["x"] = {"from": "read on", "graft": {**GRAFT, "again": True}}
    load(**only("x", **models))
    onto = {"from": "instruct", "graft": {**GRAFT, "any_parent": True}}
    assert "instruct has the instructions of instruct already" in refused(load, **only("x", x=onto))


def test_random_weights_descend_from_nothing(load: Any) -> None:
    models = {
        "start": {"from": "base", "fresh": {}},
        "x": {"from": "start", "graft": GRAFT},
    }
    assert "start was not made from base, the residual's base" in refused(
        load, **only("x", **models)
    )


def test_a_checkpoint_on_the_way_is_no_ancestor_of_what_came_after(load: Any) -> None:
    left = {"from": "base", "pretrain": {**TRAINING, "budgets": [512]}}
    x = {"from": "newer", "graft": {"residual": ["newer@512", "tuned"]}}
    changes = only("x", newer=left, tuned={"from": "newer@512", "pretrain": TRAINING}, x=x)
    assert "newer was not made from newer@512" in refused(load, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, "seeds are given twice"),
        ({"departments": None}, "models.s1: there is no text to read; add `departments` or"),
        (
            only("x", x={"from": "base", "pretrain": {**TRAINING, "replay": 0.1}})
            | {"replay": None},
            "models.x: there is no old text; add `replay`, or take it out here",
        ),
        (
            only("x", x={"from": "base", "pretrain": {**TRAINING, "replay": 0, "texts": {"a": 1}}})
            | {"texts": {"a": {"corpus": ["place:hr.jsonl"]}}},
            "models.x: replay is for the departments' text; name it in `texts`",
        ),
        (
            with_models("x", newer=NEWER, x={"from": "newer", "pretrain": TRAINING, "once": True}),
            "models.x: made once, but of a model that each seed makes anew",
        ),
        (
            only("base") | {"departments": None, "dialogues": None, "questions": None},
            "nothing is scored; add departments, dialogues, questions or benchmarks",
        ),
        ({"arms": {"base": {"words": "b", "line": "S2", "at": 1}}} | {"models": None}, "models: F"),
        (
            only("base") | {"arms": {"base": {"words": "b", "line": "S2", "at": 1}}},
            "axis: arms have a place on it; say what it counts",
        ),
        (
            only("base") | {"arms": {"base": {"words": "b", "line": "S2"}}},
            "line and at: expected both or neither, found one; add the other",
        ),
        (
            only("base") | {"benchmarks": {"names": ["gsm9k"]}},
            "benchmarks.names: Value error, expected a benchmark of the paper's suite, found 'gsm",
        ),
        (only("base") | {"models": {"a/b": "place:base"}}, "String should match pattern"),
    ],
)
def test_a_study_that_cannot_be_is_refused(
    load: Any, changes: dict[str, Any], message: str
) -> None:
    assert message in refused(load, **changes)


def test_all_faults_of_a_file_are_told_at_once(load: Any) -> None:
    models = {
        "x": {"from": "bass", "pretrain": TRAINING},
        "y": {"from": "base", "tune": {**TRAINING, "examples": ["dolly"]}},
    }
    message = refused(load, **only("x", "y", "z", **models))
    assert message.count("models.") == 2
    assert "arms: z is no model" in message


def test_paths_that_lead_nowhere_are_told_at_once(load: Any) -> None:
    changes = only("base") | {
        "models": {"base": "place:bass"},
        "examples": {"a": {"file": "place:nothing.jsonl"}},
        "texts": {"t": {"corpus": ["nowhere:x"]}},
    }
    message = refused(load, **changes)
    assert "found 3 paths amiss" in message


@pytest.mark.parametrize(
    ("arm", "seeded"),
    [("base", False), ("newer", True), ("graft", True), ("plain", False), ("fixed", False)],
)
def test_a_model_is_made_anew_by_each_seed_where_it_or_its_parts_are_trained(
    load: Any, arm: str, seeded: bool
) -> None:
    models = {
        "plain": {"from": "base", "graft": {"residual": RESIDUAL, "scale": 0.5}},
        "fixed": {"from": "base", "pretrain": TRAINING, "once": True},
    }
    study = load(**with_models("graft", "s1", "newer", "plain", "fixed", **models))
    assert study.is_seeded(arm) == seeded


def test_all_are_asked_with_the_tokenizer_of_the_residuals_instruct_side(load: Any) -> None:
    assert load().speaker == "instruct"
    assert load(tokenizer="base").speaker == "base"
    tuned = {"from": "newer", "pretrain": TRAINING}
    x = {"from": "newer", "graft": {"residual": ["newer", "tuned"]}}
    assert load(**only("x", newer=NEWER, tuned=tuned, x=x)).speaker == "base"
    assert load(**only("base")).speaker == "base"


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (NEWER, "reads 1,024 tokens at rate 0.001"),
        (
            {"from": "base", "tune": {**TRAINING, "examples": ["a", "b"], "max_examples": 1000}},
            "tuned on a and b (at most 1,000): 1,024 tokens at rate 0.001",
        ),
        (
            {"from": "base", "graft": {**GRAFT, "scale": 0.5, "form": {"name": "sign"}}},
            "plus 0.5 x (instruct - base), 1 bit a number",
        ),
        (
            {
                "from": "base",
                "graft": {
                    **GRAFT,
                    "method": {"name": "ties", "density": 0.2},
                    "factors": {
                        "kinds": {"mlp": 0},
                        "layers": [{"first": 0, "last": 1, "factor": 2}],
                    },
                },
            },
            "plus 1 x (instruct - base), ties density 0.2, mlp x 0, layers 0 to 1 x 2",
        ),
        ({"from": "base", "fresh": {"hidden_size": 8}}, "random weights of its build, hidden_size"),
    ],
)
def test_a_recipe_is_told_in_words(load: Any, recipe: dict[str, Any], words: str) -> None:
    examples = {name: {"file": "place:lessons.jsonl"} for name in ("a", "b")}
    study = load(**only("x", x=recipe), examples=examples)
    assert in_words(study.recipes["x"]).startswith(words)


def test_the_settings_are_shown_as_they_are_written(load: Any) -> None:
    written = load().as_written
    assert written["models"]["newer"]["from"] == "base"
    assert written["models"]["base"]["checkpoint"] == "place:base"


def test_the_study_in_the_guide_is_understood() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "studies.md").read_text("utf-8")
    section = guide[guide.index("## Lineages") :]
    (example,) = re.findall(
        r"```yaml\n(.*?)```", section[: section.index("## The gate")], re.DOTALL
    )
    study = LineageStudy.model_validate(yaml.safe_load(example))
    assert list(study.recipes) == ["base 2", "instruct 2", "graft", "back"]


def test_the_guide_names_every_setting_of_a_recipe() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "studies.md").read_text("utf-8")
    section = guide[guide.index("## Lineages") : guide.index("## The gate")]
    own = {
        *(Reading.model_fields.keys() | Lesson.model_fields) - PretrainSettings.model_fields.keys(),
        *Addition.model_fields.keys() - {"residual"},
        *VERBS,
    }
    assert {name for name in own if f"`{name}" not in section} == set()


def test_what_was_tuned_or_grafted_or_comes_from_an_instruct_model_has_instructions(
    load: Any,
) -> None:
    changes = with_models(
        *("s1", "graft", "later", "stranger"),
        derived={"from": "base", "tune": {**TRAINING, "examples": ["lessons"]}},
        later={"from": "derived", "pretrain": TRAINING},
        stranger={"from": "instruct", "fresh": {}},
    )
    study = load(**changes, examples={"lessons": {"file": "place:lessons.jsonl"}})
    assert not any(map(study.has_instructions, ("base", "newer", "stranger")))
    assert all(map(study.has_instructions, ("instruct", "s1", "derived", "later", "graft")))
