"""The pages of departments that train together: every figure, every model by its name, no gap."""

import html
import re
from itertools import pairwise
from pathlib import Path

import pytest
from tests.report.example import (
    HOLDINGS,
    MEMBERS,
    TRAFFIC,
    example_departments,
    example_federation,
    example_history,
)
from tests.report.pages import only_sorts
from tests.report.test_page import text_of

from fedgraft.federation.message import FAULTS
from fedgraft.noise import Spent
from fedgraft.report.departments import LABELS, PARTS, learning, time_split
from fedgraft.report.page import render, write_report
from fedgraft.report.words import size
from fedgraft.study.federation import verdict as federation_verdict
from fedgraft.study.result import ALL, NATS, RULE_WORDS, Departments

SPENT = Spent(
    epsilon=3.21,
    delta=1e-5,
    num_rounds=3,
    noise_multiplier=1.1,
    max_norm=0.5,
    words="Which clients took part is hidden from who sees the adapters.",
)


@pytest.fixture(scope="module")
def page() -> str:
    return render(example_departments())


@pytest.fixture(scope="module")
def run_page() -> str:
    return render(example_federation())


def part(text: str, start: str, end: str) -> str:
    begin = text.index(start)
    return text[begin : text.index(end, begin)]


def small(result: Departments) -> Departments:
    """The same with one federation, which is drawn in a fraction of the time."""
    return result.model_copy(update={"federations": result.federations[:1]})


def test_the_same_result_gives_the_same_page(page: str, run_page: str, tmp_path: Path) -> None:
    for result, expected in ((example_departments(), page), (example_federation(), run_page)):
        result.write(tmp_path)
        assert write_report(tmp_path).read_text(encoding="utf-8") == expected


def test_the_pages_refer_to_nothing_outside_themselves(page: str, run_page: str) -> None:
    for one in (page, run_page):
        assert re.findall(r'(?:src|href)="(?!#)', one) == []
        assert re.findall(r"url\((?!#)", one) == []
        assert only_sorts(one)


def test_the_verdict_stands_before_any_figure(page: str, run_page: str) -> None:
    for one, result in ((page, example_departments()), (run_page, example_federation())):
        plain = html.unescape(one)
        assert plain.index(result.verdict) < plain.index("<svg")


def test_every_mean_and_spread_of_every_arm_is_in_the_table(page: str) -> None:
    result = example_departments()
    table = part(text_of(page), "Held-out text", "Right, and as instructed")
    for arm in result.words:
        cells = [result.summary[arm][place][NATS] for place in (*MEMBERS, ALL)]
        row = " ".join(f"{cell.mean:.3f} ± {cell.stdev:.3f}" for cell in cells)
        assert re.search(rf"{re.escape(LABELS[arm])} \w+ {re.escape(row)}", table), arm


def test_the_model_that_was_scored_is_named_for_every_arm(page: str) -> None:
    table = part(text_of(page), "Arm model scored", "Right, and as instructed")
    for arm, model in {
        "graft": "graft",
        "clients": "client",
        "fedavg": "department",
        "fedsa": "client",
        "global": "global",
        "alone": "department",
        "pooled": "global",
    }.items():
        assert f"{LABELS[arm]} {model} " in table


def test_clients_have_a_mean_that_is_weighted_and_one_that_is_not(page: str) -> None:
    result = example_departments()
    table = part(text_of(page), "Held-out text", "Right, and as instructed")
    for arm in ("clients", "fedsa"):
        weighted, alike = (found[arm]["hr"][NATS] for found in (result.weighted, result.summary))
        assert weighted.mean != alike.mean
        row = part(table, f"{LABELS[arm]}, weighted by documents", "±")
        assert f"{result.weighted[arm]['finance'][NATS].mean:.3f}" in row
    assert f"{LABELS['fedavg']}, weighted" not in table


def test_an_arm_that_was_not_scored_in_a_department_is_missing_there() -> None:
    result = small(example_departments(rules=("fedavg",)))
    summary = {arm: dict(found) for arm, found in result.summary.items()}
    del summary["alone"]["hr"]
    text = text_of(render(result.model_copy(update={"summary": summary})))
    row = part(
        part(text, "Held-out text", "Right, and"), "department, pooled department", "all text"
    )
    assert row.count("missing") == 1
    assert "hr missing" in part(text, "How much better each", "Change in perplexity")


def test_a_score_that_no_arm_has_gets_no_table() -> None:
    result = small(example_departments(rules=("fedavg",)))
    summary = {
        arm: {place: {NATS: found[NATS]} for place, found in places.items()}
        for arm, places in result.summary.items()
    }
    text = text_of(render(result.model_copy(update={"summary": summary, "weighted": {}})))
    assert "Right, and as instructed" not in text
    assert "Held-out text" in text


def test_one_seed_is_told_as_one_seed() -> None:
    text = text_of(render(small(example_departments((1,), ("fedavg",)))))
    assert "One seed; run more for a spread." in text
    assert "±" not in part(text, "Held-out text", "The model scored")


def test_each_department_has_a_learning_curve_of_each_rule_that_begins_at_the_graft(
    page: str,
) -> None:
    curves = part(page, "Learning, round by round", "How the rounds went")
    for department in (*MEMBERS, "All departments"):
        panel = part(curves, f'aria-label="{department.replace("_", " ")}"', "</figure>")
        for label in ("graft alone", "FedAvg", "FedSA-LoRA", "FedEx-LoRA", "one for all"):
            assert f">{label}<" in panel
        ticks = [int(number) for number in re.findall(r">(\d)</text>", panel)]
        assert ticks == [0, 1, 2, 3]


def test_what_a_client_did_not_answer_is_counted_by_name(page: str, run_page: str) -> None:
    text = part(text_of(run_page), "Faults and refusals", "How it was made")
    assert "Of 36 answers these did not count." in text
    assert "FedAvg finance-1 late 1" in text
    assert "FedAvg hr-2 expected finite numbers in 'x', found NaN or infinity; lower 1" in text
    assert "FedAvg 2 hr hr: expected updates of 3 of 3 clients, found 2" in text
    every = part(text_of(page), "Faults and refusals", "How it was made")
    assert every.count("finance-1 late 1") == len(example_departments().federations)


def test_clients_that_took_no_part_are_named_on_the_page_with_the_reason() -> None:
    result = example_federation()
    reasons = {
        "hr-3": FAULTS["other model"],
        "hr-4": "client 'hr-4': expected documents, as most clients have, found dialogues",
    }
    history = result.history.model_copy(
        update={
            "rounds": tuple(r for r in result.history.rounds if r.number != 2),
            "excluded": reasons,
        }
    )
    page = render(
        result.model_copy(update={"history": history, "verdict": federation_verdict(history)})
    )
    text = text_of(page)
    assert "hr-3, hr-4 took no part, for the reasons below. Every answer of the others was" in text
    told = part(text, "Faults and refusals", "How it was made")
    assert "Who cannot take part at all was asked once." in told
    assert f"FedAvg hr-3 {reasons['hr-3']} in all" in told
    assert "FedAvg hr-4 expected documents, as most clients have, found dialogues in all" in told


def test_a_run_in_which_all_answers_counted_says_so() -> None:
    result = example_federation()
    history = result.history.model_copy(
        update={"rounds": tuple(r for r in result.history.rounds if r.number != 2)}
    )
    text = text_of(render(result.model_copy(update={"history": history})))
    assert "None: all 24 answers counted." in text


def test_privacy_is_spoken_of_where_epsilon_and_delta_are_known_and_nowhere_else(
    page: str, run_page: str
) -> None:
    spent = text_of(render(example_federation(SPENT)))
    assert "Privacy FedAvg: epsilon 3.21 at delta 1e-05, over 3 rounds" in spent
    assert SPENT.words in spent
    assert "epsilon 3.21 at delta 1e-05" in example_federation(SPENT).verdict
    for one in (page, run_page):
        assert not re.search(r"epsilon|delta|priva|\bDP\b", text_of(one), re.IGNORECASE)


def test_departments_that_were_mixed_are_named_round_by_round(run_page: str) -> None:
    result = example_federation()
    first, *others = result.history.rounds
    first = first.model_copy(update={"clusters": (("hr", "it_support"), ("finance",))})
    history = result.history.model_copy(update={"rounds": (first, *others)})
    text = text_of(render(result.model_copy(update={"history": history})))
    assert "FedAvg 1 hr and it support; finance" in text
    assert "moved towards each other" not in text_of(run_page)


def test_traffic_is_what_the_ledger_adds_up_to(page: str, run_page: str) -> None:
    up, down = (
        sum(getattr(c, way) for c in TRAFFIC.values()) for way in ("bytes_up", "bytes_down")
    )
    text = part(text_of(run_page), "What travelled", "Who has what")
    assert f"FedAvg 60 {size(up)} {size(down)}" in text
    for kind, carried in TRAFFIC.items():
        assert f"{kind} {carried.num_messages} {size(carried.bytes_up)}" in text
    rows = part(text_of(page), "What travelled", "Who has what")
    for rule in ("fedavg", "fedsa", "fedex"):
        assert f"{RULE_WORDS[rule]} 60 {size(up)} {size(down)}" in rows


def test_the_parts_of_the_time_are_the_time_on_the_clock() -> None:
    history = example_history()
    split = time_split(history)
    assert list(split) == list(PARTS)
    assert sum(split.values()) == pytest.approx(history.seconds)
    assert split["training"] < split["waiting"]
    assert split["aggregation"] == pytest.approx(0.25 * len(history.rounds))


def test_the_picture_of_the_partition_has_every_client_and_count(run_page: str) -> None:
    text = part(text_of(run_page), "Who has what", "Faults and refusals")
    for one in HOLDINGS.clients:
        (count,) = (number for number in one.counts if number)
        row = f"{one.client} {one.department.replace('_', ' ')} {count} {one.num_train} 6"
        assert row in text
    assert "0.75" in text


def test_clients_elsewhere_have_no_picture() -> None:
    text = text_of(render(example_federation().model_copy(update={"partition": None})))
    assert "Who has what" not in text


def test_the_last_adapters_are_told_weighted_and_unweighted_by_the_name_of_the_model(
    run_page: str,
) -> None:
    table = part(text_of(run_page), "After the last round", "Learning, round by round")
    for place, models in example_history().final_means.items():
        for model, mean in models.items():
            cells = f"{model} {mean.weighted:.3f} {mean.unweighted:.3f} {mean.num_clients}"
            assert cells in table, (place, model)
            assert mean.weighted != mean.unweighted


@pytest.mark.parametrize("num_rounds", [1, 3])
def test_learning_begins_at_the_graft_and_ends_with_the_last_scores(num_rounds: int) -> None:
    history = example_history(num_rounds=num_rounds)
    line = learning(history, "hr")["department"]
    assert sorted(line) == list(range(num_rounds + 1))
    assert line[0] == history.rounds[0].means["hr"]["graft"].weighted
    assert line[num_rounds] == history.final_means["hr"]["department"].weighted


def test_fedsa_learns_in_its_clients_alone() -> None:
    assert set(learning(example_history("fedsa"), "hr")) == {"client"}


def test_learning_goes_down_in_the_example_and_in_its_curves() -> None:
    rounds = [r.means["hr"] for r in example_history().rounds]
    nats = [next(iter(m.values())).weighted for m in rounds]
    assert all(before > after for before, after in pairwise(nats))


@pytest.mark.parametrize(
    ("num_bytes", "words"), [(0, "0 B"), (999, "999 B"), (1_500, "1.5 kB"), (2.5e9, "2.5 GB")]
)
def test_bytes_are_told_in_their_unit(num_bytes: float, words: str) -> None:
    assert size(num_bytes) == words
