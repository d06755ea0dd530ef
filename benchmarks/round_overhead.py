"""What a federated round costs beyond the training of its clients, in one process.

    .venv/bin/python benchmarks/round_overhead.py                    # about ten minutes on 2 cores
    .venv/bin/python benchmarks/round_overhead.py --tokens 60000     # of each client in a round

Side by side, turn about: a bare loop that trains every client's factors with the trainer alone (no
messages, checks, checkpoints or scores), and rounds of the federation. The model is the embedded
one, the text that of the fictional company, in 12 clients. What scoring takes is shown apart: a
round scores the adapter that each client got and the one that it made.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from fedgraft.federation.client import Client
from fedgraft.federation.in_process import InProcess
from fedgraft.federation.plan import Plan
from fedgraft.federation.rounds import run_rounds
from fedgraft.federation.update import BOTH
from fedgraft.federation.workplace import Workplace
from fedgraft.pocket.company import write_company
from fedgraft.pocket.weights import folder
from fedgraft.progress import silenced
from fedgraft.text.corpus import Corpus, Splits
from fedgraft.text.packing import pack
from fedgraft.training.settings import AdapterSettings

DEPARTMENTS = ("finance", "hr", "engineering", "it_support")
NUM_CLIENTS, ROW_LENGTH = 3, 256


def bare_loop(
    workplace: Workplace, splits: dict[str, Splits], training: AdapterSettings, place: Path
) -> float:
    """Seconds to train every client once, with nothing around it."""
    size = Plan(name="bare", departments={"a": ("b",)}, num_rounds=1, training=training).size_of("")
    start = workplace.fresh(size, 0)
    parts = [s.train[n::NUM_CLIENTS] for s in splits.values() for n in range(NUM_CLIENTS)]
    rows = [pack(workplace.tokenizer, part, ROW_LENGTH, seed=0) for part in parts]
    started = time.monotonic()
    for number, one in enumerate(rows):
        with silenced():
            workplace.train(
                size, start, {}, one, training, place / str(number),
                trained=BOTH, proximal=0.0, label="bare",
            )  # fmt: skip
    return time.monotonic() - started


def federated(
    workplace: Workplace, splits: dict[str, Splits], training: AdapterSettings, place: Path
) -> tuple[float, float, dict[str, float]]:
    """Seconds of a round, seconds of scoring in it, and where the time went."""
    departments, clients = {}, []
    for department, split in splits.items():
        names = tuple(f"{department}-{n}" for n in range(NUM_CLIENTS))
        departments[department] = names
        clients += [
            Client(
                name,
                workplace,
                split.train[n::NUM_CLIENTS],
                split.validation[n::NUM_CLIENTS],
                place / "state" / name,
            )
            for n, name in enumerate(names)
        ]
    plan = Plan(name="cost", departments=departments, num_rounds=1, training=training)
    (done,) = run_rounds(InProcess(clients), plan, folder / "instruct", place / "out").rounds
    scoring = sum(part.seconds_scoring for part in done.parts)
    return sum(done.seconds.values()), scoring, done.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    training = AdapterSettings(num_tokens=asked.tokens, learning_rate=2e-3, rank=8)
    workplace = Workplace(folder / "instruct")
    with tempfile.TemporaryDirectory() as place:
        company = write_company(Path(place) / "company")
        splits = {
            d: Corpus.load(company / f"year2/{d}.jsonl", department=d).split() for d in DEPARTMENTS
        }
        ratios = []
        for number in range(asked.rounds):
            bare = bare_loop(workplace, splits, training, Path(place) / f"bare-{number}")
            total, scoring, seconds = federated(
                workplace, splits, training, Path(place) / f"round-{number}"
            )
            ratios.append((total - scoring) / bare)
            print(
                f"bare loop {bare:.1f} s; round {total:.1f} s, of it scoring {scoring:.1f} s; "
                f"without scoring {ratios[-1]:.3f} of the bare loop; "
                + ", ".join(f"{name} {value:.2f}" for name, value in seconds.items()),
                flush=True,
            )
    print(
        f"overhead without scoring: {statistics.median(ratios) - 1:+.1%} (median of "
        f"{', '.join(f'{ratio - 1:+.1%}' for ratio in ratios)})"
    )


if __name__ == "__main__":
    main()
