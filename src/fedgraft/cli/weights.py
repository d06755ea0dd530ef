"""`family check`, `residual extract`, `graft`: verbs on weights, without torch."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedgraft.cli.arguments import Base, Instruct, Out, Overwrite, Target
from fedgraft.cli.console import finish, say, show_table
from fedgraft.cli.places import resolve
from fedgraft.cli.scale import choose as choose_scale


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
    overwrite: Overwrite = False,
) -> None:
    """Subtract a base from its instruct model: residual = instruct - base.

    Tensors are streamed, so memory does not grow with the model. The residual
    carries the content hashes of both parents, and the tokenizer and chat template
    of the instruct side.
    """
    from fedgraft.weights.family import Family
    from fedgraft.weights.residual import extract as extract_residual

    residual = extract_residual(
        Family.open(base, instruct), out, form=form.value, overwrite=overwrite
    )
    finish(
        "residual",
        out,
        facts=[f"its norm is {residual.relative_norm:.1%} of the base's"],
        steps=[f"fedgraft graft NEWER_BASE {out} --out runs/grafted"],
    )


def number(text: str) -> float:
    """A scale as people write it."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"expected a number or auto for --scale, found {text!r}") from None


def graft(
    target: Target,
    residual: Annotated[
        Path, typer.Argument(metavar="RESIDUAL", help="A folder that `residual extract` wrote.")
    ],
    out: Out,
    scale: Annotated[
        str,
        typer.Option(
            metavar="X|auto",
            help="The factor on the residual; auto chooses it without labels (--base, --data).",
        ),
    ] = "1.0",
    base: Annotated[
        str | None,
        typer.Option(
            parser=resolve, metavar="BASE", help="For auto: what RESIDUAL was taken from."
        ),
    ] = None,
    instruct: Annotated[
        str | None,
        typer.Option(
            parser=resolve,
            metavar="INSTRUCT",
            help="For auto: the instruct model; else BASE + RESIDUAL.",
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="For auto: held-out text of what TARGET has read; repeat for more."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="For auto: requests of your own, a line each.")
    ] = None,
    any_parent: Annotated[
        bool,
        typer.Option(
            "--any-parent",
            help="Graft onto a checkpoint that is not known to descend from the base.",
        ),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Add a residual to a newer base: target + scale * residual.

    The result is a complete model directory with the tokenizer, chat template and
    generation settings of the instruct side; transformers and vLLM load it as it is.

    With --scale auto the instruct model answers a few dozen plain requests, and of
    the scales at which TARGET keeps most of what it has read, the one is taken that
    stays closest to those answers. No instruction data is needed.
    """
    from fedgraft.weights.graft import graft as add
    from fedgraft.weights.residual import Residual

    addend = Residual.open(residual)
    if scale == "auto":
        factor = choose_scale(
            target, addend, base=base, instruct=instruct, data=data, prompts=prompts
        )
    else:
        factor = number(scale)
    add(target, addend, out, scale=factor, any_parent=any_parent, overwrite=overwrite)
    finish(
        "graft",
        out,
        facts=[f"{target} + {factor:g} x {residual}"],
        steps=[f"fedgraft chat {out}", f"fedgraft evaluate {out} --data FILE"],
    )
