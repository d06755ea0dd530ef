"""Laws of rounds: what a federation makes, and what it does when clients do not come along."""

import hashlib
import resource
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tests.federation.clients import (
    DEPARTMENTS,
    TRAINING,
    Spoiled,
    client,
    clients,
    documents,
    kept_by,
    plan,
    silent,
)

from fedgraft.errors import ArtefactError, FederationError, TrainingError
from fedgraft.evaluation.perplexity import document_perplexity
from fedgraft.federation.aggregate import Rule
from fedgraft.federation.asking import Answered, Asked, Event
from fedgraft.federation.client import Client
from fedgraft.federation.history import History, Round
from fedgraft.federation.in_process import InProcess
from fedgraft.federation.ledger import Ledger
from fedgraft.federation.message import FAULTS, Answer, Question
from fedgraft.federation.plan import Plan
from fedgraft.federation.rounds import run_rounds
from fedgraft.federation.standing import Stored, load_standing
from fedgraft.federation.update import Size
from fedgraft.federation.workplace import Workplace
from fedgraft.models import open_model
from fedgraft.provenance import Record, derive_seed
from fedgraft.testing import save_tiny, tiny_tokenizer
from fedgraft.text.dialogues import Dialogue, Message
from fedgraft.text.packing import pack
from fedgraft.training.adapter import add_factors, factors, open_adapted
from fedgraft.training.settings import AdapterSettings, Lora
from fedgraft.training.trainer import train

Whole = Callable[[Plan], tuple[Path, History]]
RULES: tuple[Rule, ...] = ("fedavg", "ffa", "fedsa", "flora", "flexlora", "fedex")


def slow(value: str) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny(tmp_path_factory.mktemp("models") / "graft", num_layers=1)


def run(model: Path, folder: Path, asked: Plan | None = None, spoil: Any = None) -> History:
    found = clients(model, folder / "state")
    exchange = Spoiled(found, spoil) if spoil else InProcess(found)
    return run_rounds(exchange, asked or plan(), model, folder / "out")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Where a plan has run undisturbed; each plan runs once."""
    runs: dict[str, tuple[Path, History]] = {}

    def find(asked: Plan) -> tuple[Path, History]:
        key = asked.model_dump_json()
        if key not in runs:
            folder = tmp_path_factory.mktemp("whole")
            runs[key] = folder, run(model, folder, asked)
        return runs[key]

    return find


def made(folder: Path) -> dict[str, str]:
    """File -> hash of what it holds, of all adapters that a run wrote."""
    files = sorted((folder / "out" / "adapters").rglob("*.safetensors"))
    assert files
    return {f.parent.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_one_client_equals_local_training_to_the_bit(model: Path, tmp_path: Path) -> None:
    workplace = Workplace(model)
    alone = client("finance-1", workplace, tmp_path / "state")
    asked = plan(departments={"finance": ("finance-1",)}, num_rounds=1)
    history = run_rounds(InProcess([alone]), asked, model, tmp_path / "out")

    settings = AdapterSettings.model_validate(TRAINING)
    local = add_factors(open_model(model), settings, derive_seed(0, "adapter", 0))
    rows = pack(
        workplace.tokenizer,
        documents("finance-1", 8)[:6],
        64,
        seed=derive_seed(0, "finance-1"),
    )
    seed = derive_seed(0, "finance-1", 1)
    seeded = settings.model_copy(update={"seed": seed})
    train(local, rows, seeded, tmp_path / "work", label="local")
    expected = factors(local)

    found = Stored(tmp_path / "out/adapters/finance/adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(found[name], tensor), name
    assert any(np.abs(t).max() > 1e-3 for name, t in expected.items() if "lora_B" in name)
    (part,) = history.rounds[0].parts
    assert (part.num_examples, part.counted) == (6, True)
    assert part.drift == pytest.approx(0, abs=1e-6)


class Shuffled(InProcess):
    """Answers come in another order each time."""

    def ask(self, questions: Mapping[str, Question], timeout: float) -> Iterator[Answer]:
        yield from reversed(list(super().ask(questions, timeout)))


def test_the_order_of_clients_is_irrelevant(model: Path, whole: Whole, tmp_path: Path) -> None:
    folder, one = whole(plan())
    found = clients(model, tmp_path / "state")[::-1]
    other = run_rounds(Shuffled(found), plan(), model, tmp_path / "out")
    assert made(folder) == made(tmp_path)
    assert one.final_means == other.final_means


class KilledError(Exception):
    """The process dies here."""


@pytest.mark.parametrize("rule", [rule if rule == "fedsa" else slow(rule) for rule in RULES])
def test_a_run_that_was_stopped_goes_on_as_if_it_never_had(
    rule: Rule, model: Path, whole: Whole, tmp_path: Path
) -> None:
    asked = plan(rule=rule, num_rounds=3)
    folder, _ = whole(asked)

    def dying(answer: Answer) -> Answer:
        if answer.round == 2 and answer.client == "hr-1" and answer.kind == "adapter":
            raise KilledError
        return answer

    with pytest.raises(KilledError):
        run(model, tmp_path / "torn", asked, dying)
    rounds: list[int] = []

    def watch(event: Event) -> None:
        if isinstance(event, Round):
            rounds.append(event.number)

    found = clients(model, tmp_path / "torn" / "state")
    history = run_rounds(InProcess(found), asked, model, tmp_path / "torn" / "out", watch=watch)
    assert rounds == [2, 3]
    assert [done.number for done in history.rounds] == [1, 2, 3]
    assert made(folder) == made(tmp_path / "torn")


def test_a_finished_run_asks_nobody_and_more_rounds_go_on(
    model: Path, whole: Whole, tmp_path: Path
) -> None:
    folder, _ = whole(plan(num_rounds=3))
    first = run(model, tmp_path / "more", plan(num_rounds=2))
    nobody = InProcess([])
    again = run_rounds(nobody, plan(num_rounds=2), model, tmp_path / "more" / "out")
    assert again == first
    run(model, tmp_path / "more", plan(num_rounds=3))
    assert made(folder) == made(tmp_path / "more")
    assert sorted(f.name for f in (tmp_path / "more/out/rounds").iterdir()) == ["0002", "0003"]


def test_below_quorum_the_last_adapter_stays_and_the_run_says_so(
    model: Path, whole: Whole, tmp_path: Path
) -> None:
    absent = silent("hr-1", "hr-2", number=2)
    asked = plan(quorum=0.5)
    history = run(model, tmp_path / "both", asked, absent)
    folder, _ = whole(plan(num_rounds=1))
    both, short = made(tmp_path / "both"), made(folder)
    assert both["hr"] == short["hr"]
    assert both["finance"] != short["finance"]
    last = history.rounds[1]
    assert last.kept.keys() == {"hr"}
    assert "expected updates of 1 of 2 clients, found 0" in last.kept["hr"]
    assert "hr-1 (late), hr-2 (late)" in last.kept["hr"]
    assert [part.fault for part in last.parts] == [None, None, "late", "late"]


def test_a_stricter_quorum_keeps_the_adapter_where_one_is_missing(
    model: Path, tmp_path: Path
) -> None:
    history = run(model, tmp_path, plan(quorum=0.6), silent("hr-1", number=1))
    assert history.rounds[0].kept.keys() == {"hr"}
    assert history.rounds[1].kept == {}


def test_with_one_missing_the_others_make_the_round(model: Path, tmp_path: Path) -> None:
    history = run(model, tmp_path, plan(), silent("hr-1"))
    assert all(done.kept == {} for done in history.rounds)
    hr = history.rounds[1].means["hr"]["department"]
    assert hr.num_clients == 1


@pytest.mark.parametrize("rule", ["fedavg", slow("flora"), "flexlora", "fedex"])
def test_the_adapter_that_is_written_is_the_model_that_was_scored(
    rule: Rule, model: Path, whole: Whole
) -> None:
    """Changes and all: the PEFT directory opens as any, and predicts as the federation said."""
    sizes = {"hr-2": Lora(rank=2, alpha=6.0)} if rule in ("flora", "flexlora") else {}
    asked = plan(rule=rule, sizes=sizes)
    folder, history = whole(asked)
    workplace = Workplace(model)
    for part in history.final:
        number = int(part.client[-1]) - 1 + 2 * (part.department == "hr")
        held_out = documents(part.client, 6 + 3 * number)[4 + 3 * number :]
        adapter = folder / "out" / "adapters" / part.department
        opened = open_adapted(model, adapter)
        assert isinstance(opened, PeftModel)
        if part.client == "hr-2" and rule == "flexlora":
            continue  # its own is of rank 2; the one that is written is the larger
        found = document_perplexity(opened, workplace.tokenizer, held_out, window=64)
        assert found.nats_per_token == pytest.approx(part.scores["department"], rel=1e-5)
        assert part.scores["department"] != pytest.approx(6.0, abs=0.01)


@pytest.mark.parametrize("rule", ["flora", "fedex"])
def test_exact_rules_add_what_merging_and_averaging_the_clients_adds(
    rule: Rule, whole: Whole
) -> None:
    folder, _ = whole(plan(rule=rule, num_rounds=1))
    written = Stored(folder / "out/adapters/hr/adapter_model.safetensors")
    own = {
        name: Stored(kept_by(folder / "state", name, folder / "out") / "adapter-0001.safetensors")
        for name in DEPARTMENTS["hr"]
    }
    weights = {"hr-1": 10 / 23, "hr-2": 13 / 23}
    for name in written:
        if name.endswith("lora_A.weight"):
            b = name.replace("lora_A", "lora_B")
            ideal = sum(
                weights[one] * (own[one][b].astype("f8") @ own[one][name].astype("f8"))
                for one in own
            )
            found = written[b].astype("f8") @ written[name].astype("f8")
            assert np.linalg.norm(found - ideal) <= 1e-6 * np.linalg.norm(ideal)


def test_every_scored_model_has_a_name(whole: Whole) -> None:
    _, history = whole(plan())
    first, second = history.rounds
    assert all(part.scores.keys() == {"graft", "client"} for part in first.parts)
    assert all(part.scores.keys() == {"department", "client"} for part in second.parts)
    assert all(part.scores.keys() == {"department", "client"} for part in history.final)
    folder, shared = whole(plan(share="organisation"))
    assert all(part.scores.keys() == {"global", "client"} for part in shared.final)
    assert made(folder).keys() == {"organisation"}
    for means in (first.means, history.final_means):
        assert means.keys() == {"all", "finance", "hr"}
        assert {m: mean.num_clients for m, mean in means["all"].items()} == dict.fromkeys(
            means["all"], 4
        )
    parts = [part for part in first.parts if part.department == "hr"]
    mean = first.means["hr"]["client"]
    values = [part.scores["client"] for part in parts]
    assert mean.unweighted == pytest.approx(np.mean(values))
    weights = [part.num_scored for part in parts]
    assert mean.weighted == pytest.approx(np.average(values, weights=weights))


def test_training_helps_and_a_fresh_adapter_changes_nothing(model: Path, whole: Whole) -> None:
    _, history = whole(plan(num_rounds=3))
    graft = history.rounds[0].means["all"]["graft"].weighted
    last = history.final_means["all"]["department"].weighted
    assert last < graft - 0.05
    workplace = Workplace(model)
    size = Size(4, 16.0)
    held_out = documents("finance-1", 6)[4:]
    scored = workplace.score(size, workplace.fresh(size, 5), {}, held_out, window=64, label="fresh")
    first = next(part for part in history.rounds[0].parts if part.client == "finance-1")
    assert scored.nats_per_token == pytest.approx(first.scores["graft"], rel=1e-6)


def test_a_round_asks_a_share_of_every_department(model: Path, tmp_path: Path) -> None:
    history = run(model, tmp_path / "one", plan(sampled=0.5, num_rounds=4))
    for done in history.rounds:
        assert sorted(part.department for part in done.parts) == ["finance", "hr"]
    asked = [tuple(part.client for part in done.parts) for done in history.rounds]
    assert len(set(asked)) > 1
    again = run(model, tmp_path / "two", plan(sampled=0.5, num_rounds=4))
    assert asked == [tuple(part.client for part in done.parts) for done in again.rounds]


def test_a_newcomer_in_fedsa_starts_from_its_departments_mean_b(
    model: Path, tmp_path: Path
) -> None:
    seen: dict[tuple[str, int], Question] = {}

    class Listening(InProcess):
        def ask(self, questions: Mapping[str, Question], timeout: float) -> Iterator[Answer]:
            for name, question in questions.items():
                if question.phase == "train":
                    seen[name, question.round] = question
            yield from super().ask(questions, timeout)

    departments = {"hr": ("hr-1", "hr-2", "hr-3")}
    found = clients(model, tmp_path / "state", departments)
    exchange = Listening(found)
    spoil = silent("hr-3", number=1)

    class Late(Listening):
        def ask(self, questions: Mapping[str, Question], timeout: float) -> Iterator[Answer]:
            others = {n: q for n, q in questions.items() if (n, q.round) != ("hr-3", 1)}
            yield from super().ask(others, timeout)
            for name, question in questions.items():
                if (name, question.round) == ("hr-3", 1):
                    yield spoil(Answer(client=name, kind=question.kind, round=1))

    exchange = Late(found)
    asked = plan(departments=departments, rule="fedsa", num_rounds=2)
    run_rounds(exchange, asked, model, tmp_path / "out")
    folders = [kept_by(tmp_path / "state", f"hr-{n}", tmp_path / "out") for n in (1, 2)]
    kept = [Stored(folder / "adapter-0001.safetensors") for folder in folders]
    newcomer, old = seen["hr-3", 2].tensors, seen["hr-1", 2].tensors
    assert all("lora_A" in name for name in old)
    weights = [4 / 11, 7 / 11]
    some = 0
    for name, tensor in newcomer.items():
        if "lora_B" in name:
            mean = sum(w * one[name] for w, one in zip(weights, kept, strict=True))
            assert np.allclose(tensor, mean, atol=1e-7)
            some += bool(np.abs(tensor).max())
    assert some


@pytest.mark.parametrize("rule", ["fedavg", "fedsa"])
def test_what_clients_keep_of_another_run_counts_for_nothing(
    rule: Rule, model: Path, tmp_path: Path
) -> None:
    """The clients of a deployment have one folder for all federations that they take part in."""
    before = clients(model, tmp_path / "state")
    run_rounds(InProcess(before), plan(rule=rule, num_rounds=4, seed=7), model, tmp_path / "first")
    asked = plan(rule=rule, num_rounds=3)
    here = run_rounds(InProcess(before), asked, model, tmp_path / "second")
    later = clients(model, tmp_path / "state")
    anew = run_rounds(InProcess(later), asked, model, tmp_path / "third")
    assert all(part.counted for done in here.rounds for part in done.parts)
    alone = run(model, tmp_path / "alone", asked)
    for history in (here, anew):
        scores = [[part.scores for part in done.parts] for done in history.rounds]
        assert scores == [[part.scores for part in done.parts] for done in alone.rounds]


@pytest.mark.parametrize(("rule", "up", "down"), [("ffa", "B", "B"), ("fedsa", "A", "A")])
def test_rules_of_one_factor_send_that_factor_alone(
    rule: Rule, up: str, down: str, whole: Whole
) -> None:
    folder, _ = whole(plan(rule=rule))
    entries = Ledger(folder / "out/ledger.jsonl").entries
    for entry in entries:
        if entry.phase == "train":
            assert {i.name[-8] for i in entry.items if "lora" in i.name} == {up}
    downs = {e.round: e.bytes_down for e in entries if e.phase == "train" and e.client == "hr-1"}
    assert downs[2] < 0.8 * downs[1]
    assert down == up


def test_ffa_never_moves_a(whole: Whole) -> None:
    folder, _ = whole(plan(rule="ffa"))
    kept = [Stored(file) for file in sorted((folder / "state").rglob("adapter-*.safetensors"))]
    assert len(kept) == 8
    written = Stored(folder / "out/adapters/hr/adapter_model.safetensors")
    for name in kept[0]:
        if ".lora_A." in name:
            assert all(np.array_equal(one[name], written[name]) for one in kept)
        else:
            assert not np.array_equal(kept[0][name], kept[-1][name])


def test_flora_begins_every_round_with_another_adapter(whole: Whole) -> None:
    folder, _ = whole(plan(rule="flora"))
    rounds = [
        load_standing(folder / f"out/rounds/{number:04d}/hr").adapters[Size(4, 16.0)]
        for number in (1, 2)
    ]
    for name, tensor in rounds[0].items():
        assert (".lora_B." in name) == np.array_equal(tensor, rounds[1][name])
        assert (".lora_B." in name) == (not np.abs(tensor).max())


def test_a_run_that_stopped_before_its_last_scores_takes_them(
    model: Path, whole: Whole, tmp_path: Path
) -> None:
    def dying(answer: Answer) -> Answer:
        if answer.kind == "scores":
            raise KilledError
        return answer

    with pytest.raises(KilledError):
        run(model, tmp_path, plan(), dying)
    again, (_, undisturbed) = run(model, tmp_path, plan()), whole(plan())
    assert [part.scores for part in again.final] == [part.scores for part in undisturbed.final]


def test_numbers_travel_as_float16_where_the_plan_says_so(whole: Whole) -> None:
    full, (narrow, half) = whole(plan())[0], whole(plan(wire="float16"))
    full_up, half_up = (
        sum(e.bytes_up for e in Ledger(folder / "out/ledger.jsonl").entries)
        for folder in (full, narrow)
    )
    assert half_up < 0.7 * full_up
    final, graft = half.final_means["all"]["department"], half.rounds[0].means["all"]["graft"]
    assert final.weighted < graft.weighted - 0.02
    items = [
        item
        for entry in Ledger(narrow / "out/ledger.jsonl").entries
        for item in entry.items
        if "lora" in item.name
    ]
    assert {item.dtype for item in items} == {"float16"}


def test_nothing_but_what_the_ledger_allows_leaves(whole: Whole) -> None:
    folder, history = whole(plan())
    entries = Ledger(folder / "out/ledger.jsonl").entries
    assert {entry.kind for entry in entries} == {"sizes", "adapter", "scores"}
    up = sum(part.bytes_up for done in history.rounds for part in done.parts)
    assert up == sum(entry.bytes_up for entry in entries if entry.phase == "train") > 0
    text = documents("hr-1", 1)[0].text
    for file in (folder / "out").rglob("*"):
        if file.is_file():
            assert text[:20].encode() not in file.read_bytes()


@pytest.mark.parametrize(
    "optimiser", ["fedadam", slow("fedavgm"), slow("fedyogi"), slow("fedadagrad")]
)
def test_a_server_optimiser_steps_and_survives_a_stop(
    optimiser: str, model: Path, whole: Whole, tmp_path: Path
) -> None:
    rate = None if optimiser == "fedavgm" else 1e-2
    asked = plan(optimiser={"name": optimiser, "rate": rate}, num_rounds=3)
    folder, _ = whole(asked)
    run(model, tmp_path / "torn", asked.model_copy(update={"num_rounds": 2}))
    run(model, tmp_path / "torn", asked)
    assert made(folder) == made(tmp_path / "torn")
    assert made(folder) != made(whole(plan(num_rounds=3))[0])


@pytest.mark.parametrize("robust", ["median", "trimmed_mean", "clipping", "krum"])
def test_robust_rules_make_rounds_or_say_how_many_clients_they_need(
    robust: str, whole: Whole
) -> None:
    given = {"name": robust, "num_hostile": 0}
    together = {"share": "organisation", "sampled": 0.4} if robust == "krum" else {}
    _, history = whole(plan(robust=given, num_rounds=1, **together))
    if robust == "krum":
        assert "expected at least 3 updates" in history.rounds[0].kept["organisation"]
    else:
        assert history.rounds[0].kept == {}


def test_a_strong_proximal_term_holds_clients_back(whole: Whole) -> None:
    _, free = whole(plan(num_rounds=1))
    _, held = whole(plan(num_rounds=1, proximal=30.0))
    for one, other in zip(free.rounds[0].parts, held.rounds[0].parts, strict=True):
        assert one.moved
        assert other.moved
        assert other.moved < 0.9 * one.moved


def test_events_name_clients_and_rounds(model: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    found = clients(model, tmp_path / "state")
    run_rounds(InProcess(found), plan(num_rounds=1), model, tmp_path / "out", watch=events.append)
    phases = [(e.round, e.phase) for e in events if isinstance(e, Asked)]
    assert phases == [(0, "select"), (1, "train"), (2, "evaluate")]
    assert sum(isinstance(e, Answered) for e in events) == 12
    (done,) = [e for e in events if isinstance(e, Round)]
    assert done.seconds.keys() == {"select", "train", "aggregate", "write"}


# ── what cannot take part ────────────────────────────────────────────────────────────────────


def test_a_client_with_another_model_is_refused_by_hash_before_training(
    model: Path, tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", num_layers=1, seed=3)
    found = clients(model, tmp_path / "state")
    found[0] = client("finance-1", Workplace(other), tmp_path / "state")
    events: list[Event] = []
    settings = plan(num_rounds=1)
    history = run_rounds(InProcess(found), settings, model, tmp_path / "out", watch=events.append)
    faults = [(e.phase, e.part.client) for e in events if isinstance(e, Answered) and e.part.fault]
    assert faults == [("select", "finance-1")]
    assert history.excluded == {"finance-1": FAULTS["other model"]}
    asked = [e.clients for e in events if isinstance(e, Asked) and e.phase == "train"]
    assert asked == [("finance-2", "hr-1", "hr-2")]


def test_a_client_with_another_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    workplace = Workplace(model)
    workplace.__dict__["tokenizer"] = tiny_tokenizer(vocabulary=300)
    stranger = client("finance-1", workplace, tmp_path / "state")
    asked = plan(departments={"finance": ("finance-1",)})
    with pytest.raises(FederationError, match="finance-1: its tokenizer is not that of the model"):
        run_rounds(InProcess([stranger]), asked, model, tmp_path / "out")


def test_a_department_that_nobody_can_stand_for_stops_the_run_before_training(
    model: Path, tmp_path: Path
) -> None:
    workplace = Workplace(model)
    found = clients(model, tmp_path / "state")[:2]
    found.append(client("hr-1", workplace, tmp_path / "state", num=0))
    with pytest.raises(FederationError) as refused:
        run_rounds(InProcess(found), plan(), model, tmp_path / "out")
    assert str(refused.value) == (
        "department hr: expected a client that can take part, found none:\n"
        "  hr-1: it has no example to train on; give it some\n"
        "  hr-2: the connection to it was lost; look whether it is alive"
    )
    assert not (tmp_path / "out/rounds").exists()


def test_one_example_is_enough_to_take_part(model: Path, tmp_path: Path) -> None:
    one = client("hr-1", Workplace(model), tmp_path / "state", num=1, held_out=1)
    asked = plan(departments={"hr": ("hr-1",)}, num_rounds=1)
    history = run_rounds(InProcess([one]), asked, model, tmp_path / "out")
    assert history.rounds[0].parts[0].num_examples == 1


def test_a_rank_above_the_layers_is_refused_before_anybody_is_asked(
    model: Path, tmp_path: Path
) -> None:
    asked = plan(training={**TRAINING, "rank": 999})
    with pytest.raises(TrainingError, match="rank of at most 16, the model's narrowest layer"):
        run(model, tmp_path, asked)
    assert not (tmp_path / "out/rounds").exists()


@pytest.mark.parametrize("changed", ["plan", "model"])
def test_a_run_of_another_plan_or_model_is_not_gone_on_with(
    changed: str, model: Path, tmp_path: Path
) -> None:
    run(model, tmp_path, plan(num_rounds=1))
    before = made(tmp_path)
    asked, given = plan(num_rounds=2, seed=1 if changed == "plan" else 0), model
    if changed == "model":
        given = save_tiny(tmp_path / "other", num_layers=1, seed=3)
    with pytest.raises(FederationError, match="expected a round of this plan and model"):
        run_rounds(InProcess([]), asked, given, tmp_path / "out")
    assert made(tmp_path) == before


def test_fewer_rounds_than_done_are_refused(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path, plan(num_rounds=2))
    with pytest.raises(FederationError, match="at most the 1 rounds of the plan, found 2"):
        run(model, tmp_path, plan(num_rounds=1))


def test_a_broken_round_is_told_with_its_file(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path, plan(num_rounds=1))
    file = tmp_path / "out/rounds/0001/hr/optimiser.safetensors"
    file.write_bytes(b"half")
    with pytest.raises(FederationError, match=r"optimiser.safetensors: expected tensors"):
        run(model, tmp_path, plan(num_rounds=2))


def test_a_full_disk_stops_the_run_and_the_finished_rounds_stay(
    model: Path, whole: Whole, tmp_path: Path
) -> None:
    run(model, tmp_path, plan(num_rounds=1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        with pytest.raises(
            ArtefactError, match=r"could not write .*(rounds are kept|before are whole)"
        ):
            run(model, tmp_path, plan(num_rounds=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run(model, tmp_path, plan(num_rounds=2))
    assert made(tmp_path) == made(whole(plan())[0])


def test_an_adapter_says_what_it_is_for(model: Path, whole: Whole) -> None:
    folder, _ = whole(plan(num_rounds=1))
    record = Record.read(folder / "out/adapters/hr")
    assert record
    assert record.kind == "adapter"
    assert record.inputs["model"] == Workplace(model).content_hash
    assert record.settings["department"] == "hr"


def test_clients_of_one_name_are_refused(model: Path, tmp_path: Path) -> None:
    found = clients(model, tmp_path)
    twice: list[Client] = [*found, found[0]]
    with pytest.raises(FederationError, match="different names, found 'finance-1' twice"):
        InProcess(twice)


def test_a_claim_of_more_examples_than_the_plan_allows_is_refused(
    model: Path, tmp_path: Path
) -> None:
    history = run(model, tmp_path, plan(num_rounds=1, max_examples=12))
    refused = {part.client: part.refused for part in history.rounds[0].parts if part.refused}
    assert refused.keys() == {"hr-2"}
    assert "from 1 to 12, found 13" in str(refused["hr-2"])


def test_a_spoiled_answer_is_refused_by_name_and_the_round_goes_on(
    model: Path, tmp_path: Path
) -> None:
    def spoil(answer: Answer) -> Answer:
        if answer.client == "hr-1" and answer.kind == "adapter":
            payload = {**answer.payload, "note": 1}
            return replace(answer, payload=payload)
        return answer

    history = run(model, tmp_path, plan(num_rounds=1), spoil)
    part = history.rounds[0].parts[2]
    assert part.refused
    assert part.refused.startswith("client 'hr-1': adapter: expected only")
    assert history.rounds[0].kept == {}


def test_one_client_with_dialogues_among_documents_is_refused_by_name_and_the_others_go_on(
    model: Path, tmp_path: Path
) -> None:
    found = clients(model, tmp_path / "state")
    turns = (Message(role="user", content="the mill"), Message(role="assistant", content="river"))
    asked = [Dialogue(id=str(number), messages=turns) for number in range(6)]
    found[-1] = Client("hr-2", Workplace(model), asked, [], tmp_path / "state" / "hr-2")
    events: list[Event] = []
    settings = plan(num_rounds=1)
    history = run_rounds(InProcess(found), settings, model, tmp_path / "out", watch=events.append)
    refused = {e.part.refused for e in events if isinstance(e, Answered) and e.part.refused}
    assert refused == {
        "client 'hr-2': expected documents, as most clients have, found dialogues; let it take "
        "part in a federation of its own"
    }
    assert history.excluded == {"hr-2": refused.pop()}
    assert history.examples == "documents"
    assert [part.client for part in history.rounds[0].parts] == ["finance-1", "finance-2", "hr-1"]
