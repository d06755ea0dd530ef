"""What a form of a residual takes, what it loses, and what a graft from it still follows.

    OPENBLAS_NUM_THREADS=1 .venv/bin/python benchmarks/residual_forms.py

Two tables in Markdown. Pocket family: the base reads year 2 of the company, as in
`studies/pocket.yaml`; each form is grafted at one scale and asked the validation dialogues. Made-up
weights of Qwen2-0.5B's shapes, at the relative update of `synthetic.py`: bytes, error, and seconds
to encode (the comparison with what was there included) and to read everything back. `--only` takes
one of them. The setting is what the command line uses; without it BLAS' threads fight with ours.
"""

import argparse
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scale_choice import newer_base
from synthetic import SHAPES, write_base, write_update

from fedgraft.cli.places import places_of
from fedgraft.evaluation.scorecard import FOLLOWED, RIGHT_AND_FOLLOWED, evaluate
from fedgraft.models import open_model, open_tokenizer
from fedgraft.study.material import Material
from fedgraft.study.study import Study
from fedgraft.training.adapter import open_adapted
from fedgraft.weights.compression import compress, write_adapter
from fedgraft.weights.family import Family
from fedgraft.weights.live import Live, applied
from fedgraft.weights.residual import Residual, extract
from fedgraft.weights.workers import each_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STUDY = Path(__file__).parents[1] / "studies" / "pocket.yaml"
SMALL: Mapping[str, Mapping[str, Any]] = {
    "packed": {"form": "packed"},
    "int8": {"form": "int8"},
    "sparse, half": {"form": "sparse", "density": 0.5},
    "sparse, a tenth": {"form": "sparse", "density": 0.1},
    "sparse, a hundredth": {"form": "sparse", "density": 0.01},
    "sign": {"form": "sign"},
    "low rank, 64": {"form": "lowrank", "rank": 64},
    "low rank, 16": {"form": "lowrank", "rank": 16},
    "low rank, 4": {"form": "lowrank", "rank": 4},
}
ADAPTER = "adapter, 16"


@dataclass(frozen=True, slots=True)
class Made:
    """A residual in one form."""

    form: str
    source: Residual | Path
    """The directory, where it is an adapter."""
    num_bytes: int
    error: float
    seconds: float


def forms(family: Family, out: Path) -> Iterator[Made]:
    """Write the residual in each form, the plain ones first."""
    whole: Residual | None = None
    for form in ("float32", "bfloat16"):
        started = time.perf_counter()
        residual = extract(family, out / form, form=form, overwrite=True)
        seconds = time.perf_counter() - started
        whole = whole or residual
        error = 0.0 if residual is whole else distance(residual, whole)
        yield Made(form, residual, residual.num_bytes, error, seconds)
    assert whole
    for form, options in SMALL.items():
        started = time.perf_counter()
        small = compress(whole, out / form, overwrite=True, **options)
        seconds = time.perf_counter() - started
        error = small.record.figures["relative_error"]
        yield Made(form, small, small.num_bytes, error, seconds)
    started = time.perf_counter()
    figures = write_adapter(whole, out / ADAPTER, rank=16, overwrite=True).figures
    seconds = time.perf_counter() - started
    yield Made(ADAPTER, out / ADAPTER, figures["num_bytes"], figures["relative_error"], seconds)


def distance(residual: Residual, whole: Residual) -> float:
    """||residual - whole|| / ||whole||."""
    lost = total = 0.0
    for name in whole.tensors:
        for a, b in zip(residual.blocks(name), whole.blocks(name), strict=True):
            exact = b.astype(np.float64)
            lost += float(np.square(a - exact).sum())
            total += float(np.square(exact).sum())
    return math.sqrt(lost / total)


def pocket(out: Path, scale: float, seed: int) -> None:
    """The table of the pocket family: bytes against what is still followed."""
    study = Study.load(STUDY, places_of(STUDY, out))
    material = Material.load(study)
    newer = newer_base(study, material, seed, out / f"seed-{seed}")
    tokenizer = open_tokenizer(study.family.instruct)

    def asked(model: "PreTrainedModel", form: str) -> str:
        scores = evaluate(
            model,
            tokenizer,
            arm=form,
            dialogues=material.validation_dialogues,
            max_new_tokens=study.evaluation.max_new_tokens,
        ).scores
        return f"{scores[FOLLOWED].value:.1%} | {scores[RIGHT_AND_FOLLOWED].value:.1%}"

    print(f"\nPocket family, seed {seed}, scale {scale:g}\n")
    print("| form | MB | smaller than bfloat16 | error | followed | right and followed |")
    print("|---|---|---|---|---|---|")
    print(f"| none: the newer base | | | | {asked(open_model(newer), 'base')} |", flush=True)
    family = Family.open(study.family.base, study.family.instruct)
    for made in forms(family, out / "pocket"):
        if isinstance(made.source, Residual):
            model = open_model(newer)
            with applied(Live(model, newer), made.source, scale):
                followed = asked(model, made.form)
        else:
            adapted = open_adapted(newer, made.source)
            for module in adapted.modules():
                if hasattr(module, "set_scale"):
                    module.set_scale("default", scale)
            followed = asked(adapted, made.form)
        print(f"| {described(made, family)} | {followed} |", flush=True)


def synthetic(out: Path, relative: float) -> None:
    """The table of made-up weights: bytes, error and seconds."""
    shape, base, instruct = SHAPES["0.5b"], out / "0.5b" / "base", out / "0.5b" / "instruct"
    if not base.exists():
        write_base(shape, base)
    if not instruct.exists():
        write_update(shape, base, instruct, relative=relative)
    family = Family.open(base, instruct)
    print(f"\nQwen2-0.5B's shapes, relative update {relative:g}\n")
    print("| form | MB | smaller than bfloat16 | error | encode, s | decode, s |")
    print("|---|---|---|---|---|---|")
    for made in forms(family, out / "0.5b-forms"):
        decoded = f"{decoding(made.source):.1f}" if isinstance(made.source, Residual) else ""
        print(f"| {described(made, family)} | {made.seconds:.1f} | {decoded} |", flush=True)
    shutil.rmtree(out / "0.5b-forms")


def decoding(residual: Residual) -> float:
    """Seconds to read all numbers once, on the threads that a graft has."""

    def read(name: str) -> None:
        for _ in residual.blocks(name):
            pass

    sizes = {name: info.num_bytes for name, info in residual.tensors.items()}
    started = time.perf_counter()
    each_tensor("decoding", sizes, read)
    return time.perf_counter() - started


def described(made: Made, family: Family) -> str:
    ratio = 2 * family.num_parameters / made.num_bytes
    return f"{made.form} | {made.num_bytes / 1e6:.2f} | {ratio:.1f} | {made.error:.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["pocket", "synthetic"])
    parser.add_argument("--out", type=Path, default=Path("runs/residual_forms"))
    parser.add_argument("--synthetic", type=Path, default=Path("runs/synthetic"))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--relative", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if given.only != "synthetic":
        pocket(given.out, given.scale, given.seed)
    if given.only != "pocket":
        synthetic(given.synthetic, given.relative)


if __name__ == "__main__":
    main()
