"""Laws of a choice in a federation: two exchanges, and what clients keep between them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.federation.clients import (
    DEPARTMENTS,
    TRAINING,
    Spoiled,
    documents,
    kept_by,
    plan,
    silent,
)

from fedgraft.errors import FederationError
from fedgraft.federation.choice import CHOSEN
from fedgraft.federation.client import Client
from fedgraft.federation.history import History
from fedgraft.federation.in_process import InProcess
from fedgraft.federation.ledger import Ledger
from fedgraft.federation.message import Answer, Question
from fedgraft.federation.plan import Plan
from fedgraft.federation.rounds import run_rounds
from fedgraft.federation.standing import Stored
from fedgraft.federation.workplace import Workplace
from fedgraft.selection.coreset import Selection
from fedgraft.selection.reader import Reader
from fedgraft.testing import save_tiny

NUM = {"finance-1": 14, "finance-2": 9, "hr-1": 18, "hr-2": 12}
"""Examples of each client."""
ALIGNED: dict[str, Any] = {
    "method": "federated",
    "clustering": {"min_cluster_size": 2, "noise": "singletons"},
    "server_clustering": {"min_cluster_size": 2, "noise": "singletons"},
    "projection": {"name": "random", "num_dimensions": 4},
    "budget": 0.3,
}
PAPER = Selection.paper(2).model_dump(mode="json", exclude_unset=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_tiny(tmp_path_factory.mktemp("models") / "graft", num_layers=1)


def members(model: Path, state: Path, **settings: Any) -> list[Client]:
    workplace = Workplace(model)
    return [
        Client(name, workplace, documents(name, num), [], state / name, **settings)
        for name, num in NUM.items()
    ]


def asked(selection: Mapping[str, Any] | None, **fields: Any) -> Plan:
    training = {**TRAINING, "num_tokens": 300}
    return plan(**{"selection": selection, "passes": 1, "training": training} | fields)


def run(model: Path, out: Path, plan: Plan, spoil: Any = None, **settings: Any) -> History:
    found = members(model, out / "clients", **settings)
    exchange = Spoiled(found, spoil) if spoil else InProcess(found)
    return run_rounds(exchange, plan, model, out)


def adapter(out: Path, group: str = "hr") -> dict[str, np.ndarray]:
    return dict(Stored(out / "adapters" / group / "adapter_model.safetensors"))


def assert_same_adapters(one: Path, other: Path) -> None:
    for group in DEPARTMENTS:
        first, second = adapter(one, group), adapter(other, group)
        assert first.keys() == second.keys()
        assert all(np.array_equal(first[name], second[name]) for name in first)


def chosen(out: Path, client: str, number: int) -> list[int]:
    file = kept_by(out / "clients", client, out) / f"{CHOSEN}-{number:04d}.json"
    found: list[int] = json.loads(file.read_text())
    return found


def test_the_budget_of_a_department_is_met_and_examples_are_the_clients_own(
    model: Path, tmp_path: Path
) -> None:
    history = run(model, tmp_path, asked(ALIGNED))
    assert history.final == ()  # nobody holds anything out, so nobody is asked for scores
    for done in history.rounds:
        for names in DEPARTMENTS.values():
            budget = round(0.3 * sum(NUM[name] for name in names))
            assert sum(done.chosen[name] for name in names) == budget
        for part in done.parts:
            places = chosen(tmp_path, part.client, done.number)
            assert part.num_examples == len(places) == done.chosen[part.client]
            assert places == sorted(set(places))
            assert places[0] >= 0
            assert places[-1] < NUM[part.client]


def test_a_client_reads_its_examples_once_for_all_rounds(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, int]] = []
    for name in ("features", "gains"):
        made = getattr(Reader, name)

        def counted(
            self: Reader, examples: Any, *args: Any, made: Any = made, name: str = name, **kw: Any
        ) -> Any:
            read.append((name, len(examples)))
            return made(self, examples, *args, **kw)

        monkeypatch.setattr(Reader, name, counted)
    history = run(model, tmp_path, asked({**ALIGNED, "quality": 0.2}, num_rounds=3))
    assert len(history.rounds) == 3
    assert all(sum(done.chosen.values()) for done in history.rounds)
    assert sorted(read) == sorted(
        (name, num) for name in ("features", "gains") for num in NUM.values()
    )


def test_the_paper_takes_one_example_of_each_server_cluster(model: Path, tmp_path: Path) -> None:
    history = run(model, tmp_path, asked(PAPER, share="organisation"))
    assert all(sum(done.chosen.values()) < sum(NUM.values()) / 2 for done in history.rounds)
    told = [entry for entry in Ledger(tmp_path / "ledger.jsonl").entries if entry.phase == "select"]
    assert {entry.kind for entry in told} == {"sizes", "centroids"}


def test_without_a_server_level_or_by_chance_each_gives_its_share(
    model: Path, tmp_path: Path
) -> None:
    own = {key: value for key, value in ALIGNED.items() if key != "server_clustering"}
    for method in ("random", "local"):
        settings = own if method == "local" else {"budget": 0.5}
        history = run(model, tmp_path / method, asked({**settings, "method": method}))
        share = settings["budget"]
        for done in history.rounds:
            for names in DEPARTMENTS.values():
                total = sum(done.chosen[name] for name in names)
                assert total == round(share * sum(NUM[name] for name in names))
    random = tmp_path / "random"
    assert chosen(random, "hr-1", 1) != chosen(random, "hr-1", 2)


def test_clients_draw_each_for_itself(model: Path, tmp_path: Path) -> None:
    workplace = Workplace(model)
    alike = [
        Client(name, workplace, documents("the same", 12), [], tmp_path / "clients" / name)
        for name in NUM
    ]
    run_rounds(InProcess(alike), asked({"method": "random", "budget": 0.5}), model, tmp_path)
    assert len({tuple(chosen(tmp_path, name, 1)) for name in NUM}) > 1


def test_all_examples_are_the_same_as_no_selection(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "none", asked(None))
    run(model, tmp_path / "all", asked({"method": "all"}))
    assert_same_adapters(tmp_path / "none", tmp_path / "all")


def test_a_choice_that_is_made_once_asks_for_centroids_once(model: Path, tmp_path: Path) -> None:
    history = run(model, tmp_path, asked({**ALIGNED, "every_round": False}))
    first, second = history.rounds
    assert first.chosen == second.chosen
    entries = Ledger(tmp_path / "ledger.jsonl").entries
    assert sum(entry.kind == "centroids" for entry in entries) == len(NUM)
    for name in first.chosen:
        if first.chosen[name]:
            assert chosen(tmp_path, name, 1) == chosen(tmp_path, name, 2)


@pytest.mark.parametrize("every_round", [True, False])
def test_stopped_between_rounds_and_resumed_is_never_stopped(
    every_round: bool, model: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = {**ALIGNED, "every_round": every_round}
    run(model, whole, asked(settings))
    run(model, parts, asked(settings, num_rounds=1))
    run(model, parts, asked(settings))
    assert_same_adapters(whole, parts)


def test_a_client_that_was_started_anew_knows_its_clusters(model: Path, tmp_path: Path) -> None:
    class Restarted(InProcess):
        """Every question meets a client that has only its folder."""

        def ask(self, questions: Mapping[str, Question], timeout: float) -> Iterator[Answer]:
            self._clients = {one.name: one for one in members(model, tmp_path / "b" / "clients")}
            return super().ask(questions, timeout)

    run(model, tmp_path / "a", asked(ALIGNED, num_rounds=3))
    exchange = Restarted(members(model, tmp_path / "b" / "clients"))
    history = run_rounds(exchange, asked(ALIGNED, num_rounds=3), model, tmp_path / "b")
    assert all(part.counted for done in history.rounds for part in done.parts)
    assert_same_adapters(tmp_path / "a", tmp_path / "b")


OTHERWISE = ("federated", "local", "random")


@pytest.mark.parametrize("method", OTHERWISE)
def test_what_was_trained_on_is_passed_over_while_others_are_left(
    method: str, model: Path, tmp_path: Path
) -> None:
    own = {"federated": ALIGNED, "random": {"budget": 0.3}}.get(
        method, {key: value for key, value in ALIGNED.items() if key != "server_clustering"}
    )
    new = {**own, "method": method, "repeat": False}
    history = run(model, tmp_path, asked(new, num_rounds=3))
    for names in DEPARTMENTS.values():
        budget = round(0.3 * sum(NUM[name] for name in names))
        assert all(sum(done.chosen[name] for name in names) == budget for done in history.rounds)
    for name in NUM:
        rounds = [done.number for done in history.rounds if done.chosen[name]]
        places = [place for number in rounds for place in chosen(tmp_path, name, number)]
        assert len(set(places)) == len(places)


def test_what_all_examples_were_drawn_for_is_drawn_again(model: Path, tmp_path: Path) -> None:
    history = run(
        model, tmp_path, asked({"method": "random", "budget": 0.4, "repeat": False}, num_rounds=6)
    )
    for name, num in NUM.items():
        drawn = [place for done in history.rounds for place in chosen(tmp_path, name, done.number)]
        times = np.bincount(drawn, minlength=num)
        assert 2 <= times.min() <= times.max() <= 3


def test_an_aligned_map_would_choose_the_same_again(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "same", asked({**ALIGNED, "repeat": True}))
    run(model, tmp_path / "new", asked(ALIGNED))
    assert chosen(tmp_path / "same", "hr-1", 1) == chosen(tmp_path / "same", "hr-1", 2)
    assert chosen(tmp_path / "new", "hr-1", 1) == chosen(tmp_path / "same", "hr-1", 1)
    assert not set(chosen(tmp_path / "new", "hr-1", 1)) & set(chosen(tmp_path / "new", "hr-1", 2))


def test_what_another_run_chose_may_be_chosen(model: Path, tmp_path: Path) -> None:
    own = members(model, tmp_path / "clients")
    run_rounds(InProcess(own), asked(ALIGNED, num_rounds=3), model, tmp_path / "before")
    run_rounds(InProcess(own), asked(ALIGNED, sampled=0.5, num_rounds=3), model, tmp_path / "out")
    run(model, tmp_path / "alone", asked(ALIGNED, sampled=0.5, num_rounds=3))
    num_files = 0
    for name in NUM:
        here = kept_by(tmp_path / "clients", name, tmp_path / "out")
        alone = kept_by(tmp_path / "alone" / "clients", name, tmp_path / "alone")
        found = {file.name: file.read_text() for file in here.glob(f"{CHOSEN}-*")}
        assert found == {file.name: file.read_text() for file in alone.glob(f"{CHOSEN}-*")}
        num_files += len(found)
    assert num_files


def test_the_same_question_has_the_same_answer_where_nothing_is_chosen_twice(
    model: Path, tmp_path: Path
) -> None:
    """A round that is asked again passes over what earlier rounds chose, and not its own."""
    settings = asked({**ALIGNED, "repeat": False}, num_rounds=3)
    heard = Heard(members(model, tmp_path / "clients"))
    run_rounds(heard, settings, model, tmp_path / "out")
    first = {(a.client, a.round): a.payload for a in heard.answers if a.kind == "centroids"}
    again = members(model, tmp_path / "clients")
    for question, one in [
        (question, one)
        for question in heard.questions
        if question.kind == "centroids" and question.round == 2
        for one in again
    ]:
        told = one.answer(question).payload
        before = first[one.name, 2]
        assert all(np.array_equal(told[key], before[key]) for key in before)


def test_where_those_left_make_no_cluster_all_begin_anew(model: Path, tmp_path: Path) -> None:
    clusters = {"min_cluster_size": 4, "min_samples": 1}
    settings = {**ALIGNED, "clustering": clusters, "budget": 0.2, "repeat": False}
    history = run(model, tmp_path, asked(settings, share="organisation", num_rounds=12))
    assert all(sum(done.chosen.values()) for done in history.rounds)
    assert not any(done.kept for done in history.rounds)


def test_where_nothing_is_chosen_the_adapter_stays(model: Path, tmp_path: Path) -> None:
    """Clusters larger than any client: all is noise. The released code zeroes the adapter."""
    nothing = {**ALIGNED, "clustering": {"min_cluster_size": 50}}
    history = run(model, tmp_path, asked(nothing))
    for done in history.rounds:
        assert not any(done.chosen.values())
        assert not done.parts
        assert set(done.kept) == set(DEPARTMENTS)
        assert "none chosen" in done.kept["hr"]
    fresh = adapter(tmp_path)
    assert any(tensor.any() for name, tensor in fresh.items() if ".lora_A." in name)


def test_who_tells_no_centroids_is_named_and_the_round_goes_on(model: Path, tmp_path: Path) -> None:
    spoil = silent("hr-2", kind="centroids")
    history = run(model, tmp_path, asked(ALIGNED), spoil)
    for done in history.rounds:
        part = next(part for part in done.parts if part.client == "hr-2")
        assert part.fault == "late"
        assert done.chosen["hr-2"] == 0
        assert done.chosen["hr-1"] > 0
        assert not done.kept


def test_who_tells_no_centroids_is_missing_in_the_quorum(model: Path, tmp_path: Path) -> None:
    spoil = silent("hr-2", kind="centroids")
    history = run(model, tmp_path, asked(ALIGNED, quorum=1.0, num_rounds=1), spoil)
    assert set(history.rounds[0].kept) == {"hr"}
    assert "Without: hr-2 (late)" in history.rounds[0].kept["hr"]


def test_what_is_chosen_once_is_chosen_from_all_who_may_be_asked_later(
    model: Path, tmp_path: Path
) -> None:
    once = {**ALIGNED, "every_round": False}
    history = run(model, tmp_path, asked(once, sampled=0.5, num_rounds=4))
    entries = Ledger(tmp_path / "ledger.jsonl").entries
    assert {entry.client for entry in entries if entry.kind == "centroids"} == set(NUM)
    trained = {part.client for done in history.rounds for part in done.parts}
    assert len(trained) > 2
    assert all(not done.kept for done in history.rounds)


ONCE = {**ALIGNED, "every_round": False}


def late_once(name: str, kind: str) -> Any:
    """The first answer of one kind by a client comes too late."""
    waiting = [name]

    def spoil(answer: Answer) -> Answer:
        if answer.kind == kind and answer.client in waiting:
            waiting.remove(answer.client)
            return replace(answer, payload={}, fault="late")
        return answer

    return spoil


def test_where_examples_are_chosen_once_a_latecomers_share_is_chosen_by_itself(
    model: Path, tmp_path: Path
) -> None:
    history = run(model, tmp_path, asked(ONCE, num_rounds=3), late_once("hr-2", "centroids"))
    first, second, third = history.rounds
    named = [[part.client for part in done.parts if not part.counted] for done in history.rounds]
    assert named == [["hr-2"], [], []]
    assert first.chosen["hr-2"] == 0
    assert second.chosen["hr-2"] == round(0.3 * NUM["hr-2"])
    assert second.chosen == third.chosen
    assert {**second.chosen, "hr-2": 0} == first.chosen
    assert chosen(tmp_path, "hr-2", 2) == chosen(tmp_path, "hr-2", 3)
    assert chosen(tmp_path, "hr-1", 1) == chosen(tmp_path, "hr-1", 3)
    entries = Ledger(tmp_path / "ledger.jsonl").entries
    assert sum(entry.kind == "centroids" for entry in entries) == len(NUM) + 1


def test_a_latecomer_tells_what_it_would_have_told_in_time(model: Path, tmp_path: Path) -> None:
    """The very noise: nothing more is known of it than of those who were there."""
    privacy = {"epsilon": 50.0, "delta": 1e-3, "max_norm": 1.0, "num_cells": 4, "min_count": 1}
    noisy = {
        "method": "federated",
        "projection": {"name": "random", "num_dimensions": 4},
        "budget": 0.3,
        "every_round": False,
        "privacy": {**privacy, "repeatable": True},
    }
    heard: dict[str, list[dict[str, Any]]] = {"in time": [], "late": []}
    for way, told in heard.items():
        late = late_once("hr-2", "centroids") if way == "late" else silent()

        def spoil(answer: Answer, told: Any = told, late: Any = late) -> Answer:
            if answer.client == "hr-2" and answer.kind == "centroids":
                told.append(dict(answer.payload))
            answer = late(answer)
            assert isinstance(answer, Answer)
            return answer

        run(model, tmp_path / way, asked(noisy), spoil)
    (before,), again = heard["in time"], heard["late"]
    assert len(again) == 2
    for payload in again:
        assert all(np.array_equal(payload[key], before[key]) for key in before)


def test_who_stays_silent_is_named_in_every_round_that_asks_it(model: Path, tmp_path: Path) -> None:
    history = run(model, tmp_path, asked(ONCE), silent("hr-2", kind="centroids"))
    named = [[part.client for part in done.parts if not part.counted] for done in history.rounds]
    assert named == [["hr-2"], ["hr-2"]]
    assert history.rounds[1].chosen["hr-2"] == 0


def test_a_latecomer_is_still_known_when_the_run_goes_on(model: Path, tmp_path: Path) -> None:
    settings = asked(ONCE, num_rounds=3)
    run(model, tmp_path / "whole", settings, late_once("hr-2", "centroids"))
    parts = tmp_path / "parts"
    run(model, parts, asked(ONCE, num_rounds=1), late_once("hr-2", "centroids"))
    run(model, parts, asked(ONCE, num_rounds=2))
    run(model, parts, settings)
    assert_same_adapters(tmp_path / "whole", parts)


@pytest.mark.parametrize("every_round", [True, False])
def test_who_was_not_there_at_the_beginning_is_drawn_from_later(
    every_round: bool, model: Path, tmp_path: Path
) -> None:
    """A draw needs to know how much a client has: it is asked again."""
    by_chance = {"method": "random", "budget": 0.5, "every_round": every_round}
    silenced = [0, 1]

    def spoil(answer: Answer) -> Answer:
        if answer.client == "hr-2" and answer.kind == "sizes" and answer.round in silenced:
            return replace(answer, payload={}, fault="late")
        return answer

    first, second = run(model, tmp_path, asked(by_chance), spoil).rounds
    assert [part.fault for part in first.parts if part.client == "hr-2"] == ["late"]
    assert first.chosen["hr-2"] == 0
    assert second.chosen["hr-2"] > 0
    assert all(part.counted for part in second.parts)


def test_centroids_of_another_space_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    def spoil(answer: Answer) -> Answer:
        if answer.client == "hr-2" and answer.kind == "centroids":
            centroids = answer.payload["centroids"]
            assert isinstance(centroids, np.ndarray)
            payload = {**answer.payload, "centroids": np.tile(centroids, 2)}
            return replace(answer, payload=payload)
        return answer

    history = run(model, tmp_path, asked(ALIGNED), spoil)
    part = next(part for part in history.rounds[0].parts if part.client == "hr-2")
    assert part.refused is not None
    assert "'hr-2': expected centroids of 4 dimensions, found 8" in part.refused


def test_an_answer_to_another_question_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    others: dict[str, dict[str, Any]] = {
        "scores": {"num_tokens": 3},
        "centroids": {"num_examples": 3},
    }
    for kind, payload in others.items():

        def spoil(answer: Answer, kind: Any = kind, payload: Any = payload) -> Answer:
            if answer.client == "hr-2" and answer.kind == "centroids":
                return replace(answer, kind=kind, payload=payload)
            return answer

        history = run(model, tmp_path / kind, asked(ALIGNED, num_rounds=1), spoil)
        refused = {part.client: part.refused for part in history.rounds[0].parts if part.refused}
        assert set(refused) == {"hr-2"}
        assert "expected centroids and counts, found num_" in str(refused["hr-2"])


def test_centroids_of_another_round_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    def spoil(answer: Answer) -> Answer:
        replayed = answer.client == "hr-2" and answer.kind == "centroids"
        return replace(answer, round=answer.round - 1) if replayed else answer

    history = run(model, tmp_path, asked(ALIGNED, num_rounds=1), spoil)
    refused = {part.client: part.refused for part in history.rounds[0].parts if part.refused}
    assert set(refused) == {"hr-2"}
    assert "expected centroids of round 1, found those of round 0" in str(refused["hr-2"])


def test_a_claim_of_too_many_examples_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    history = run(model, tmp_path, asked(ALIGNED, max_examples=15))
    refused = {p.client: p.refused for p in history.rounds[0].parts if p.refused}
    assert set(refused) == {"hr-1"}
    assert "18" in str(refused["hr-1"])


def test_points_of_every_example_leave_in_studies_alone(model: Path, tmp_path: Path) -> None:
    points = {k: v for k, v in ALIGNED.items() if k not in ("clustering", "server_clustering")}
    points["clustering"] = {"min_cluster_size": 2, "noise": "singletons"}
    points["method"] = "points"
    refused = run(model, tmp_path / "real", asked(points))
    assert {part.fault for part in refused.rounds[0].parts} == {"refused"}
    shown = run(model, tmp_path / "study", asked(points), shows_points=True)
    assert sum(shown.rounds[0].chosen.values()) > 0


def test_an_adapter_is_not_trained_before_centroids_are_asked_for(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(model, tmp_path, asked(ALIGNED, num_rounds=1))
    for file in (tmp_path / "clients").glob("*/*/choice-*"):
        file.unlink()
    history = run(model, tmp_path, asked({**ALIGNED, "every_round": True}), silent())
    assert len(history.rounds) == 2  # asked again, so that it goes on
    spoiled = asked({**ALIGNED, "every_round": False}, num_rounds=1)
    run(model, tmp_path / "once", spoiled)
    for file in (tmp_path / "once" / "clients").glob("*/*/choice-*"):
        file.unlink()
    history = run(model, tmp_path / "once", asked({**ALIGNED, "every_round": False}))
    assert "expected the clusters of choice 1" in caplog.text
    assert set(history.rounds[1].kept) == set(DEPARTMENTS)


def test_noise_on_cells_is_accounted_for_over_all_exchanges(model: Path, tmp_path: Path) -> None:
    privacy = {
        **{"epsilon": 50.0, "delta": 1e-3, "max_norm": 1.0},
        **{"num_cells": 4, "min_count": 1, "repeatable": True},
    }
    noisy = {
        "method": "federated",
        "projection": {"name": "random", "num_dimensions": 4},
        "budget": 0.3,
        "privacy": privacy,
    }
    history = run(model, tmp_path, asked(noisy))
    assert history.centroids is not None
    assert history.centroids.epsilon == pytest.approx(50.0, rel=1e-6)
    assert history.centroids.num_rounds == 2
    assert history.privacy is None
    assert len(Ledger(tmp_path / "ledger.jsonl").entries) == 3 * len(NUM) + sum(
        sum(n > 0 for n in done.chosen.values()) for done in history.rounds
    )
    with pytest.raises(FederationError, match="expected a round of this plan"):
        run(model, tmp_path, asked(noisy, num_rounds=3))


def test_turbo_compares_examples_by_another_model(model: Path, tmp_path: Path) -> None:
    encoder = save_tiny(tmp_path / "encoder", num_layers=2, seed=5)
    turbo = {**ALIGNED, "encoding": {"encoder": str(encoder), "pooling": "mean"}}
    heard = Heard(members(model, tmp_path / "out" / "clients", encoder=encoder))
    history = run_rounds(heard, asked(turbo), model, tmp_path / "out")
    assert not any(
        str(tmp_path) in str(value) for q in heard.questions for value in q.settings.values()
    )
    assert all(any(done.chosen.values()) for done in history.rounds)


def test_a_round_that_was_begun_twice_was_told_twice(model: Path, tmp_path: Path) -> None:
    privacy = {"epsilon": 50.0, "delta": 1e-3, "max_norm": 1.0, "num_cells": 4, "min_count": 1}
    noisy = {
        "method": "federated",
        "projection": {"name": "random", "num_dimensions": 4},
        "server_clustering": {"min_cluster_size": 2, "noise": "singletons"},
        "budget": 0.3,
        "privacy": {**privacy, "repeatable": True},
    }

    class Stopped(InProcess):
        """Ends the run when the second round is to be trained."""

        def ask(self, questions: Mapping[str, Question], timeout: float) -> Iterator[Answer]:
            first = next(iter(questions.values()))
            if first.phase == "train" and first.round == 2:
                raise KeyboardInterrupt
            return super().ask(questions, timeout)

    with pytest.raises(KeyboardInterrupt):
        run_rounds(Stopped(members(model, tmp_path / "clients")), asked(noisy), model, tmp_path)
    history = run(model, tmp_path, asked(noisy))
    assert history.centroids is not None
    assert history.centroids.num_rounds == 3
    assert history.centroids.epsilon > 50.0


class Heard(InProcess):
    """An exchange that remembers what was asked and answered."""

    def __init__(self, found: list[Client]) -> None:
        super().__init__(found)
        self.questions: list[Question] = []
        self.answers: list[Answer] = []

    def ask(self, questions: Mapping[str, Question], timeout: float) -> Iterator[Answer]:
        self.questions += questions.values()
        for answer in super().ask(questions, timeout):
            self.answers.append(answer)
            yield answer


@pytest.mark.parametrize("name", ["random", "anchors", "nystroem"])
def test_equal_examples_of_two_clients_lie_at_one_place(
    name: str, model: Path, tmp_path: Path
) -> None:
    workplace = Workplace(model)
    alike = [Client(one, workplace, documents("the same", 12), [], tmp_path / one) for one in NUM]
    heard = Heard(alike)
    selection = {**ALIGNED, "projection": {"name": name, "num_dimensions": 4}}
    run_rounds(heard, asked(selection, num_rounds=1), model, tmp_path / "out")
    told = [one.payload["centroids"] for one in heard.answers if one.kind == "centroids"]
    assert len(told) == len(NUM)
    for centroids in told:
        assert isinstance(centroids, np.ndarray)
        assert len(centroids) > 1
        assert np.array_equal(centroids, told[0])


def test_a_seed_alone_travels_for_a_random_map(model: Path, tmp_path: Path) -> None:
    for name, has_tensors in (("random", False), ("anchors", True)):
        heard = Heard(members(model, tmp_path / name / "clients"))
        selection = {**ALIGNED, "projection": {"name": name, "num_dimensions": 4}}
        run_rounds(heard, asked(selection, num_rounds=1), model, tmp_path / name)
        sent = [bool(one.tensors) for one in heard.questions if one.kind == "centroids"]
        assert sent == [has_tensors] * len(NUM)


def test_cells_that_are_not_told_pass_the_gate_as_zeros(model: Path, tmp_path: Path) -> None:
    privacy = {"noise_multiplier": 0.01, "delta": 1e-3, "max_norm": 1.0, "num_cells": 6}
    selection = {
        "method": "federated",
        "projection": {"name": "random", "num_dimensions": 4},
        "server_clustering": {"min_cluster_size": 2, "noise": "singletons"},
        "budget": 0.3,
        "privacy": {**privacy, "min_count": 4, "repeatable": True},
    }
    heard = Heard(members(model, tmp_path / "clients"))
    run_rounds(heard, asked(selection), model, tmp_path / "out")
    told = [one for one in heard.answers if one.kind == "centroids"]
    assert all(one.fault is None for one in told)
    untold: int = 0
    for one in told:
        centroids, counts = one.payload["centroids"], one.payload["counts"]
        assert isinstance(centroids, np.ndarray)
        assert isinstance(counts, np.ndarray)
        assert not centroids[counts == 0].any()
        untold += int(np.count_nonzero(counts == 0))
    assert untold
    asked_for = {
        one.settings["num_exchanges"] for one in heard.questions if one.kind == "centroids"
    }
    assert asked_for == {2}


def test_examples_are_read_as_often_as_the_plan_says(model: Path, tmp_path: Path) -> None:
    most, step = 4000, 64
    training = {**TRAINING, "num_tokens": most, "batch_tokens": step}
    read = {}
    for passes in (1, 3, 500):
        heard = Heard(members(model, tmp_path / f"{passes}" / "clients"))
        plan = asked(None, passes=passes, num_rounds=1, training=training)
        run_rounds(heard, plan, model, tmp_path / f"{passes}")
        ours = {one.kind: one.payload for one in heard.answers if one.client == "finance-2"}
        read[passes] = ours["adapter"]["num_tokens"]
    assert read[3] == pytest.approx(3 * read[1], abs=2 * step)
    assert read[500] == pytest.approx(most, abs=step)


def test_a_client_with_another_encoder_refuses(model: Path, tmp_path: Path) -> None:
    """Everybody's points must be made by the same weights."""
    encoder = save_tiny(tmp_path / "encoder", num_layers=1, seed=5)
    turbo = {**ALIGNED, "encoding": {"encoder": str(encoder)}}

    class Elsewhere(InProcess):
        def ask(self, questions: Mapping[str, Question], timeout: float) -> Iterator[Answer]:
            changed = {
                name: replace(one, settings={**one.settings, "encoder": "sha256:other"})
                if one.kind == "centroids" and name == "hr-1"
                else one
                for name, one in questions.items()
            }
            return super().ask(changed, timeout)

    exchange = Elsewhere(members(model, tmp_path / "clients", encoder=encoder))
    history = run_rounds(exchange, asked(turbo, num_rounds=1), model, tmp_path / "out")
    faults = {part.client: part.fault for part in history.rounds[0].parts if part.fault}
    assert faults == {"hr-1": "other model"}
    history = run(model, tmp_path / "without", asked(turbo, num_rounds=1))
    assert {part.fault for part in history.rounds[0].parts} == {"other model"}
