"""A study file is understood wholly, or refused with every fault in one message."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.study.small import content, write_material, write_study

from fedgraft.errors import ResidualError, StudyError
from fedgraft.study.federation import ClientFile, FederationFile
from fedgraft.study.recipes import LineageStudy
from fedgraft.study.study import FederationPart, Form, Study

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))
REAL_SIZED = ("llama3_8b", "qwen2_0.5b", "forgetting_qwen2_0.5b", "merging_qwen2_0.5b")
OF_OTHERS = [file for file in STUDIES if "arms" in yaml.safe_load(file.read_text("utf-8"))]
"""Studies of selection and of lineages."""
ON_A_LAPTOP = [file for file in STUDIES if file.stem not in REAL_SIZED and file not in OF_OTHERS]


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """A place in which every path of the small study exists."""
    return {"place": with_every_path(tmp_path / "place", yaml.safe_dump(content()), "place")}


def with_every_path(folder: Path, text: str, place: str) -> Path:
    for name in re.findall(rf"{place}:([\w./-]+)", text):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def load(tmp_path: Path, places: dict[str, Path], **changes: Any) -> Study:
    return Study.load(write_study(tmp_path / "study.yaml", **changes), places)


@pytest.mark.parametrize("file", ON_A_LAPTOP, ids=lambda file: str(file.stem))
def test_every_study_of_the_project_loads(file: Path, tmp_path: Path) -> None:
    text = file.read_text(encoding="utf-8")
    places = {
        name: with_every_path(tmp_path / name, text, name) for name in ("pocket", "company", "data")
    }
    study = Study.load(file, places)
    assert study.name == file.stem
    assert study.adapters or study.merging or study.curve or study.federation
    assert set(study.departments) == {"finance", "hr", "engineering", "it_support"}


@pytest.mark.parametrize("name", REAL_SIZED)
def test_a_real_sized_study_loads_before_its_text_is_there_but_does_not_run(name: str) -> None:
    file = ON_A_LAPTOP[0].with_name(f"{name}.yaml")
    places = {"data": Path("nowhere"), "company": Path("nowhere")}
    study = Study.load(file, places, dry=True)
    assert study.name == file.stem
    texts = re.findall(r'"((?:data:|company:|\.\./runs/)[^"]+)"', file.read_text(encoding="utf-8"))
    assert sorted(study.not_there) == sorted(texts)
    with pytest.raises(StudyError, match=f"found {len(texts)} paths amiss"):
        Study.load(file, places)


OF_LINEAGES = [file for file in OF_OTHERS if "models" in yaml.safe_load(file.read_text("utf-8"))]
ON_A_GPU = [file for file in OF_LINEAGES if re.search("qwen|llama", file.stem)]


@pytest.mark.parametrize("file", OF_LINEAGES, ids=lambda file: str(file.stem))
def test_every_study_of_lineages_loads(file: Path, tmp_path: Path) -> None:
    text = file.read_text(encoding="utf-8")
    places = {
        name: with_every_path(tmp_path / name, text, name) for name in ("pocket", "company", "data")
    }
    study = LineageStudy.load(file, places, dry=file in ON_A_GPU)
    assert study.name == file.stem
    assert all(arm.words for arm in study.arms.values())
    assert f"studies/{file.name} --out runs/{file.stem}" in text
    if file not in ON_A_GPU:
        assert len(study.seeds) == 3
        assert not study.not_there


def test_a_dry_run_still_refuses_a_model_or_a_place_that_is_not_there(tmp_path: Path) -> None:
    file = write_study(tmp_path / "study.yaml", family={"base": "place:b", "instruct": "x:i"})
    with pytest.raises(StudyError) as error:
        Study.load(file, {"place": tmp_path}, dry=True)
    assert "found 2 paths amiss" in str(error.value)
    assert f"place:b: there is nothing at {tmp_path / 'b'}" in str(error.value)


def test_every_file_in_the_guide_to_federations_is_understood() -> None:
    guide = STUDIES[0].parents[1] / "docs" / "federation.md"
    found = re.findall(r"```yaml\n(.*?)```", guide.read_text("utf-8"), re.DOTALL)
    plan, dialogues, part, client = found
    whole = yaml.safe_load(plan)
    assert FederationFile.model_validate(whole).plan.clients[0] == "hr-1"
    spoken = FederationFile.model_validate(whole | yaml.safe_load(dialogues))
    assert spoken.departments["hr"].dialogues
    federation = FederationPart.model_validate(yaml.safe_load(part)["federation"])
    assert len(federation.rules) == 6
    assert ClientFile.model_validate(yaml.safe_load(client)).name == "hr-1"


def test_the_guide_to_federations_names_every_setting() -> None:
    guide = (STUDIES[0].parents[1] / "docs" / "federation.md").read_text("utf-8")
    table = guide[guide.index("The rest may be left out") : guide.index("## What happens")]
    needed = {"name", "question", "model", "departments", "num_rounds", "training"}
    settings = FederationFile.model_fields.keys() - needed
    assert {name for name in settings if f"`{name}`" not in table} == set()


def test_quickstart_has_one_seed_and_the_others_three() -> None:
    seeds = {f.stem: yaml.safe_load(f.read_text(encoding="utf-8"))["seeds"] for f in ON_A_LAPTOP}
    assert {name: len(given) for name, given in seeds.items()} == {
        "departments": 3,
        "forgetting_curve": 3,
        "merging": 3,
        "pocket": 3,
        "quickstart": 1,
        "real_departments": 3,
        "real_departments_federated": 3,
    }


def test_a_path_names_a_place_or_is_relative_to_the_file(
    tmp_path: Path, places: dict[str, Path]
) -> None:
    (tmp_path / "own.jsonl").touch()
    study = load(tmp_path, places, departments={"hr": {"corpus": ["own.jsonl", "place:hr.jsonl"]}})
    found = [Path(path) for path in study.departments["hr"].corpus]
    assert found == [tmp_path / "own.jsonl", places["place"] / "hr.jsonl"]


def test_a_model_may_be_a_name_on_the_hub(tmp_path: Path, places: dict[str, Path]) -> None:
    names = {"base": "org/model", "instruct": "org/model-chat@main"}
    assert load(tmp_path, places, family=names).family.model_dump(exclude_none=True) == names


def test_all_wrong_settings_are_told_at_once(tmp_path: Path, places: dict[str, Path]) -> None:
    with pytest.raises(StudyError) as error:
        load(tmp_path, places, name=None, sedes=[1], seeds=[], pretrain={"learning_rate": -1})
    message = str(error.value)
    assert "5 faults" in message
    for fault in (
        "name: Field required",
        "sedes: Extra inputs are not permitted",
        "seeds: Tuple should have at least 1 item",
        "pretrain.num_tokens: Field required",
        "pretrain.learning_rate: Input should be greater than 0",
    ):
        assert fault in message


def test_all_wrong_paths_are_told_at_once(tmp_path: Path, places: dict[str, Path]) -> None:
    with pytest.raises(StudyError) as error:
        load(
            tmp_path,
            places,
            departments={"hr": {"corpus": ["place:none.jsonl", "elsewhere:hr.jsonl"]}},
            questions={"validation": "lost.jsonl", "test": "place:questions/test.jsonl"},
        )
    message = str(error.value)
    assert "3 paths amiss" in message
    assert f"place:none.jsonl: there is nothing at {places['place'] / 'none.jsonl'}" in message
    assert "elsewhere:hr.jsonl: no place is called 'elsewhere' (known: place:)" in message
    assert f"lost.jsonl: there is nothing at {tmp_path / 'lost.jsonl'}" in message


def test_a_seed_given_twice_is_refused(tmp_path: Path, places: dict[str, Path]) -> None:
    with pytest.raises(StudyError, match=r"seeds are given twice in \[1, 1\]"):
        load(tmp_path, places, seeds=[1, 1])


@pytest.mark.parametrize("grid", [[], [".nan"], [".inf", 1.0]])
def test_a_search_over_no_scale_is_refused(
    grid: list[Any], tmp_path: Path, places: dict[str, Path]
) -> None:
    scales = [float(str(scale).removeprefix(".")) for scale in grid]
    with pytest.raises(StudyError, match=r"scale\.grid"):
        load(tmp_path, places, scale={"grid": scales})


def test_two_forms_of_other_bytes_have_other_words() -> None:
    """A form's words are the name of its folder, too."""
    words = [Form(name="sparse", density=density).words for density in (0.1, 0.101, 0.104, 0.001)]
    assert words[0] == "sparse, 10% kept"
    assert len(set(words)) == 4


def test_a_search_without_dialogues_is_refused(tmp_path: Path, places: dict[str, Path]) -> None:
    with pytest.raises(StudyError, match="a search for the scale needs dialogues"):
        load(tmp_path, places, dialogues=None)


def test_a_seed_outside_of_seeds_is_refused(tmp_path: Path, places: dict[str, Path]) -> None:
    pretrain = {"num_tokens": 10, "learning_rate": 1e-3, "seed": 4}
    with pytest.raises(StudyError, match=r"pretrain: .*the seed comes from `seeds`"):
        load(tmp_path, places, pretrain=pretrain)


@pytest.mark.parametrize("text", ["", "- a list", "name: [", "name: \xff"])
def test_a_file_that_is_no_study_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(StudyError, match=r"broken\.yaml: expected a study"):
        Study.load(file, {})


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"none\.yaml: expected a study in YAML, found: .*No such"):
        Study.load(tmp_path / "none.yaml", {})


@pytest.mark.parametrize(
    ("merging", "message"),
    [
        ({"graft": {}}, "graft: an arm's name; take another"),
        ({"a/b": {}}, "merging.*String should match pattern"),
        ({"x": {"method": {"name": "magic"}}}, "'plain', 'ties', 'dare', 'dare_ties'"),
    ],
)
def test_a_way_to_merge_that_cannot_be_is_refused(
    tmp_path: Path, merging: dict[str, Any], message: str
) -> None:
    material = write_material(tmp_path / "material")
    file = write_study(tmp_path / "study.yaml", merging=merging)
    with pytest.raises(StudyError, match=message):
        Study.load(file, {"place": material})


def test_an_impossible_density_in_a_study_is_refused(tmp_path: Path) -> None:
    material = write_material(tmp_path / "material")
    merging = {"x": {"method": {"name": "ties", "density": 2}}}
    file = write_study(tmp_path / "study.yaml", merging=merging)
    with pytest.raises(ResidualError, match=r"at most 1, found 2\.0"):
        Study.load(file, {"place": material})
