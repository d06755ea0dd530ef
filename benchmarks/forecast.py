"""Does the forecast of `residual inspect` come true? Checked against runs of the pocket family.

    FEDGRAFT_DATA=../shared/data OMP_NUM_THREADS=1 python benchmarks/forecast.py --out runs/forecast

In each run the pocket base reads on, with its own text, tokens, learning rate, replay and seed; the
residual is added, and the share of validation dialogues followed in full is counted. A run is a
line of `runs.jsonl`; its newer base stays beside it. Run again, the script goes on where it was
stopped. About 45 minutes of one core.
"""

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import numpy as np

from fedgraft.evaluation.perplexity import document_perplexity
from fedgraft.evaluation.scorecard import FOLLOWED, RIGHT_AND_FOLLOWED, evaluate
from fedgraft.models import open_model, open_tokenizer
from fedgraft.pocket.company import write_company
from fedgraft.pocket.recipe import NUM_POSITIONS
from fedgraft.pocket.weights import folder as pocket
from fedgraft.text.corpus import Corpus, Document, Splits
from fedgraft.text.dialogues import Dialogue, load_dialogues
from fedgraft.text.packing import Rows, pack
from fedgraft.training.pretrain import continue_pretraining
from fedgraft.training.settings import TrainingSettings
from fedgraft.weights.family import Family
from fedgraft.weights.inspection import KEPT, inspect
from fedgraft.weights.live import Live, applied
from fedgraft.weights.residual import Residual, extract

DATA = Path(os.environ.get("FEDGRAFT_DATA", "../shared/data"))
SCALES = (0.8, 1.0, 1.2)
ROW_LENGTH, WINDOW, NUM_HELD_OUT = 256, 256, 40
NUM_RUNS = 30
LAST_SEEN = 16
"""Seed of the last run that was looked at when quantity and limit of the forecast were chosen."""
VARIED: dict[str, list[Any]] = {
    "text": ["company", "company", "hr", "finance", "real/hr", "real/finance"],
    "num_tokens": [50_000, 100_000, 150_000, 200_000, 300_000, 600_000],
    "learning_rate": [1e-4, 2e-4, 4e-4, 1e-3, 2e-3],
    "replay": [0.0, 0.0, 0.3],
}
YES_NO = {True: "yes", False: "no", None: ""}
DEPARTMENTS = ("finance", "hr", "engineering", "it_support")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """How the base reads on."""

    text: str
    """`company`, all departments of year 2; one of them; or `real/` and one: published text."""
    num_tokens: int
    learning_rate: float
    replay: float
    """Share of the company's old pages."""
    seed: int

    @property
    def name(self) -> str:
        old = f"-replay-{self.replay:g}" if self.replay else ""
        place = self.text.replace("/", "-")
        return f"{place}-{self.num_tokens // 1000}k-{self.learning_rate:g}{old}-seed-{self.seed}"


def planned() -> list[Run]:
    """Plan runs: the settings of each are drawn independently, every value equally often."""
    rng = Random(0)
    drawn = {
        name: rng.sample(values * (NUM_RUNS // len(values)), NUM_RUNS)
        for name, values in VARIED.items()
    }
    return [
        Run(seed=n, **{name: values[n] for name, values in drawn.items()}) for n in range(NUM_RUNS)
    ]


class Bench:
    """What the runs share."""

    def __init__(self, out: Path) -> None:
        self.out = out
        company = out / "company"
        if not company.exists():
            write_company(company)
        self.company = company
        self.base = pocket / "base"
        self.tokenizer = open_tokenizer(pocket / "instruct")
        place = out / "residual"
        self.residual = (
            Residual.open(place)
            if place.exists()
            else extract(Family.open(self.base, pocket / "instruct"), place)
        )
        asked = load_dialogues(company / "dialogues" / "validation.jsonl")
        self.dialogues: tuple[Dialogue, ...] = tuple(d for d in asked if d.constraints)

    def packed(self, documents: Sequence[Document], seed: int) -> Rows:
        return pack(self.tokenizer, documents, ROW_LENGTH, seed=seed, num_positions=NUM_POSITIONS)

    def splits(self, text: str) -> Splits:
        where, _, department = text.rpartition("/")
        folder = DATA / "dept" if where else self.company / "year2"
        names = DEPARTMENTS if department == "company" else (department,)
        return Corpus.load(*(folder / f"{name}.jsonl" for name in names)).split()

    def train(self, run: Run) -> Path:
        newer = self.out / "bases" / run.name
        if newer.exists():
            return newer
        old = Corpus.load(self.company / "replay.jsonl").documents
        pages = self.splits(run.text).train
        return continue_pretraining(
            self.base,
            self.packed(pages, run.seed),
            newer,
            TrainingSettings(
                num_tokens=run.num_tokens, learning_rate=run.learning_rate, seed=run.seed
            ),
            replay=self.packed(old, run.seed) if run.replay else None,
            replay_share=run.replay,
            label=run.name,
        )

    def outcome(self, run: Run) -> dict[str, Any]:
        """Train, graft and score."""
        newer = self.train(run)
        model = open_model(newer)
        held_out = sorted(self.splits(run.text).test, key=lambda d: d.hash)[:NUM_HELD_OUT]

        def bits(label: str) -> float:
            read = document_perplexity(model, self.tokenizer, held_out, window=WINDOW, label=label)
            return round(read.bits_per_byte, 5)

        found: dict[str, Any] = {"bits_newer_base": bits("newer base"), "scales": {}}
        for scale in SCALES:
            with applied(Live(model, newer), self.residual, scale):
                found["scales"][f"{scale:g}"] = {**self.score(model), "bits": bits(f"{scale:g}")}
        return found

    def score(self, model: Any) -> dict[str, float]:
        scores = evaluate(
            model, self.tokenizer, arm="graft", dialogues=self.dialogues, max_new_tokens=48
        ).scores
        return {
            "followed": round(scores[FOLLOWED].value, 5),
            "right_and_followed": round(scores[RIGHT_AND_FOLLOWED].value, 5),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What was known before the graft was asked anything, and what came out."""

    run: dict[str, Any]
    kept: float
    """Share of what instruct follows that the graft follows at scale 1."""
    known: dict[str, float]
    """Quantity -> value; large should mean trouble."""
    forecast: str


def outcomes(bench: Bench, lines: list[dict[str, Any]]) -> list[Outcome]:
    """Inspect the newer base of each run."""
    instruct, *runs = lines
    found = []
    for run in runs:
        newer = bench.out / "bases" / run["name"]
        inspection = inspect(bench.residual, bench.base, newer_base=newer)
        whole, change = inspection.whole, inspection.whole.change
        assert change
        assert change.relative_norm
        assert whole.relative_norm
        assert change.cosine is not None
        assert change.sign_conflict is not None
        assert inspection.forecast.strength is not None
        matrices = [t.figures for t in inspection.tensors if t.layer is not None and t.shape[1:]]
        strengths = [(f.change.strength, f.strength) for f in matrices if f.change]
        known = {
            "strength": inspection.forecast.strength,
            "strength, against the residual's": fmean(a / b for a, b in strengths if a and b),
            "norm of the change / of the residual": change.relative_norm / whole.relative_norm,
            "cosine": change.cosine,
            "sign conflict": change.sign_conflict,
        }
        kept = run["scales"]["1"]["followed"] / instruct["followed"]
        found.append(Outcome(run=run, kept=kept, known=known, forecast=inspection.forecast.outcome))
    return found


def fit(runs: Sequence[Outcome], quantity: str) -> float:
    """Return the limit below which the fewest runs are told wrong; the middle of the best gap."""
    values = sorted({run.known[quantity] for run in runs})
    edges = [values[0] / 2, *values, values[-1] * 2]
    limits = [(a + b) / 2 for a, b in pairwise(edges)]
    return max(limits, key=lambda limit: num_right(runs, quantity, limit))


def num_right(runs: Iterable[Outcome], quantity: str, limit: float) -> int:
    return sum((run.known[quantity] < limit) == (run.kept >= KEPT) for run in runs)


def write_tables(found: Sequence[Outcome]) -> None:
    """Print the runs, then how well each quantity told them, in Markdown."""
    print(
        "| text | tokens | learning rate | replay | strength | norm | cosine | conflict | kept at "
        "0.8 | at 1 | at 1.2 | bits per byte, newer base | graft | forecast | came true |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for outcome in sorted(found, key=lambda outcome: outcome.known["strength"]):
        run, scales = outcome.run, outcome.run["scales"]
        reference = scales["1"]["followed"] / outcome.kept
        kept = " | ".join(f"{scales[f'{s:g}']['followed'] / reference:.0%}" for s in SCALES)
        strength, _, norm, cosine, conflict = outcome.known.values()
        true = {"holds": outcome.kept >= KEPT, "breaks": outcome.kept < KEPT}
        print(
            f"| {run['text']} | {run['num_tokens'] // 1000}k | {run['learning_rate']:g} "
            f"| {run['replay']:.0%} | {strength:.1%} | {norm:.2f} | {cosine:+.2f} "
            f"| {conflict:.0%} | {kept} | {run['bits_newer_base']:.3f} | {scales['1']['bits']:.3f} "
            f"| {outcome.forecast} | {YES_NO[true.get(outcome.forecast)]} |"
        )
    ours = [outcome for outcome in found if outcome.run["seed"] <= LAST_SEEN]
    others = [outcome for outcome in found if outcome.run["seed"] > LAST_SEEN]
    held = sum(outcome.kept >= KEPT for outcome in found)
    print(f"\n{len(found)} runs, {held} kept {KEPT:.0%} of what instruct follows at scale 1.\n")
    print(
        f"| below a limit it holds | limit, from seeds up to {LAST_SEEN} | right there | right in "
        "later seeds | right when left out | rank correlation with kept |"
    )
    print("|---|---|---|---|---|---|")
    for quantity in found[0].known:
        limit = fit(ours, quantity)
        left_out = sum(
            num_right([one], quantity, fit([o for o in found if o is not one], quantity))
            for one in found
        )
        print(
            f"| {quantity} | {limit:.3g} | {num_right(ours, quantity, limit)} of {len(ours)} "
            f"| {num_right(others, quantity, limit)} of {len(others)} "
            f"| {left_out} of {len(found)} | {rank_correlation(found, quantity):+.2f} |"
        )


def rank_correlation(found: Sequence[Outcome], quantity: str) -> float:
    """Kendall's tau-a between a quantity and the share kept."""
    pairs = list(combinations(found, 2))
    agreed = sum(
        np.sign(a.known[quantity] - b.known[quantity]) * np.sign(a.kept - b.kept) for a, b in pairs
    )
    return float(agreed / len(pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/forecast"))
    parser.add_argument("--tables", action="store_true", help="of the runs that are done; no new")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    bench, file = Bench(out), out / "runs.jsonl"
    done = {line["name"] for line in read(file)}
    if "instruct" not in done:
        append(file, {"name": "instruct", **bench.score(open_model(pocket / "instruct"))})
    todo = [] if arguments.tables else sorted(planned(), key=lambda run: run.num_tokens)
    for run in todo:
        if run.name not in done and ((DATA / "dept").is_dir() or not run.text.startswith("real/")):
            append(file, {"name": run.name, **asdict(run), **bench.outcome(run)})
    write_tables(outcomes(bench, read(file)))


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append(file: Path, line: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
