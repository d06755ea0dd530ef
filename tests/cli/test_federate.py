"""`fedgraft federate`: a file of departments becomes adapters and a page, or one clear message."""

import json
import shutil
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.numpy import load_file
from tests.cli.test_main import fedgraft, refused
from tests.study.small import page, write_lines, write_material

from fedgraft import federation
from fedgraft.cli.federate import Board
from fedgraft.errors import FederationError, StudyError
from fedgraft.federation import flower, resident
from fedgraft.federation.asking import Answered, Asked
from fedgraft.federation.client import Client
from fedgraft.federation.history import Part, Round
from fedgraft.federation.in_process import InProcess
from fedgraft.federation.message import Question
from fedgraft.federation.partition import Partition
from fedgraft.federation.plan import Plan
from fedgraft.federation.rounds import run_rounds
from fedgraft.study.federation import ClientFile, FederationFile, numbered, run
from fedgraft.study.result import Federation

TRAINING = {"num_tokens": 256, "learning_rate": 1e-2, "batch_tokens": 128, "rank": 2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_material(tmp_path_factory.mktemp("material"))
    for name in ("hr", "finance"):
        write_lines(folder / f"{name}.jsonl", [page(name, number) for number in range(60)])
        write_lines(folder / f"{name}-asked.jsonl", [asked(name, number) for number in range(60)])
    write_lines(folder / "one.jsonl", [page("one", 1)])
    (folder / "empty.jsonl").write_text("")
    return folder


def asked(name: str, number: int) -> dict[str, str]:
    """A line of Alpaca's kind; three are longer than a row, and one is a copy."""
    number = min(number, 58)
    long = " again and again" * 40 if number in (7, 8, 9) else ""
    return {
        "instruction": f"Where does {name} keep page {number}{long}?",
        "output": f"In room {number % 7} of {name}.",
        "category": ("rooms", "pages")[number % 2],
    }


DIALOGUES = {
    "hr": {"dialogues": ["hr-asked.jsonl"], "num_clients": 2},
    "finance": {"dialogues": ["finance-asked.jsonl"], "num_clients": 1},
}


def content(**changes: Any) -> dict[str, Any]:
    """A federation file's content; a change of None takes the key out."""
    whole = {
        "name": "handbooks",
        "model": "instruct",
        "departments": {
            "hr": {"corpus": ["hr.jsonl"], "num_clients": 2},
            "finance": {"corpus": ["finance.jsonl"], "num_clients": 1},
        },
        "num_rounds": 2,
        "training": TRAINING,
        "row_length": 64,
        "window": 32,
    }
    return {key: value for key, value in (whole | changes).items() if value is not None}


def written(folder: Path, name: str = "handbooks.yaml", **changes: Any) -> Path:
    file = folder / name
    file.write_text(yaml.safe_dump(content(**changes)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def ran(material: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run of two rounds: where it is, what was printed, and what was said on the way."""
    out = tmp_path_factory.mktemp("run") / "out"
    done = fedgraft("federate", written(material), "--out", out)
    assert done.exit_code == 0, done.output
    return out, done.stdout, done.stderr


def test_a_run_ends_with_its_verdict_its_page_and_how_to_talk_to_an_adapter(
    ran: tuple[Path, str, str],
) -> None:
    out, printed, _ = ran
    assert json.loads((out / "result.json").read_text())["verdict"] in printed
    assert f"report      {out / 'report.html'}" in printed
    assert f"adapters    {out / 'adapters'}" in printed
    assert f"fedgraft chat instruct --adapter {out / 'adapters' / 'finance'}" in printed
    names = {place.name for place in (out / "adapters").iterdir()}
    assert names == {"hr", "finance"}


def test_elsewhere_than_on_a_terminal_each_answer_is_a_line_with_losses_and_bytes(
    ran: tuple[Path, str, str],
) -> None:
    _, _, said = ran
    lines = said.splitlines()
    assert "round 1: 3 clients are asked" in lines
    for client in ("hr-1", "hr-2", "finance-1"):
        answered = [line for line in lines if line.split()[:1] == [client]]
        assert len(answered) == 4  # sizes, two rounds, the last scores
        assert all("up " in line and "down " in line for line in answered)
        assert ["loss" in line for line in answered] == [False, True, True, False]
    assert any(line.startswith("round 2: ") and "hr department" in line for line in lines)


def test_the_result_has_who_has_what_and_what_travelled(ran: tuple[Path, str, str]) -> None:
    result = Federation.load(ran[0])
    assert result.partition
    counted = {one.client: sum(one.counts) for one in result.partition.clients}
    assert counted == {"hr-1": 30, "hr-2": 30, "finance-1": 60}
    assert result.traffic["adapter"].num_messages == 6
    assert result.traffic["adapter"].bytes_up > 0
    assert result.settings["model"] == "instruct"
    assert [done.number for done in result.history.rounds] == [1, 2]


def test_the_same_command_goes_on_and_trains_nothing_twice(
    ran: tuple[Path, str, str], material: Path
) -> None:
    out, printed, _ = ran
    again = fedgraft("federate", material / "handbooks.yaml", "--out", out)
    assert again.exit_code == 0, again.output
    assert "loss" not in again.stderr
    assert again.stdout == printed


def test_another_plan_in_the_same_place_is_refused(
    ran: tuple[Path, str, str], material: Path
) -> None:
    other = written(material, "other.yaml", rule="ffa")
    message = refused(fedgraft("federate", other, "--out", ran[0]))
    assert "expected a round of this plan and model, found one of another" in message
    assert "choose another --out" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {
                "rounds": 3,
                "num_rounds": 0,
                "departments": {"hr": {"num_clients": 0, "corpora": []}},
            },
            (
                "expected a federation, found 4 faults",
                "rounds: Extra inputs are not permitted",
                "num_rounds: Input should be greater than 0",
                "departments.hr.num_clients: Input should be greater than or equal to 1",
                "departments.hr.corpora: Extra inputs are not permitted",
            ),
        ),
        ({"departments": {}}, ("departments: Dictionary should have at least 1 item",)),
        (
            {
                "departments": {
                    "hr": {"num_clients": 2},
                    "it": {"corpus": ["one.jsonl"]},
                    "law": {"corpus": ["empty.jsonl"]},
                }
            },
            (
                "found 3 departments that cannot take part",
                "department hr: expected a corpus or dialogues, found none",
                "department it: expected enough documents to hold some out",
                "department law: expected at least one document with text",
            ),
        ),
        (
            {"departments": {"hr": {"corpus": ["hr.jsonl"], "num_clients": 50}}},
            ("expected examples to train on and to hold out for each client", "hr-"),
        ),
        (
            {"departments": {"hr": {"corpus": ["nowhere.jsonl", "x:y"]}}, "model": "z:base"},
            ("3 paths amiss", "nowhere.jsonl: there is nothing at", "no place is called 'x'"),
        ),
        (
            {"optimiser": {"name": "fedadam", "rate": 0.1}, "rule": "flora"},
            ("fedadam steps from the last factors, which flora does not keep",),
        ),
        ({"sizes": {"hr-9": {"rank": 4}}}, ("sizes: hr-9 is no client of a department",)),
    ],
)
def test_a_file_that_cannot_be_is_refused_with_every_fault_at_once(
    material: Path, tmp_path: Path, changes: dict[str, Any], expected: tuple[str, ...]
) -> None:
    file = written(material, "amiss.yaml", **changes)
    message = refused(fedgraft("federate", file, "--out", tmp_path / "out"))
    for words in expected:
        assert words in message


def test_a_rank_above_the_narrowest_layer_ends_the_run_before_anything_is_trained(
    material: Path, tmp_path: Path
) -> None:
    file = written(material, "amiss.yaml", training={**TRAINING, "rank": 4096})
    done = fedgraft("federate", file, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "loss" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: expected a rank of at most 16, the model's narrowest layer")


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    message = refused(fedgraft("federate", tmp_path / "no.yaml", "--out", tmp_path / "out"))
    assert "no.yaml: expected a federation in YAML" in message


def test_a_plan_is_a_plan_with_run_before_it_or_not(material: Path, tmp_path: Path) -> None:
    file = written(material, "amiss.yaml", num_rounds=0)
    short = fedgraft("federate", file, "--out", tmp_path / "out")
    long = fedgraft("federate", "run", file, "--out", tmp_path / "out")
    assert short.exit_code == long.exit_code == 1
    assert short.stderr == long.stderr


def test_help_shows_a_plan_to_copy() -> None:
    helped = " ".join(fedgraft("federate", "run", "--help").output.replace("│", " ").split())
    for words in (
        "name: handbooks model: runs/grafted",
        "hr: { corpus: [hr.jsonl], num_clients: 3 }",
        "training: { num_tokens: 20_000, learning_rate: 1.0e-3, rank: 8 }",
    ):
        assert words in helped


@pytest.mark.parametrize(("department", "count"), [("hr", 2), ("hr", 12), ("it.", 1), ("a-", 3)])
def test_clients_are_named_as_the_partition_names_them(department: str, count: int) -> None:
    labels = {"department": [department] * 40}
    found = Partition(num_clients=count).clients(labels)
    assert numbered(department, count) == tuple(found)


# ── dialogues ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def taught(material: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run on dialogues, with a coreset of them: where it is, what was printed, what was said."""
    out = tmp_path_factory.mktemp("taught") / "out"
    chosen = {
        "method": "federated",
        "budget": 0.3,
        "clustering": {"min_cluster_size": 2, "noise": "singletons"},
        "projection": {"name": "random", "num_dimensions": 4},
    }
    file = written(
        material,
        "taught.yaml",
        departments=DIALOGUES,
        partition={"name": "dirichlet", "field": "group", "alpha": 5},
        selection=chosen,
        row_length=128,
    )
    done = fedgraft("federate", file, "--out", out)
    assert done.exit_code == 0, done.output
    return out, done.stdout, done.stderr


def test_departments_of_dialogues_learn_and_score_answers_and_the_page_says_so(
    taught: tuple[Path, str, str],
) -> None:
    out, printed, _ = taught
    result = Federation.load(out)
    assert result.history.examples == "dialogues"
    assert "predicts the held-out answers of" in result.verdict
    assert f"fedgraft chat instruct --adapter {out / 'adapters' / 'finance'}" in printed
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Nats per token on the answers that clients hold out" in page
    assert "Dialogues of each client" in page
    assert all(sum(done.chosen.values()) > 0 for done in result.history.rounds)
    assert all(part.scores for part in result.history.final)


def test_dialogues_longer_than_a_row_are_left_out_and_told_everywhere(
    taught: tuple[Path, str, str],
) -> None:
    out, printed, said = taught
    result = Federation.load(out)
    assert sum(result.history.left_out.values()) == 6
    assert result.history.left_out["finance-1"] == 3
    assert "finance-1" in printed
    assert "are longer than a row of 128 tokens and were left out" in printed
    assert "3 too long for a row" in said
    assert "left out though counted here: finance-1 3" in (out / "report.html").read_text()


def test_dialogues_are_shared_out_by_their_group_and_copies_are_dropped_and_told(
    taught: tuple[Path, str, str],
) -> None:
    out, _, _ = taught
    found = Federation.load(out).partition
    assert found
    assert set(found.labels) == {"rooms", "pages"}
    assert sum(sum(one.counts) for one in found.clients) == 2 * 59
    assert found.num_duplicates == 2
    assert "2 that say what others say were dropped" in (out / "report.html").read_text()


def test_no_dialogue_leaves_its_client(taught: tuple[Path, str, str]) -> None:
    """Every file that is not a client's own is looked through, the page and the ledger too."""
    out, _, _ = taught
    theirs = [file for file in out.rglob("*") if file.is_file() and "clients" not in file.parts]
    assert {"ledger.jsonl", "report.html", "result.json"} <= {file.name for file in theirs}
    for canary in ("keep page", "In room"):
        assert not [file for file in theirs if canary.encode() in file.read_bytes()]


@pytest.mark.parametrize(
    ("departments", "expected"),
    [
        (
            {"hr": {"corpus": ["hr.jsonl"], "dialogues": ["hr-asked.jsonl"]}},
            "departments.hr: Value error, expected either corpus or dialogues, found both",
        ),
        (
            {"hr": {"corpus": ["hr.jsonl"]}, "finance": DIALOGUES["finance"]},
            "found corpus in hr; dialogues in finance; nats per token of text and of answers",
        ),
        (
            {"hr": {"dialogues": ["hr.jsonl"]}},
            "expected dialogues (`messages`) or instructions (`instruction`, `response`), found",
        ),
        (
            {"hr": {"dialogues": ["dialogues/test.jsonl"]}},
            "department hr: dialogue 'test/0': expected an answer or a reference",
        ),
        ({"hr": {"dialogues": ["nowhere.jsonl"]}}, "nowhere.jsonl: there is nothing at"),
    ],
)
def test_dialogues_that_cannot_be_are_refused(
    material: Path, tmp_path: Path, departments: dict[str, Any], expected: str
) -> None:
    file = written(material, "amiss.yaml", departments=departments)
    assert expected in refused(fedgraft("federate", file, "--out", tmp_path / "out"))


def test_dialogues_ask_for_a_model_with_a_template(material: Path, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(material / "base", tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    file = written(material, "amiss.yaml", departments=DIALOGUES, model=str(plain))
    message = refused(fedgraft("federate", file, "--out", tmp_path / "out"))
    assert "expected a tokenizer with a chat template" in message


@pytest.mark.parametrize(
    ("partition", "expected"),
    [
        ({"num_clients": 3}, "num_clients comes from num_clients of each department"),
        ({"seed": 3}, "seed comes from the plan's seed"),
        ({"name": "tasks", "field": "group"}, "found tasks by group; take dirichlet"),
        ({"field": "group"}, "found departments by group; take dirichlet"),
    ],
)
def test_a_partition_whose_clients_a_plan_cannot_name_is_refused(
    material: Path, tmp_path: Path, partition: dict[str, Any], expected: str
) -> None:
    file = written(material, "amiss.yaml", departments=DIALOGUES, partition=partition)
    assert expected in refused(fedgraft("federate", file, "--out", tmp_path / "out"))


# ── on other machines ────────────────────────────────────────────────────────────────────────────


def test_over_flower_the_plan_is_submitted_waited_for_and_told(
    ran: tuple[Path, str, str], material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "out", []

    def submit(plan: Path, model: Path, place: Path, *, superlink: str, **_: object) -> int:
        for name in ("history.json", "ledger.jsonl"):
            (place / name).write_bytes((ran[0] / name).read_bytes())
        (place / "adapters" / "hr").mkdir(parents=True)
        seen.append((Plan.model_validate_json(plan.read_bytes()), model, superlink))
        return 7

    monkeypatch.setattr(flower, "submit", submit)
    monkeypatch.setattr(flower, "status", lambda *_, **__: "finished:completed")
    elsewhere = {"hr": {"num_clients": 2}, "finance": {"corpus": ["not/here.jsonl"]}}
    file = written(material, "elsewhere.yaml", departments=elsewhere)
    done = fedgraft("federate", file, "--out", out, "--superlink", "company")
    assert done.exit_code == 0, done.output
    ((plan, model, superlink),) = seen
    assert plan.departments == {"hr": ("hr-1", "hr-2"), "finance": ("finance-1",)}
    assert model == material / "instruct"
    assert superlink == "company"
    assert Federation.load(out).partition is None
    assert (out / "report.html").is_file()


def test_a_run_that_flower_stopped_is_told_with_how_to_go_on(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower, "submit", lambda *_, **__: 7)
    monkeypatch.setattr(flower, "status", lambda *_, **__: "finished:failed")
    file = written(material)
    message = refused(
        fedgraft("federate", file, "--out", tmp_path / "out", "--superlink", "company")
    )
    assert "expected run 7 to complete, found it finished:failed" in message
    assert "the same command goes on after its last whole round" in message


def test_without_flower_the_extra_is_named(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(federation, "flower")
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    monkeypatch.delitem(sys.modules, "fedgraft.federation.flower")
    message = refused(
        fedgraft("federate", written(material), "--out", tmp_path / "out", "--superlink", "x")
    )
    assert "pip install 'fedgraft[flower]'" in message


def client_file(folder: Path, **changes: Any) -> Path:
    whole = {"name": "hr-1", "model": "instruct", "corpus": ["hr.jsonl"], "state": "state"}
    file = folder / "hr-1.yaml"
    file.write_text(yaml.safe_dump(whole | changes), encoding="utf-8")
    return file


def test_a_client_is_served_with_the_text_and_model_of_its_file(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[tuple[Client, Path]] = []
    monkeypatch.setattr(resident, "serve", lambda client, place: served.append((client, place)))
    socket = tmp_path / "hr-1.sock"
    done = fedgraft("federate", "serve", client_file(material), "--socket", socket)
    assert done.exit_code == 0, done.output
    ((client, place),) = served
    assert (client.name, place) == ("hr-1", socket)
    assert "hr-1" in done.stdout
    refusal = client.answer(
        Question(kind="sizes", round=0, phase="select", settings={"model": "another"})
    )
    assert refusal.fault == "refused"


def test_a_clients_file_with_faults_is_refused_with_all_of_them(material: Path) -> None:
    file = client_file(material, state=7, modle="x")
    message = refused(fedgraft("federate", "serve", file, "--socket", "s"))
    assert "expected a client, found 2 faults" in message
    assert "modle: Extra inputs are not permitted" in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dialogues": ["hr-asked.jsonl"]}, "expected either corpus or dialogues, found both"),
        ({"corpus": []}, "expected either corpus or dialogues, found neither; name its text"),
    ],
)
def test_a_client_has_a_corpus_or_dialogues(
    material: Path, changes: dict[str, Any], expected: str
) -> None:
    file = client_file(material, **changes)
    assert expected in refused(fedgraft("federate", "serve", file, "--socket", "s"))


def test_a_client_of_its_own_file_has_the_dialogues_that_it_would_have_in_one_process(
    material: Path, tmp_path: Path
) -> None:
    """The only client of a department: its answers are the same, to the bit."""
    file = written(material, "one.yaml", departments={"finance": DIALOGUES["finance"]})
    plan = FederationFile.load(file, {})
    run(plan, tmp_path / "one")
    own = client_file(
        material,
        **{"name": "finance-1", "corpus": [], "dialogues": ["finance-asked.jsonl"]},
        state=str(tmp_path / "state"),
    )
    client = ClientFile.load(own, {}).client()
    run_rounds(InProcess([client]), plan.plan, plan.model, tmp_path / "other")
    one, other = (
        load_file(tmp_path / way / "adapters" / "finance" / "adapter_model.safetensors")
        for way in ("one", "other")
    )
    assert any(tensor.any() for name, tensor in one.items() if "lora_B" in name)
    assert {n: t.tobytes() for n, t in one.items()} == {n: t.tobytes() for n, t in other.items()}


def test_a_clients_state_stands_beside_its_file(material: Path) -> None:
    assert ClientFile.load(client_file(material), {}).state == material / "state"


# ── the table ────────────────────────────────────────────────────────────────────────────────────


def shown(board: Board) -> str:
    console = Console(width=160, record=True, file=StringIO())
    console.print(board.table())
    return console.export_text()


def test_the_live_table_shows_rounds_losses_bytes_faults_and_who_is_waited_for(
    material: Path,
) -> None:
    board = Board(FederationFile.load(written(material), {}))
    assert "getting ready" in shown(board)
    board.told(Asked(round=1, phase="train", clients=("finance-1", "hr-1", "hr-2")))
    assert shown(board).count("…") == 3
    good = Part(
        client="hr-1",
        department="hr",
        loss=1.25,
        scores={"graft": 2.5},
        bytes_up=1_500_000,
        bytes_down=10,
        seconds=2.0,
    )
    board.told(Answered(round=1, phase="train", part=good))
    late = Part(client="hr-2", department="hr", fault="late")
    board.told(Answered(round=1, phase="train", part=late))
    text = shown(board)
    assert "round 1 of 2, 1.5 MB up, 10 B down" in text
    assert "graft 2.500" in text
    assert "loss 1.250" in text
    assert "late" in text
    assert text.count("…") == 1
    done = Round(
        number=1, parts=(good, late), kept={"hr": "too few"}, means={}, seconds={"train": 2.0}
    )
    board.told(done)
    assert "round 1: 2.0 s; hr keeps its last adapter: too few" in shown(board)


def test_faults_of_a_file_are_errors_of_the_study_family(material: Path) -> None:
    with pytest.raises(StudyError):
        FederationFile.load(written(material, "amiss.yaml", num_rounds=0), {})
    with pytest.raises(FederationError, match="expected a rate for fedadam"):
        FederationFile.load(written(material, "amiss.yaml", optimiser={"name": "fedadam"}), {})
