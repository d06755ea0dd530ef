"""A stage is complete or not; a complete one is not run again while nothing changed."""

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import fedgraft
from fedgraft.errors import ArtefactError
from fedgraft.provenance import RECORD, Record
from fedgraft.study import stage
from fedgraft.study.stage import BEGUN, model_hash, run_stage
from fedgraft.testing import save_tiny
from fedgraft.weights.checkpoint import Checkpoint


class Maker:
    """Fills a stage's folder and counts how often it was asked to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> Mapping[str, Any]:
        self.calls += 1
        (folder / "made").write_text(str(self.calls), encoding="utf-8")
        return {"found": 0.1 + self.calls}


def run(folder: Path, make: Callable[[Path], Mapping[str, Any] | None], **changes: Any) -> Record:
    given = {"title": "a stage", "inputs": {"text": "sha256:1"}, "settings": {"rate": (1, 2)}}
    return run_stage(folder, make=make, say=lambda _: None, **(given | changes))


def test_what_is_no_stage_is_never_cleared_away(tmp_path: Path) -> None:
    """`residual extract --out runs/residual`, then `study run --out runs`."""
    folder = tmp_path / "residual"
    folder.mkdir()
    Record.make("residual").write(folder)
    (folder / "weights").touch()
    with pytest.raises(ArtefactError, match="found a residual, which is not removed; choose anot"):
        run(folder, Maker())
    assert (folder / "weights").exists()
    (folder / RECORD).unlink()
    with pytest.raises(ArtefactError, match="found files of others, which is not removed; choose"):
        run(folder, Maker())
    assert [path.name for path in folder.iterdir()] == ["weights"]


def test_a_finished_stage_is_not_run_again(tmp_path: Path) -> None:
    make = Maker()
    first, second = run(tmp_path / "s", make), run(tmp_path / "s", make)
    assert make.calls == 1
    assert first.model_dump_json() == second.model_dump_json()
    assert second.figures["found"] == 1.1
    assert second.figures["seconds"] >= 0


@pytest.mark.parametrize(
    "changes", [{"inputs": {"text": "sha256:2"}}, {"inputs": {}}, {"settings": {"rate": (1, 3)}}]
)
def test_other_inputs_or_settings_run_a_stage_again(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    make = Maker()
    run(tmp_path / "s", make)
    assert run(tmp_path / "s", make, **changes).figures["found"] == 2.1


def test_other_code_runs_a_stage_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Maker()
    run(tmp_path / "s", make)
    monkeypatch.setattr(stage, "code_hash", lambda: "sha256:other")
    run(tmp_path / "s", make)
    assert make.calls == 2


def test_code_that_makes_no_numbers_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "fedgraft"
    for name in ("__init__.py", "cli/main.py", "report/page.py", "training/trainer.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("1", encoding="utf-8")
    monkeypatch.setattr(fedgraft, "__file__", str(package / "__init__.py"))
    code_hash = stage.code_hash.__wrapped__
    first = code_hash()
    (package / "report/page.py").write_text("2", encoding="utf-8")
    assert code_hash() == first
    (package / "training/trainer.py").write_text("2", encoding="utf-8")
    assert code_hash() != first


def test_a_model_that_reads_otherwise_is_another_model_to_a_stage(tmp_path: Path) -> None:
    """Its template, stop tokens or tokenizer were edited in place; a readme changes no score."""
    model, speaker = save_tiny(tmp_path / "model"), save_tiny(tmp_path / "speaker")

    def now() -> str:
        return model_hash(Checkpoint.open(model), Checkpoint.open(speaker))

    seen = [now()]
    (model / "README.md").write_text("A small model.", encoding="utf-8")
    assert now() == seen[0]
    for place in (model, speaker):
        for name in ("chat_template.jinja", "generation_config.json", "tokenizer_config.json"):
            with (place / name).open("a", encoding="utf-8") as file:
                file.write(" ")
            seen.append(now())
    assert len(set(seen)) == len(seen) == 7


def test_a_stage_that_failed_is_incomplete_and_starts_clean(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").mkdir()
        (folder / ".model.training-1").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", fail)
    assert not (tmp_path / "s" / RECORD).exists()

    def look(folder: Path) -> dict[str, Any]:
        return {"left": sorted(path.name for path in folder.iterdir())}

    assert run(tmp_path / "s", look).figures["left"] == [BEGUN, ".model.training-1"]
    assert [path.name for path in (tmp_path / "s").iterdir()] == [RECORD]


def test_the_time_of_interrupted_attempts_counts_up_to_the_state_they_left(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "s"

    def fail(place: Path) -> None:
        (place / ".model.training-1").mkdir(exist_ok=True)
        (place / ".model.training-1" / "state").touch()
        raise KeyboardInterrupt

    for earlier in (100, 20):
        with pytest.raises(KeyboardInterrupt):
            run(folder, fail)
        begun = folder / BEGUN
        then = begun.stat().st_mtime - earlier
        os.utime(begun, (then, then))
    assert run(folder, Maker()).figures["seconds"] == pytest.approx(120, abs=5)
    assert run(folder, Maker(), inputs={}).figures["seconds"] < 5


def test_a_stage_that_is_run_again_is_incomplete_until_it_ends(tmp_path: Path) -> None:
    run(tmp_path / "s", Maker())

    def look(folder: Path) -> None:
        assert [path.name for path in folder.iterdir()] == [BEGUN]

    run(tmp_path / "s", look, inputs={})


def test_the_record_goes_before_what_it_vouches_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a kill in between leaves a record of things that are not there."""
    run(tmp_path / "s", Maker())

    def killed(folder: Path, **_: object) -> None:
        assert not (folder / RECORD).exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "_clear", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", Maker(), inputs={})


def test_a_full_disk_is_told_with_its_place(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    with pytest.raises(ArtefactError, match=r"could not write .*/s: No space left.*Free some"):
        run(tmp_path / "s", fill)
    assert not (tmp_path / "s" / RECORD).exists()


def test_another_fault_of_the_system_is_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    def break_down(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        run(tmp_path / "s", break_down)


def test_the_person_is_told_what_runs_and_how_long_it_took(tmp_path: Path) -> None:
    said: list[str] = []
    for _ in range(2):
        run_stage(
            tmp_path / "s", title="graft", inputs={}, settings={}, make=Maker(), say=said.append
        )
    assert said[0] == "graft"
    assert said[1].endswith(" s")
    assert said[2:] == ["graft: done already"]


def test_what_interrupted_training_goes_on_from_is_kept_beside_its_state_only(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "s"
    seen: list[list[str]] = []

    def make(place: Path) -> None:
        seen.append(sorted(file.name for file in place.iterdir()))

    for state in (["model-5", "other"], ["model-5", "other", ".state"]):
        folder.mkdir(exist_ok=True)
        for name in (BEGUN, *state):
            (folder / name).touch()
        run_stage(
            folder,
            title="train",
            inputs={"with": str(state)},
            settings={},
            make=make,
            say=lambda _: None,
            keep="model-*",
        )
        (folder / RECORD).unlink()
    assert seen == [[BEGUN], [BEGUN, ".state", "model-5"]]
