"""Do our merging methods give what mergekit gives?

    python benchmarks/merging_methods.py               # a row for each merge
    python benchmarks/merging_methods.py --tensors     # and one for each tensor of it

Two instruct models are merged onto their base by the real mergekit, in the virtual environment that
`weight_arithmetic.py` makes, and by `graft`. Families: the pocket base and instruct with a third
model, the base with noise; and three tiny Qwen2 models with random weights. Where numbers differ,
the cause is computed for each number:

    cut          it has the magnitude at a cut, which more numbers have than there are places
    divisor      with their divisor in the place of ours, the result is theirs
    arithmetic   with `dtype: float32` and `out_dtype: bfloat16`, mergekit's result is ours

DARE draws at random: there the outcomes are compared, and how often each occurs. Three minutes of
processor time, most of them mergekit's.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM
from weight_arithmetic import _python

from fedgraft.pocket.weights import folder as pocket_folder
from fedgraft.testing import save_tiny, save_tiny_instruct
from fedgraft.weights.checkpoint import Array, Checkpoint
from fedgraft.weights.family import Family
from fedgraft.weights.graft import graft
from fedgraft.weights.merging import Method

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
ANOTHER = "another"
"""What is none of DARE's outcomes."""


@dataclass(frozen=True, slots=True)
class Trio:
    """A base and two models tuned from it."""

    name: str
    base: Path
    tuned: tuple[Path, Path]


@dataclass(frozen=True, slots=True)
class Merge:
    """One merge, in mergekit's words and in ours."""

    name: str
    """mergekit's name of the method."""
    method: Method
    weights: tuple[float, ...] = (1.0, 0.5)
    normalize: bool = False
    rescale: bool = False

    def __str__(self) -> str:
        words = [self.name]
        match self.name:
            case "breadcrumbs":
                words += [f"density {self.method.density}", f"gamma {self.method.gamma}"]
            case "ties" | "dare_linear" | "dare_ties":
                words.append(f"density {self.method.density}")
        if self.name == "ties":
            words.append(f"normalize: {str(self.normalize).lower()}")
        if self.name.startswith("dare"):
            words.append(f"rescale: {str(self.rescale).lower()}")
        return f"{', '.join(words)}; weights {', '.join(f'{w:g}' for w in self.weights)}"

    def theirs(self, trio: Trio, out: Path, dtype: str = "float32", **more: str) -> Checkpoint:
        """Run mergekit."""
        settings = {"density": self.method.density, "gamma": self.method.gamma}
        if self.name != "breadcrumbs":
            del settings["gamma"]
        config = {
            "merge_method": self.name,
            "base_model": str(trio.base),
            "dtype": dtype,
            **more,
            "parameters": {"normalize": self.normalize, "rescale": self.rescale},
            "models": [
                {"model": str(path), "parameters": {"weight": weight, **settings}}
                for path, weight in zip(trio.tuned, self.weights, strict=False)
            ],
        }
        file = out.with_suffix(".json")  # which is YAML too
        file.write_text(json.dumps(config), encoding="utf-8")
        run = _python("mergekit").with_name("mergekit-yaml")
        command = [str(run), str(file), str(out), "--quiet", "--random-seed", "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"mergekit failed:\n{done.stderr[-3000:]}")
        return Checkpoint.open(out)

    def ours(self, trio: Trio, out: Path, scale: float = 1.0) -> Checkpoint:
        """Run graft, with `scale` on every weight."""
        families = [Family.open(trio.base, path) for path in trio.tuned[: len(self.weights)]]
        scales = [scale * weight for weight in self.weights]
        return Checkpoint.open(graft(trio.base, families, out, scale=scales, method=self.method))


EXACT = [
    Merge("task_arithmetic", Method()),
    Merge("ties", Method(name="ties", density=0.5), (1.0, 1.0), normalize=True),
    Merge("ties", Method(name="ties", density=0.5), normalize=True),
    Merge("ties", Method(name="ties", density=0.5)),
    Merge("breadcrumbs", Method(name="breadcrumbs", density=0.5)),
    Merge("breadcrumbs", Method(name="breadcrumbs", density=0.9, gamma=0.1)),
]
IN_BFLOAT16 = [EXACT[0], EXACT[1], EXACT[4]]
DRAWN = [
    Merge("dare_linear", Method(name="dare", density=0.25), (1.0,), rescale=True),
    Merge("dare_linear", Method(name="dare", density=0.25), (1.0,)),
    Merge("dare_linear", Method(name="dare", density=0.25)),
    Merge("dare_ties", Method(name="dare_ties", density=0.25)),
]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two results agree on a tensor."""

    tensor: str
    largest: float
    """Of the absolute differences."""
    counts: Counter[str]
    """Of all numbers, of those `equal` bit for bit, of those `close`, and of each cause."""


def agreement(
    merge: Merge, trio: Trio, ours: Checkpoint, theirs: Checkpoint, exact: Checkpoint | None = None
) -> Iterator[Agreement]:
    """Compare two results tensor by tensor; `exact` is theirs from arithmetic in float32."""
    if ours.tensors.keys() != theirs.tensors.keys():
        sys.exit(f"{merge}: mergekit wrote other tensors than graft")
    for name, base, residuals in read(trio):
        mine, yours = ours.read(name).reshape(-1), theirs.read(name).reshape(-1)
        apart = steps(mine, yours)
        equal = mine.view(f"u{mine.itemsize}") == yours.view(f"u{mine.itemsize}")
        counts = Counter(all=mine.size, equal=int(equal.sum()), close=int((apart <= 1).sum()))
        unexplained = ~equal
        causes = [("cut", at_cut(merge.method, residuals))]
        if merge.name == "ties":
            causes += [("divisor", steps(with_their_divisor(merge, base, residuals), yours) <= 1)]
        if exact:
            causes += [("arithmetic", exact.read(name).reshape(-1) == mine)]
        for cause, mask in causes:
            counts[cause] = int((unexplained & mask).sum())
            unexplained &= ~mask
        counts["unexplained"] = int(unexplained.sum())
        differences = np.abs(mine.astype(np.float32) - yours.astype(np.float32))
        yield Agreement(name, float(differences.max()), counts)


def read(trio: Trio) -> Iterator[tuple[str, Floats, list[Floats]]]:
    """Yield each tensor of the base, flat, in float32, and what tuning added to it."""
    base, *tuned = (Checkpoint.open(path) for path in (trio.base, *trio.tuned))
    for name in base.tensors:
        old, *new = (c.read(name).reshape(-1).astype(np.float32) for c in (base, *tuned))
        yield name, old, [numbers - old for numbers in new]


def steps(first: Array, second: Array) -> NDArray[np.int64]:
    """Return how many numbers of the dtype lie between each two."""
    ordered = []
    for numbers in (first, second):
        bits = numbers.view(f"i{numbers.itemsize}").astype(np.int64)
        ordered.append(np.where(bits < 0, -(bits + (1 << (8 * numbers.itemsize - 1))), bits))
    between: NDArray[np.int64] = np.abs(ordered[0] - ordered[1])
    return between


def at_cut(method: Method, residuals: Sequence[Floats]) -> Mask:
    """Which numbers have, in one of the residuals, a magnitude that is both kept and left out."""
    found = np.zeros_like(residuals[0], np.bool_)
    size = found.size
    first = int(method.gamma * size) if method.name == "breadcrumbs" else 0
    for residual in residuals:
        magnitudes = np.abs(residual)
        ordered = np.sort(magnitudes)[::-1]
        for place in (first, first + max(1, int(method.density * size))):
            if 0 < place < size and ordered[place - 1] == ordered[place] > 0:
                found |= magnitudes == ordered[place]
    return found


def with_their_divisor(merge: Merge, base: Floats, residuals: Sequence[Floats]) -> Floats:
    """Return TIES with mergekit's divisor: the sum of the agreeing weights, or 1."""
    scaled = np.zeros((len(residuals), base.size), np.float32)
    weights = np.array(merge.weights, np.float32)[:, None]
    for row, residual in zip(scaled, residuals, strict=True):
        kept = np.argsort(-np.abs(residual), kind="stable")
        kept = kept[: max(1, int(merge.method.density * base.size))]
        row[kept] = residual[kept]
    scaled *= weights
    agrees = (scaled != 0) & ((scaled > 0) == (scaled.sum(axis=0) >= 0))
    total = np.sum(scaled, axis=0, where=agrees)
    divisor = np.sum(np.broadcast_to(weights, agrees.shape), axis=0, where=agrees)
    divisor[(divisor == 0) | (not merge.normalize)] = 1
    whole: Floats = base + total / divisor
    return whole


def row(family: str, merge: Merge | str, found: Sequence[Agreement]) -> str:
    """Return what a line of the table says of tensors."""
    counts = sum((f.counts for f in found), Counter())
    worst = max(found, key=lambda f: f.largest)
    num_differ = counts["all"] - counts["equal"]
    causes = [
        f"{cause} {counts[cause] / num_differ:.1%}"
        for cause in ("cut", "divisor", "arithmetic", "unexplained")
        if counts[cause]
    ]
    where = f" (`{worst.tensor.removeprefix('model.')}`)" if worst.largest else ""
    return (
        f"| {family} | {merge} | {worst.largest:.2g}{where} | {share(counts, 'equal')} "
        f"| {share(counts, 'close')} | {', '.join(causes) or '-'} |"
    )


def share(counts: Counter[str], what: str) -> str:
    """Return a share that reads 100% only where it is all."""
    found, size = counts[what], counts["all"]
    return "100%" if found == size else f"{min(found / size, 0.99999):.3%}"


@dataclass(frozen=True, slots=True)
class Group:
    """Numbers that have the same possible outcomes."""

    name: str
    where: Mask
    sums: Mapping[str, Floats]
    """What each outcome adds to the base."""
    chances: Mapping[str, float]


def groups(merge: Merge, addends: Sequence[Floats]) -> list[Group]:
    """Return what DARE can make of numbers, and how likely it is."""
    p, q = merge.method.density, 1 - merge.method.density
    zero, first = np.zeros_like(addends[0]), addends[0]
    if len(addends) == 1:
        kept = {"none": zero, "kept": first}
        return [Group("", first != 0, kept, {"none": q, "kept": p})]
    second = addends[1]
    four = {"none": zero, "first": first, "second": second, "both": first + second}
    chances = {"none": q * q, "first": p * q, "second": p * q, "both": p * p}
    present = (first != 0) & (second != 0)
    if merge.name == "dare_linear":
        return [Group("", present, four, chances)]
    stronger = np.abs(first) > np.abs(second)
    three = {
        "none": zero,
        "larger": np.where(stronger, first, second),
        "smaller": np.where(stronger, second, first),
    }
    alike = (first > 0) == (second > 0)
    return [
        Group("of one sign: ", present & alike, four, chances),
        Group(
            "of two signs: ",
            present & ~alike,
            three,
            {"none": q * q, "larger": p, "smaller": p * q},
        ),
    ]


def outcomes(merge: Merge, trio: Trio, merged: Checkpoint) -> tuple[str, list[float]]:
    """Return how often each outcome occurs, and for one model the factor on what each tensor keeps.

    Only numbers count whose outcomes lie further apart than rounding.
    """
    seen: Counter[tuple[str, str]] = Counter()
    chances: dict[tuple[str, str], float] = {}
    factors = []
    for name, base, residuals in read(trio):
        result = merged.read(name).reshape(-1)
        addends = [np.float32(w) * r for w, r in zip(merge.weights, residuals, strict=False)]
        if len(addends) == 1:
            kept = result != base
            change = np.abs(result - base).sum(dtype=np.float64)
            factor = float(change / np.abs(addends[0])[kept].sum(dtype=np.float64))
            factors.append(factor)
            addends = [addends[0] * np.float32(factor)]
        for group in groups(merge, addends):
            chances |= {(group.name, outcome): c for outcome, c in group.chances.items()}
            sums = np.stack([base + added for added in group.sums.values()])
            rounding = 4 * np.spacing(np.maximum(np.abs(sums).max(axis=0), np.abs(base)))
            told = group.where & (np.diff(np.sort(sums, axis=0), axis=0) > 3 * rounding).all(axis=0)
            hits = (np.abs(sums - result) <= rounding) & told
            for outcome, hit in zip(group.sums, hits, strict=True):
                seen[group.name, outcome] += int(hit.sum())
            seen[group.name, ANOTHER] += int((told & ~hits.any(axis=0)).sum())
    parts = []
    for start in dict.fromkeys(start for start, _ in seen):
        size = sum(count for (group, _), count in seen.items() if group == start)
        shares = [
            f"{outcome} {count / size:.2%} ({chances[group, outcome]:.2%})"
            for (group, outcome), count in seen.items()
            if group == start and outcome != ANOTHER
        ]
        shares.append(f"{ANOTHER} {seen[start, ANOTHER]} of {size:,}")
        parts.append(start + ", ".join(shares))
    return "; ".join(parts), factors


def drawn_row(who: str, merge: Merge, trio: Trio, merged: Checkpoint) -> str:
    said, factors = outcomes(merge, trio, merged)
    span = "-"
    if factors:
        span = f"{statistics.median(factors):.2f} ({min(factors):.2f} to {max(factors):.2f})"
    return f"| {merge} | {who} | {said} | {span} |"


def pocket(folder: Path, dtype: torch.dtype) -> Trio:
    """Return the pocket base and instruct, and the base with noise a tenth of each tensor's spread.

    What is in bfloat16 is in float32 the same number.
    """
    for name, source in (("base", "base"), ("instruct", "instruct"), ("nudged", "base")):
        shutil.copytree(
            pocket_folder / source, folder / name, ignore=shutil.ignore_patterns("fedgraft.json")
        )
        model = AutoModelForCausalLM.from_pretrained(pocket_folder / source, dtype=torch.float32)
        if name == "nudged":
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter += noise * 0.1 * parameter.std()
        model.to(dtype).save_pretrained(folder / name)
    word = str(dtype).removeprefix("torch.")
    return Trio(f"pocket, {word}", folder / "base", (folder / "instruct", folder / "nudged"))


def tiny(folder: Path) -> Trio:
    """Return three random Qwen2 models that differ by noise: hardly two magnitudes are equal."""
    base = save_tiny(folder / "base", "qwen2")
    first, second = (
        save_tiny_instruct(base, folder / f"tuned-{seed}", step=0.1, seed=seed) for seed in (1, 2)
    )
    return Trio("tiny Qwen2, float32", base, (first, second))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tensors", action="store_true", help="add a row for each tensor")
    tensors: bool = parser.parse_args().tensors
    torch.set_num_threads(1)
    print(
        "| family | mergekit | largest difference | equal | within 1 ulp | of those that differ |"
    )
    print("|---|---|---:|---:|---:|---|")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        places = (folder / f"merged-{n}" for n in itertools.count())

        def show(family: str, merge: Merge, found: Sequence[Agreement]) -> None:
            print(row(family, merge, found), flush=True)
            for one in found if tensors else ():
                print(row("", f"`{one.tensor}`", [one]))

        wide = pocket(folder / "wide", torch.float32)
        for trio in (tiny(folder / "tiny"), wide):
            for merge in EXACT:
                ours, theirs = merge.ours(trio, next(places)), merge.theirs(trio, next(places))
                show(trio.name, merge, list(agreement(merge, trio, ours, theirs)))
        narrow = pocket(folder / "narrow", torch.bfloat16)
        for merge in IN_BFLOAT16:
            ours = merge.ours(narrow, next(places))
            theirs = merge.theirs(narrow, next(places), dtype="bfloat16")
            exact = merge.theirs(narrow, next(places), dtype="float32", out_dtype="bfloat16")
            show(narrow.name, merge, list(agreement(merge, narrow, ours, theirs, exact)))
            found = list(agreement(merge, narrow, ours, exact))
            show(f"{narrow.name}, theirs with `dtype: float32`", merge, found)
        print(
            "\n| mergekit | | share of outcomes (expected) "
            "| factor on what is kept, median (over tensors) |"
        )
        print("|---|---|---|---:|")
        for merge in DRAWN:
            scale = 1.0 if merge.rescale else merge.method.density  # ours always rescales
            ours = merge.ours(wide, next(places), scale)
            print(drawn_row("ours", merge, wide, ours))
            print(drawn_row("theirs", merge, wide, merge.theirs(wide, next(places))), flush=True)


if __name__ == "__main__":
    main()
