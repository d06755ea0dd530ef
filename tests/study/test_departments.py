"""A study of departments, tiny and real: one budget, the same test, and nobody's text elsewhere."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tests.study.small import page, write_lines, write_material, write_study

from fedgraft.errors import FederationError, StudyError
from fedgraft.evaluation.scorecard import FOLLOWED, RIGHT_AND_FOLLOWED
from fedgraft.federation.history import Round
from fedgraft.federation.ledger import Ledger
from fedgraft.federation.partition import Partition
from fedgraft.federation.rounds import run_rounds
from fedgraft.provenance import RECORD, Record
from fedgraft.report.page import render
from fedgraft.study import arms, departments, together
from fedgraft.study.departments import means, over_seeds, verdict
from fedgraft.study.material import Clients, Material, shared_out
from fedgraft.study.result import ALL, NATS, Departments, Result, Scored, Together
from fedgraft.study.study import Study
from fedgraft.study.together import holdings, num_tokens, traffic
from fedgraft.text.corpus import Document, Splits

TRAINING = {"num_tokens": 256, "learning_rate": 1e-2, "batch_tokens": 128, "rank": 2}
FEDERATION = {"partition": {"num_clients": 2}, "num_rounds": 2, "training": TRAINING}
RULES = ["fedavg", "fedsa"]


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A study that was run, and what was said on the way."""

    material: Path
    out: Path
    result: Departments
    said: list[str] = field(default_factory=list)

    @property
    def stages_done(self) -> list[str]:
        titles = [line for line in self.said if not line.startswith(" ")]
        return [title for title in titles if not title.endswith(": done already")]


def changed(**changes: Any) -> dict[str, Any]:
    """Changes that make the small study one of departments."""
    own = {
        "departments": {
            name: {"corpus": [f"place:many/{name}.jsonl"]} for name in ("hr", "finance")
        },
        "federation": {**FEDERATION, "rules": RULES},
        "scale": None,
        "adapters": None,
        "tuning": None,
        "seeds": [1],
    }
    return own | changes


def load(material: Path, file: Path, **changes: Any) -> Study:
    return Study.load(write_study(file, **changed(**changes)), {"place": material})


def run_small(material: Path, out: Path, **changes: Any) -> Ran:
    said: list[str] = []
    study = load(material, out.with_suffix(".yaml"), **changes)
    result = departments.run(study, out, say=said.append)
    return Ran(material=material, out=out, result=result, said=said)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_material(tmp_path_factory.mktemp("material"))
    for name in ("hr", "finance"):
        write_lines(folder / "many" / f"{name}.jsonl", [page(name, n) for n in range(90)])
    return folder


@pytest.fixture(scope="module")
def ran(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return run_small(material, tmp_path_factory.mktemp("study") / "out")


def test_every_arm_is_scored_in_every_department_under_the_name_of_its_model(ran: Ran) -> None:
    models: dict[str, set[str]] = {}
    for one in ran.result.scored:
        models.setdefault(one.arm, set()).add(one.model)
    assert models == {
        "graft": {"graft"},
        "clients": {"client"},
        "fedavg": {"department"},
        "fedsa": {"client"},
        "global": {"global"},
        "alone": {"department"},
        "pooled": {"global"},
    }
    for arm in models:
        found = {one.department for one in ran.result.scored if one.arm == arm}
        assert found == {"hr", "finance"}
        assert set(ran.result.summary[arm]["hr"]) == {NATS, FOLLOWED, RIGHT_AND_FOLLOWED}
    assert list(ran.result.weighted) == ["clients", "fedsa"]


def test_every_arm_has_one_budget_for_the_whole_organisation(ran: Ran) -> None:
    budgets: dict[str, int] = {}
    for file in (ran.out / "seed-1").rglob("adapter/fedgraft.json"):
        record = Record.read(file.parent)
        assert record
        arm = file.relative_to(ran.out / "seed-1").parts[0]
        budgets[arm] = budgets.get(arm, 0) + record.settings["num_tokens"]
    (first, *others) = ran.result.federations
    plan = first.history.plan
    together_ = 2 * 4 * plan["training"]["num_tokens"]  # type: ignore[index]
    assert budgets == dict.fromkeys(("clients", "alone", "pooled"), together_)
    assert set(ran.result.tokens.values()) == {together_}
    assert "graft" not in ran.result.tokens
    assert all(len(one.history.rounds) == 2 for one in (first, *others))


def test_training_together_is_better_than_the_graft_alone(ran: Ran) -> None:
    summary = ran.result.summary
    for arm in summary:
        if arm != "graft":
            assert summary[arm][ALL][NATS].mean < summary["graft"][ALL][NATS].mean, arm
    assert "better than the graft alone" in ran.result.verdict


def test_clients_of_fedsa_share_a_and_keep_b(ran: Ran) -> None:
    folder = ran.out / "seed-1" / "fedsa" / "adapters"
    one, other = (
        load_file(folder / name / "adapter_model.safetensors") for name in ("hr-1", "hr-2")
    )
    for name in one:
        same = np.array_equal(one[name], other[name])
        assert same == (".lora_A." in name), name


def test_the_ledger_of_each_federation_is_what_its_traffic_says(ran: Ran) -> None:
    for place, found in zip((*RULES, "global"), ran.result.federations, strict=True):
        ledger = Ledger(ran.out / "seed-1" / place / "ledger.jsonl")
        assert found.traffic == traffic(ran.out / "seed-1" / place / "ledger.jsonl")
        assert sum(c.num_messages for c in found.traffic.values()) == len(ledger.entries)
        assert sum(c.bytes_up for c in found.traffic.values()) == sum(
            entry.bytes_up for entry in ledger.entries
        )


def test_a_finished_stage_keeps_adapters_and_records_and_no_state(ran: Ran) -> None:
    for place in (*RULES, "global"):
        folder = ran.out / "seed-1" / place
        names = {entry.name for entry in folder.iterdir()}
        assert names == {"adapters", "history.json", "ledger.jsonl", "scored.json", RECORD}


def test_a_finished_study_is_not_run_again(ran: Ran) -> None:
    again = run_small(ran.material, ran.out)
    assert again.stages_done == []
    assert again.result == ran.result


def test_one_more_rule_runs_that_rule_alone(ran: Ran, tmp_path: Path) -> None:
    out = Path(shutil.copytree(ran.out, tmp_path / "out"))
    more = {"federation": {**FEDERATION, "rules": [*RULES, "flora"]}}
    again = run_small(ran.material, out, **more)
    assert again.stages_done == ["seed 1: train together, FLoRA"]
    kept = [one for one in again.result.scored if one.arm != "flora"]
    assert kept == list(ran.result.scored)


def test_a_federation_that_was_interrupted_goes_on_to_the_same_adapters(
    ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(ran.out, tmp_path / "out"))
    shutil.rmtree(out / "seed-1" / "fedavg")
    seen = []

    def interrupted(*arguments: Any, watch: Any) -> Any:
        def watched(event: Any) -> None:
            watch(event)
            if isinstance(event, Round):
                seen.append(event.number)
                raise KeyboardInterrupt

        return run_rounds(*arguments, watch=watched)

    monkeypatch.setattr(together, "run_rounds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_small(ran.material, out)
    monkeypatch.undo()
    again = run_small(ran.material, out)
    assert seen == [1]
    assert again.stages_done == ["seed 1: train together, FedAvg"]
    assert [done.number for done in again.result.federations[0].history.rounds] == [1, 2]
    for department in ("hr", "finance"):
        place = Path("seed-1", "fedavg", "adapters", department, "adapter_model.safetensors")
        assert (out / place).read_bytes() == (ran.out / place).read_bytes()


def test_the_result_names_no_place_on_this_machine(ran: Ran) -> None:
    text = (ran.out / "result.json").read_text(encoding="utf-8")
    assert str(ran.material) not in text
    assert str(ran.out) not in text


def test_the_page_of_a_real_study_is_drawn(ran: Ran) -> None:
    text = render(ran.result)
    assert "None: all" in text
    assert ">missing<" not in text


def test_a_study_of_arms_may_federate_its_adapters(ran: Ran, tmp_path: Path) -> None:
    file = write_study(
        tmp_path / "study.yaml", **changed(federation=FEDERATION, scale={"grid": [1.0]})
    )
    study = Study.load(file, {"place": ran.material})
    assert study.kind == "arms"
    result = arms.run(study, tmp_path / "out")
    assert isinstance(result, Result)
    assert {(a.department, a.seed) for a in result.adapters} == {("hr", 1), ("finance", 1)}
    for adapter in result.adapters:
        assert adapter.nats_per_token_after < adapter.nats_per_token_before
        assert adapter.followed_after is not None
    (found,) = result.federations
    assert len(found.history.final) == 4
    assert "Learning, round by round" in render(result)


# ── who has what ─────────────────────────────────────────────────────────────────────────────────


def documents(department: str, count: int) -> Splits[Document]:
    pages = [
        Document(
            id=str(n),
            text=f"{department} page {n}",
            source=department,
            facts={"publisher": f"p{n % 3}"},
        )
        for n in range(count)
    ]
    return Splits(train=tuple(pages[6:]), validation=tuple(pages[:4]), test=tuple(pages[4:6]))


PARTITIONS = (
    Partition(num_clients=2),
    Partition(name="iid", num_clients=3),
    Partition(name="quantity", num_clients=2, exponent=0.5),
    Partition(name="dirichlet", num_clients=2, alpha=50.0, field="publisher"),
    Partition(name="tasks", field="publisher"),
)


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda partition: str(partition.name))
def test_each_document_is_with_one_client_of_its_department_in_its_own_part(
    partition: Partition,
) -> None:
    departments_ = {"hr": documents("hr", 60), "finance": documents("finance", 45)}
    clients: Clients = {}
    for seed in range(20):  # some draws leave a client without anything held out
        try:
            clients = shared_out(departments_, partition, seed)
            break
        except StudyError:
            continue
    assert list(clients) == ["hr", "finance"]
    for department, ours in clients.items():
        assert all(name.startswith(f"{department}-") for name in ours)
        for part in ("train", "validation", "test"):
            whole = {d.id for d in getattr(departments_[department], part)}
            owned = [d.id for split in ours.values() for d in getattr(split, part)]
            assert sorted(owned) == sorted(whole)


def test_another_seed_shares_out_differently_and_the_same_seed_alike() -> None:
    splits = {"hr": documents("hr", 60)}
    one, same, other = (shared_out(splits, Partition(num_clients=2), s) for s in (1, 1, 3))
    assert one == same != other


def test_clients_without_text_to_hold_out_are_named_all_at_once() -> None:
    splits = {name: documents(name, 9) for name in ("hr", "finance")}
    bare = {
        name: Splits(train=s.train, validation=s.validation[:1], test=())
        for name, s in splits.items()
    }
    with pytest.raises(StudyError) as error:
        shared_out(bare, Partition(num_clients=2), 1)
    message = str(error.value)
    assert "ask for fewer clients or add text" in message
    assert message.count("nothing for validation") >= 2
    assert "hr-" in message
    assert "finance-" in message


def test_a_department_with_fewer_documents_than_clients_is_named() -> None:
    with pytest.raises(StudyError, match="department hr: expected at least 1 example"):
        shared_out({"hr": documents("hr", 7)}, Partition(num_clients=9), 1)


def test_a_field_that_documents_lack_is_named_with_the_department() -> None:
    partition = Partition(name="dirichlet", num_clients=2, field="author")
    with pytest.raises(StudyError, match=r"department hr: expected a label .* 'author'"):
        shared_out({"hr": documents("hr", 30)}, partition, 1)


def test_holdings_count_every_document_of_every_client() -> None:
    splits = {"hr": documents("hr", 60), "finance": documents("finance", 45)}
    partition = Partition(num_clients=2)
    found = holdings(shared_out(splits, partition, 1), partition)
    assert found.labels == ("finance", "hr")
    assert sum(sum(one.counts) for one in found.clients) == 105
    assert sum(one.num_train for one in found.clients) == 93
    assert {one.department for one in found.clients} == {"hr", "finance"}


def test_holdings_of_a_label_count_that_label() -> None:
    clients = {"hr": {"hr-1": documents("hr", 30), "hr-2": documents("hr", 12)}}
    by_publisher = Partition(name="dirichlet", num_clients=2, field="publisher")
    found = holdings(clients, by_publisher)
    assert found.labels == ("p0", "p1", "p2")
    assert [one.counts for one in found.clients] == [(10, 10, 10), (4, 4, 4)]
    assert found.skew == pytest.approx(0)


# ── means ────────────────────────────────────────────────────────────────────────────────────────

clients_scores = st.lists(
    st.tuples(st.floats(0.1, 9.0), st.integers(1, 500)), min_size=1, max_size=5
)


def of_clients(found: list[tuple[float, int]], seed: int = 1) -> list[Scored]:
    return [
        Scored(
            arm="clients",
            department="hr",
            seed=seed,
            model="client",
            client=f"hr-{number}",
            num_documents=weight,
            scores={NATS: nats},
        )
        for number, (nats, weight) in enumerate(found)
    ]


@given(clients_scores)
def test_a_weighted_mean_counts_each_document_and_the_other_each_client(
    found: list[tuple[float, int]],
) -> None:
    scored = of_clients(found)
    alike = means(scored)["clients"][1]["hr"][NATS]
    weighted = means(scored, weighted=True)["clients"][1]["hr"][NATS]
    total = sum(weight for _, weight in found)
    assert alike == pytest.approx(sum(nats for nats, _ in found) / len(found))
    assert weighted == pytest.approx(sum(nats * weight for nats, weight in found) / total)


@given(st.lists(clients_scores, min_size=2, max_size=4))
def test_a_summary_goes_from_the_lowest_seed_to_the_highest(
    seeds: list[list[tuple[float, int]]],
) -> None:
    scored = [one for seed, found in enumerate(seeds) for one in of_clients(found, seed)]
    summary = over_seeds(means(scored))["clients"][ALL][NATS]
    assert summary.num_seeds == len(seeds)
    assert summary.lowest <= summary.mean + 1e-9
    assert summary.mean <= summary.highest + 1e-9


def test_a_score_that_one_department_lacks_has_no_mean_over_departments() -> None:
    scored = [
        Scored(arm="alone", department="hr", seed=1, model="department", scores={NATS: 1.0}),
        Scored(
            arm="alone",
            department="it",
            seed=1,
            model="department",
            scores={NATS: 2.0, FOLLOWED: 0.5},
        ),
    ]
    assert means(scored)["alone"][1][ALL] == {NATS: 1.5}
    assert means(scored, weighted=True) == {}


def test_the_verdict_names_the_best_rule_and_what_is_lost_against_text_at_one_place() -> None:
    nats = {"graft": 2.0, "fedavg": 1.8, "fedex": 1.7, "clients": 1.9, "pooled": 1.5}
    scored = [
        Scored(arm=arm, department="hr", seed=1, model="department", scores={NATS: value})
        for arm, value in nats.items()
    ]
    words = verdict(over_seeds(means(scored)))
    assert "25.9% better than the graft alone (perplexity, FedEx-LoRA, the best of 2" in words
    assert "18.1% better than with each client by itself" in words
    assert "22.1% worse than with all text at one place" in words
    assert "The last of the rules, FedAvg, is 10.5% worse" in words
    assert "Right" not in words


def test_without_a_rule_the_verdict_says_that_it_has_none() -> None:
    scored = [Scored(arm="graft", department="hr", seed=1, model="graft", scores={NATS: 1.0})]
    assert "No rule was scored" in verdict(over_seeds(means(scored)))


# ── settings ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapters": TRAINING}, "trains the adapters of the departments; take `adapters` out"),
        ({"tuning": {"num_tokens": 5}}, "compares adapters over the graft; take `tuning` out"),
        ({"scale": {"grid": [1.0, 0.5]}}, "searches for no scale; name one alone"),
        ({"federation": {**FEDERATION, "seed": 3}}, "seed: comes from the study's `seeds`"),
        ({"federation": {**FEDERATION, "window": 64}}, "window: comes from .*evaluation.window"),
        (
            {"federation": {**FEDERATION, "partition": {"seed": 3}}},
            "partition: .*the seed comes from `seeds`",
        ),
        ({"federation": {**FEDERATION, "rules": ["ffa", "ffa"]}}, "given twice"),
        (
            {"federation": {**FEDERATION, "rules": ["ffa"], "share": "organisation"}},
            "the one that all share; take it out",
        ),
        (
            {
                "federation": {
                    **FEDERATION,
                    "rules": ["fedavg", "flora"],
                    "optimiser": {"name": "fedadam", "rate": 0.1},
                }
            },
            "federation with rule flora: .*fedadam steps from the last factors",
        ),
        (
            {"federation": {**FEDERATION, "rounds": 3, "num_rounds": 0}},
            r"federation\.num_rounds: (.|\n)*federation\.rounds: Extra inputs",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    material: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(StudyError, match=message):
        load(material, tmp_path / "study.yaml", **changes)


def test_privacy_and_mixing_are_checked_for_every_rule_before_anything_runs(
    material: Path, tmp_path: Path
) -> None:
    privacy = {"epsilon": 8.0, "delta": 1e-5, "max_norm": 0.5}
    federation = {**FEDERATION, "rules": ["fedavg", "flora"], "privacy": privacy}
    with pytest.raises(StudyError, match=r"with rule flora: .*no bound on what one client changes"):
        load(material, tmp_path / "study.yaml", federation=federation)
    wide = {**FEDERATION, "rules": ["fedavg"], "privacy": {**privacy, "delta": 0.3}}
    with pytest.raises(StudyError, match=r"less than 1 / 4 clients, found 0\.3"):
        load(material, tmp_path / "study.yaml", federation=wide)


def test_an_impossible_optimiser_is_refused(material: Path, tmp_path: Path) -> None:
    federation = {**FEDERATION, "rules": ["fedavg"], "optimiser": {"name": "fedadam"}}
    with pytest.raises(FederationError, match="expected a rate for fedadam"):
        load(material, tmp_path / "study.yaml", federation=federation)


def test_a_study_of_another_kind_is_refused_with_who_runs_it(
    material: Path, tmp_path: Path
) -> None:
    of_arms = load(material, tmp_path / "study.yaml", federation=None)
    with pytest.raises(StudyError, match=r"one of arms; run it with fedgraft\.study\.arms\.run"):
        departments.run(of_arms, tmp_path / "out")
    of_departments = load(material, tmp_path / "study.yaml")
    with pytest.raises(StudyError, match=r"`federation\.rules`.*fedgraft\.study\.departments\.run"):
        arms.run(of_departments, tmp_path / "out")


def test_a_rank_above_the_narrowest_layer_is_refused(material: Path, tmp_path: Path) -> None:
    federation = {**FEDERATION, "training": {**TRAINING, "rank": 4096}}
    from fedgraft.errors import TrainingError

    with pytest.raises(TrainingError, match="expected a rank of at most 16"):
        arms.run(
            load(material, tmp_path / "s.yaml", federation=federation, scale={"grid": [1.0]}),
            tmp_path / "out",
        )


def test_tokens_are_counted_over_all_clients_and_rounds(material: Path, tmp_path: Path) -> None:
    study = load(material, tmp_path / "study.yaml")
    assert study.federation
    clients = {"hr": ("a", "b", "c"), "finance": ("d",)}
    plan = study.federation.plan("x", clients)
    assert num_tokens(plan) == 2 * 4 * 256
    assert num_tokens(plan.model_copy(update={"sampled": 0.5})) == 2 * (2 + 1) * 256
    assert json.loads(plan.model_dump_json())["rule"] == "fedavg"


def test_material_of_departments_is_that_of_a_study_of_arms(material: Path, tmp_path: Path) -> None:
    one = Material.load(load(material, tmp_path / "a.yaml"))
    other = Material.load(load(material, tmp_path / "b.yaml", federation=None))
    assert one.test_hash == other.test_hash
    assert isinstance(next(iter(one.splits.values())), Splits)


def test_a_federation_of_a_study_says_its_rule_and_seed(ran: Ran) -> None:
    found = [(one.rule, one.shared, one.seed) for one in ran.result.federations]
    assert found == [
        ("fedavg", False, 1),
        ("fedsa", False, 1),
        ("fedavg", True, 1),
    ]
    assert all(isinstance(one, Together) for one in ran.result.federations)
