"""The verbs: help that teaches, results that can be found, errors that say what to do."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import Result
from tests.study.small import write_material, write_study
from typer.testing import CliRunner

from fedgraft.cli.main import ORDER, app

VERBS = (
    ["quickstart"],
    ["family", "check"],
    ["residual", "extract"],
    ["residual", "inspect"],
    ["residual", "compress"],
    ["graft"],
    ["crawl"],
    ["corpus"],
    ["pretrain"],
    ["adapt"],
    ["select"],
    ["federate"],
    ["federate", "run"],
    ["federate", "serve"],
    ["evaluate"],
    ["study", "plan"],
    ["study", "run"],
    ["report"],
    ["chat"],
)


def fedgraft(*arguments: object, stdin: str = "") -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def refused(result: Result) -> str:
    """The message of a command that ended with a known error, and with nothing but it."""
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny family and texts of two departments."""
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def residual(material: Path) -> Path:
    out = material / "residual"
    done = fedgraft("residual", "extract", material / "base", material / "instruct", "--out", out)
    assert done.exit_code == 0, done.output
    return out


def test_the_verbs_stand_in_the_order_in_which_a_newcomer_meets_them() -> None:
    listed = re.findall(r"^│ (\w+) ", fedgraft("--help").output, re.MULTILINE)
    assert tuple(listed) == ORDER == tuple(dict.fromkeys(verb[0] for verb in VERBS))


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_the_help_of_a_verb_ends_with_a_command_to_copy(verb: list[str]) -> None:
    result = fedgraft(*verb, "--help")
    assert result.exit_code == 0
    command = " ".join(result.output.partition("Example:")[2].split())
    assert command.startswith(f"fedgraft {' '.join(verb)}")


def test_each_result_is_named_with_the_next_step(
    material: Path, residual: Path, tmp_path: Path
) -> None:
    newer, grafted, adapter = (tmp_path / name for name in ("newer", "grafted", "adapter"))
    card = tmp_path / "scores" / "card.json"
    base, text = material / "base", material / "hr.jsonl"

    done = fedgraft("family", "check", base, material / "instruct")
    assert "Qwen2ForCausalLM" in done.output
    assert f"fedgraft residual extract {base}" in done.output

    rows = ("--row-length", 64)
    done = fedgraft("pretrain", base, "--data", text, "--out", newer, "--tokens", "1k", *rows)
    assert "30 documents" in done.output
    assert f"fedgraft graft {newer} RESIDUAL" in done.output

    done = fedgraft("graft", newer, residual, "--out", grafted, "--scale", 0.9)
    assert f"graft       {grafted}" in done.output
    assert f"fedgraft chat {grafted}" in done.output

    whose = ("--department", "hr", "--data", text)
    done = fedgraft("adapt", grafted, *whose, "--out", adapter, *rows)
    assert f"fedgraft chat {grafted} --adapter {adapter}" in done.output

    asked = ("--dialogues", material / "dialogues/test.jsonl")
    done = fedgraft("evaluate", grafted, "--data", f"hr={text}", *asked, "--out", card)
    assert "perplexity/hr/nats_per_token" in done.output
    assert f"scorecard   {card}" in done.output
    assert "instructions/prompt_strict" in json.loads(card.read_text())["scores"]

    done = fedgraft(
        *("chat", grafted, "--adapter", adapter, "--max-new-tokens", 3),
        stdin="hello\n\n/new\nbye\n",
    )
    assert done.exit_code == 0, done.output


def test_replay_is_mixed_in_when_it_is_given(material: Path, tmp_path: Path) -> None:
    out = tmp_path / "newer"
    done = fedgraft(
        *("pretrain", material / "base", "--data", material / "hr.jsonl", "--out", out),
        *("--tokens", "1k", "--row-length", 64, "--replay", material / "replay.jsonl"),
    )
    assert done.exit_code == 0, done.output
    assert json.loads((out / "fedgraft.json").read_text())["settings"]["replay_share"] == 0.1


def test_a_study_ends_with_its_verdict_its_report_and_how_to_talk_to_the_graft(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDGRAFT_DATA", str(material))
    file = write_study(tmp_path / "small.yaml", seeds=[1], adapters=None, scale={"grid": [1.0]})
    file.write_text(file.read_text().replace("place:", "data:"))
    out = tmp_path / "out"

    done = fedgraft("study", "run", file, "--out", out)
    assert done.exit_code == 0, done.output
    assert json.loads((out / "result.json").read_text())["verdict"] in done.stdout
    assert f"report      {out / 'report.html'}" in done.stdout
    model = re.findall(r"fedgraft chat (.+)", done.stdout)[0]
    assert (Path(model) / "config.json").is_file()
    assert "extract the residual" in done.stderr

    (out / "report.html").unlink()
    again = fedgraft("report", out)
    assert again.exit_code == 0
    assert (out / "report.html").is_file()


def test_a_study_of_the_company_gets_the_company_written_beside_its_stages(tmp_path: Path) -> None:
    from fedgraft.cli.places import places_of

    file = tmp_path / "x.yaml"
    file.write_text("departments: {hr: {corpus: ['company:year2/hr.jsonl']}}")
    places = places_of(file, tmp_path / "out")
    assert places == {"company": tmp_path / "out" / "company"}
    assert (places["company"] / "year2" / "hr.jsonl").is_file()


def test_what_ships_with_fedgraft_is_found_by_name() -> None:
    from fedgraft.cli.places import resolve
    from fedgraft.pocket.weights import folder

    assert folder.with_name("quickstart.yaml").is_file()
    assert resolve("pocket:base") == str(folder / "base")
    assert resolve("org/name@main") == "org/name@main"
    assert resolve("C:/models/base") == "C:/models/base"


def test_data_that_is_not_there_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDGRAFT_DATA", str(tmp_path / "nowhere"))
    file = write_study(tmp_path / "small.yaml")
    file.write_text(file.read_text().replace("place:", "data:"))
    message = refused(fedgraft("study", "run", file, "--out", tmp_path / "out"))
    assert f"{tmp_path / 'nowhere'}, found nothing there; set FEDGRAFT_DATA" in message
    assert not (tmp_path / "out").exists()


def test_a_study_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    message = refused(fedgraft("study", "run", tmp_path / "no.yaml", "--out", tmp_path / "out"))
    assert "no.yaml" in message


def test_grafting_twice_is_refused(residual: Path, material: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert fedgraft("graft", material / "base", residual, "--out", once).exit_code == 0
    assert "a residual is added once" in refused(fedgraft("graft", once, residual, "--out", twice))
    assert not twice.exists()


def test_nothing_to_score_on_is_refused(material: Path) -> None:
    message = refused(fedgraft("evaluate", material / "base"))
    assert "name at least one of --data, --dialogues, --questions" in message


@pytest.mark.parametrize(
    ("text", "tokens"), [("500k", 500_000), ("1.5M", 1_500_000), ("1_000", 1000), ("2B", 2 * 10**9)]
)
def test_a_budget_is_written_as_people_write_it(text: str, tokens: int) -> None:
    from fedgraft.cli.arguments import count

    assert count(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "-3k", "many", "nan", "1e400"])
def test_a_budget_that_is_no_number_is_a_usage_error(text: str, tmp_path: Path) -> None:
    result = fedgraft("pretrain", "base", "--data", "x", "--out", tmp_path / "o", "--tokens", text)
    assert result.exit_code == 2
    assert "expected a number of tokens" in result.stderr


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        ("pretrain", ("--warmup", 2), "warmup: Input should be less than 1"),
        ("pretrain", ("--learning-rate", 0), "learning_rate: Input should be greater than 0"),
        ("pretrain", ("--schedule", "wsd", "--warmup", 0.9), "choose a sum of at most 1"),
        ("pretrain", ("--replay-share", 0.3), "expected --replay, the old text, beside"),
        ("adapt", ("--rank", 0, "--department", "hr"), "rank: Input should be greater than 0"),
    ],
)
def test_an_option_that_cannot_be_is_a_usage_error_before_any_work(
    verb: str, options: tuple[object, ...], message: str, material: Path, tmp_path: Path
) -> None:
    done = fedgraft(
        *(verb, material / "base", "--data", material / "hr.jsonl", "--out", tmp_path / "out"),
        *("--tokens", "1k", *options),
    )
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["pretrain", "adapt", "graft"])
def test_a_place_that_is_taken_is_told_before_any_work(
    verb: str, material: Path, residual: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    command = {
        "pretrain": (material / "base", "--data", tmp_path / "none", "--tokens", "1k"),
        "adapt": (material / "base", "--data", tmp_path / "none", "--department", "hr"),
        "graft": (material / "base", residual, "--scale", "auto", "--data", tmp_path / "none"),
    }[verb]
    assert "out exists already; remove it" in refused(
        fedgraft(verb, *command, "--out", tmp_path / "out")
    )
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_scorecard_is_a_file_and_that_is_told_before_anything_is_scored(
    material: Path, tmp_path: Path
) -> None:
    command = ("evaluate", material / "base", "--data", tmp_path / "none", "--out")
    said = refused(fedgraft(*command, tmp_path))
    assert "expected a file for the scorecard, found a directory" in said
    (tmp_path / "file").touch()
    said = refused(fedgraft(*command, tmp_path / "file" / "card.json"))
    assert "file: expected a directory to write, found a file; choose another" in said


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_study_file_that_is_no_text_is_refused_in_one_message(verb: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_bytes(b"name: caf\xe9\n")
    out = ("--out", tmp_path / "out") if verb == "run" else ()
    said = refused(fedgraft("study", verb, file, *out))
    assert "study.yaml: expected" in said


def test_a_study_that_a_launcher_started_is_told_to_start_its_processes_itself(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them would do, and write, everything."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("FEDGRAFT_DATA", str(material))
    file = write_study(tmp_path / "small.yaml")
    file.write_text(file.read_text().replace("place:", "data:"))
    said = refused(fedgraft("study", "run", file, "--out", tmp_path / "out"))
    assert (
        "found it started 4 times by a launcher; start it without one, with --processes 4" in said
    )
    assert not (tmp_path / "out").exists()


def test_a_known_error_is_one_message_on_stderr_and_exit_code_1(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fedgraft.cli.main", "report", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: expected the result of a study at ")
    assert "run `fedgraft study run" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_ctrl_c_ends_with_130_leaves_no_output_and_says_how_to_go_on(
    material: Path, tmp_path: Path
) -> None:
    out = tmp_path / "newer"
    running = subprocess.Popen(
        [
            *(sys.executable, "-m", "fedgraft.cli.main", "pretrain", str(material / "base")),
            *("--data", str(material / "hr.jsonl"), "--out", str(out)),
            *("--tokens", "50M", "--row-length", "64"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # as in a terminal: a job in the background of a script inherits that Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".newer.training-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "run the same command again to go on" in said
    assert "Traceback" not in said
    assert not out.exists()
