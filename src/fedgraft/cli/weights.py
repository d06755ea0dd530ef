"""`family check`, `residual ...`: verbs on weights, without torch."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedgraft.cli.arguments import Base, Instruct, Out, Overwrite
from fedgraft.cli.console import finish, say, show_table
from fedgraft.cli.places import resolve

if TYPE_CHECKING:
    from fedgraft.weights.checkpoint import Checkpoint

StoredResidual = Annotated[
    Path, typer.Argument(metavar="RESIDUAL", help="A folder that `residual extract` wrote.")
]

BaseAdapter = Annotated[
    Path | None, typer.Option("--base-adapter", help="A LoRA adapter (PEFT folder) on BASE.")
]
InstructAdapter = Annotated[
    Path | None,
    typer.Option("--instruct-adapter", help="A LoRA adapter (PEFT folder) on INSTRUCT."),
]


def side(model: str, adapter: Path | None) -> "str | Checkpoint":
    """A side of a family: a model, or a model with an adapter on it."""
    if adapter is None:
        return model
    from fedgraft.weights.adapted import Adapted

    return Adapted(model, adapter)


class Form(StrEnum):
    """How a residual is stored."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    auto = "auto"
    packed = "packed"


def check(base: Base, instruct: Instruct) -> None:
    """Prove that a base and an instruct checkpoint are one family.

    Compared are the architecture, every size, every tensor's name and shape, the
    vocabulary token by token, and whether the embedding is tied. The first
    difference is named.
    """
    from fedgraft.weights.family import Family

    show_table(("one family", ""), Family.open(base, instruct).describe())
    say("next", f"fedgraft residual extract {base} {instruct} --out runs/residual", fg="cyan")


def extract(
    base: Base,
    instruct: Instruct,
    out: Out,
    form: Annotated[
        Form,
        typer.Option(
            help="float32 restores what it can hold; bfloat16 takes half; packed takes least and "
            "restores all; auto is bfloat16 where that restores all."
        ),
    ] = Form.float32,
    base_adapter: BaseAdapter = None,
    instruct_adapter: InstructAdapter = None,
    overwrite: Overwrite = False,
) -> None:
    """Subtract a base from its instruct model: residual = instruct - base.

    Tensors are streamed, so memory does not grow with the model. The residual
    carries the content hashes of both parents, and the tokenizer and chat template
    of the instruct side. A side can be a model with a LoRA adapter on it.
    """
    from fedgraft.weights.family import Family
    from fedgraft.weights.residual import extract as extract_residual

    family = Family.open(side(base, base_adapter), side(instruct, instruct_adapter))
    residual = extract_residual(family, out, form=form.value, overwrite=overwrite)
    finish(
        "residual",
        out,
        facts=[f"its norm is {residual.relative_norm:.1%} of the base's"],
        steps=[f"fedgraft graft NEWER_BASE {out} --out runs/grafted"],
    )


def verify(residual: StoredResidual, base: Base, instruct: Instruct) -> None:
    """Read a residual and both its parents again, and compare.

    Shown are the content hashes that were recorded beside those of today, and how
    many numbers base + residual gives back bit for bit. Ends with 1 where a hash
    is another one.
    """
    from fedgraft.weights.family import Family
    from fedgraft.weights.residual import Residual
    from fedgraft.weights.residual import verify as verify_residual

    found = verify_residual(Residual.open(residual), Family.open(base, instruct))
    hashes = {**found.parents, "residual": found.content}
    show_table(
        ("content", "recorded", "found", ""),
        [
            (name, was[:19], now[:19], "the same" if was == now else "ANOTHER")
            for name, (was, now) in hashes.items()
        ],
    )
    lost = sum(found.not_restored.values())
    say("", f"base + residual restores {found.num_elements - lost:,} of {found.num_elements:,}")
    for name, num_lost in found.not_restored.items():
        say("", f"{num_lost:,} not restored in {name}")
    if not found.sound:
        say("verdict", "not what was recorded; extract it again from its parents", fg="red")
        raise typer.Exit(1)
    say("verdict", "sound", bold=True)


def inspect(
    residual: StoredResidual,
    base: Base,
    out: Out,
    newer_base: Annotated[
        str | None,
        typer.Option(parser=resolve, metavar="MODEL", help="What BASE became by reading on."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure a residual layer by layer; forecast whether the graft will hold.

    With --newer-base it is laid beside what continued pre-training changed, and a
    sentence says what to expect before anything is grafted or evaluated. The page
    shows norms, cosines, sign conflicts and effective ranks as heat maps.
    """
    from fedgraft.report.inspection import cells, heads, write_inspection
    from fedgraft.weights.inspection import inspect as measure
    from fedgraft.weights.residual import Residual

    found = measure(Residual.open(residual), base, newer_base=newer_base)
    page = write_inspection(found, out, overwrite=overwrite)
    rows = [*found.kinds.items(), ("all", found.whole)]
    show_table(("kind", *heads(found)), ((name, *cells(figures)) for name, figures in rows))
    say("forecast", found.forecast.words)
    steps = [f"fedgraft graft {newer_base} {residual} --out runs/grafted"] if newer_base else []
    finish("inspection", page, steps=steps if found.forecast.outcome != "breaks" else [])
