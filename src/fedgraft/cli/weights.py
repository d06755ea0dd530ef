"""`family check`, `residual extract`, `graft`: verbs on weights, without torch."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedgraft.cli.arguments import Base, Instruct, Out, Overwrite, Target
from fedgraft.cli.console import finish, say, show_table


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


def graft(
    target: Target,
    residual: Annotated[
        Path, typer.Argument(metavar="RESIDUAL", help="A folder that `residual extract` wrote.")
    ],
    out: Out,
    scale: Annotated[float, typer.Option(help="The factor on the residual.")] = 1.0,
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
    """
    from fedgraft.weights.graft import graft as add

    add(target, residual, out, scale=scale, any_parent=any_parent, overwrite=overwrite)
    finish(
        "graft",
        out,
        facts=[f"{target} + {scale:g} x {residual}"],
        steps=[f"fedgraft chat {out}", f"fedgraft evaluate {out} --data FILE"],
    )
