"""Two of ten clients send what they should not: which rules keep the loss that the others reach?

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/hostile.py --data ../shared/data/dept/hr.jsonl

Ten clients of one department share its documents out at random and train one adapter of the
embedded base, by whole rounds in process (`run_rounds`). Two of them train as the others do, and
then send another change than they found:

    scaled         30 times it            all under the bound on norms that the server checks,
    sign-flipped   its opposite           so that none is refused
    both           10 times its opposite

Printed is the last adapter's loss on held-out documents, in nats per token, a mean over seeds, and
how far above the clean run's: FedAvg of ten honest clients. Robust rules are told of two hostile
clients. The bar: a robust rule within 5 % of the clean run, FedAvg not.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedgraft.federation.client import Client
from fedgraft.federation.in_process import InProcess
from fedgraft.federation.message import Answer, Question, question_bytes
from fedgraft.federation.plan import Plan, Robust
from fedgraft.federation.rounds import run_rounds
from fedgraft.federation.standing import load_standing
from fedgraft.federation.workplace import Workplace
from fedgraft.pocket import weights
from fedgraft.provenance import derive_seed
from fedgraft.text.corpus import Corpus, Document
from fedgraft.training.settings import AdapterSettings

ATTACKS: Mapping[str, float] = {"scaled": 30.0, "sign-flipped": -1.0, "both": -10.0}
"""What a hostile client multiplies its change by."""
RULES: Mapping[str, Robust | None] = {
    "FedAvg": None,
    "trimmed mean": Robust(name="trimmed_mean", num_hostile=2),
    "median": Robust(name="median", num_hostile=2),
    "Krum": Robust(name="krum", num_hostile=2),
    "clipping": Robust(name="clipping", num_hostile=2),
}
NUM_CLIENTS, NUM_HOSTILE = 10, 2
PIECE = 1_200
"""Characters of a document that are read; clients score their own on PIECE / 4, to save time."""


class Scaling(Client):
    """A client that sends `factor` times the change that it found.

    In their first round clients do the same in every run of a seed: that answer is kept.
    """

    factor = 1.0
    first: dict[bytes, Answer]

    def answer(self, question: Question) -> Answer:
        if question.kind != "adapter":
            return super().answer(question)
        key = self.name.encode() + question_bytes(question)
        answer = self.first.get(key) or super().answer(question)
        if question.round == 1:
            self.first[key] = answer
        start, sent = question.tensors, dict(answer.payload)
        for name, tensor in sent.items():
            if isinstance(tensor, np.ndarray) and self.factor != 1:
                moved = start[name] + self.factor * (tensor - start[name])
                sent[name] = moved.astype(tensor.dtype)
        return replace(answer, payload=sent)


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """The documents of a department."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @classmethod
    def load(cls, *paths: Path) -> "Text":
        split = Corpus.load(*paths).split()
        return cls(train=tuple(_pieces(split.train)), held_out=tuple(_pieces(split.test))[:60])


def _pieces(documents: Sequence[Document], length: int = PIECE) -> list[Document]:
    return [replace(one, text=one.text[:length]) for one in documents]


def held_out_loss(
    workplace: Workplace,
    model: Path,
    text: Text,
    training: AdapterSettings,
    *,
    num_rounds: int,
    seed: int,
    robust: Robust | None = None,
    factor: float = 1.0,
    first: dict[bytes, Answer],
) -> float:
    """Nats per token of the adapter after all rounds.

    Args:
        factor: Of the change that the first two clients send.
        first: Answers to first questions, kept from run to run.
    """
    names = [f"client-{n:02}" for n in range(NUM_CLIENTS)]
    plan = Plan(
        name="hostile",
        departments={"department": tuple(names)},
        num_rounds=num_rounds,
        training=training,
        robust=robust,
        seed=seed,
    )
    order = np.random.default_rng(derive_seed(seed, "hostile")).permutation(len(text.train))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        clients = []
        for n, name in enumerate(names):
            own = [text.train[at] for at in order[n::NUM_CLIENTS]]
            short = _pieces(own[:1], PIECE // 4)
            made = Scaling(name, workplace, own[1:], short, place / name)
            made.factor = factor if n < NUM_HOSTILE else 1.0
            made.first = first
            clients.append(made)
        history = run_rounds(InProcess(clients), plan, model, place / "out")
        unheard = [part.refused for done in history.rounds for part in done.parts if part.refused]
        assert not unheard, unheard  # an attack that is refused is none
        standing = load_standing(place / "out" / "rounds" / f"{num_rounds:04}" / "department")
        ((size, tensors),) = standing.adapters.items()
        measured = workplace.score(size, tensors, {}, text.held_out, window=256, label="held out")
    return measured.nats_per_token


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="a department's text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048, help="of a client in a round")
    parser.add_argument("--rate", type=float, default=6e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--attacks", nargs="*", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--rules", nargs="*", choices=RULES, default=list(RULES))
    parser.add_argument("--calm", action="store_true", help="each rule without attack, too")
    given = parser.parse_args()
    text, model = Text.load(*given.data), weights.folder / "base"
    workplace = Workplace(model)
    training = AdapterSettings(
        num_tokens=given.tokens,
        batch_tokens=512,
        learning_rate=given.rate,
        schedule="constant",
        warmup=0,
    )

    first: dict[bytes, Answer] = {}

    def mean(rule: str, factor: float) -> tuple[float, float]:
        losses = [
            held_out_loss(
                workplace,
                model,
                text,
                training,
                num_rounds=given.rounds,
                seed=seed,
                robust=RULES[rule],
                factor=factor,
                first=first,
            )
            for seed in given.seeds
        ]
        return statistics.fmean(losses), max(losses) - min(losses)

    started = time.monotonic()
    plain = Workplace(model)
    size = Plan(name="size", departments={"a": ("b",)}, num_rounds=1, training=training).all_sizes[
        0
    ]
    before = plain.score(
        size, plain.fresh(size, 0), {}, text.held_out, window=256, label="before"
    ).nats_per_token
    clean, spread = mean("FedAvg", 1.0)
    print(
        f"{len(given.seeds)} seeds, {given.rounds} rounds of {given.tokens} tokens a client. Before"
    )
    print(f"training {before:.3f} nats per token, clean run {clean:.3f} (range over seeds")
    print(f"{spread:.3f}).\n")
    attacks = {"no attack": 1.0} if given.calm else {}
    attacks |= {attack: ATTACKS[attack] for attack in given.attacks}
    print("| rule | " + " | ".join(attacks) + " |")
    print("|---|" + "---:|" * len(attacks), flush=True)
    for rule in given.rules:
        print(f"| {rule} |", end="", flush=True)
        for factor in attacks.values():
            loss, _ = mean(rule, factor)
            print(f" {loss:.3f} ({loss / clean - 1:+.1%}) |", end="", flush=True)
        print()
    print(f"\n{time.monotonic() - started:.0f} seconds")


if __name__ == "__main__":
    main()
