"""`residual compress`: a residual in fewer bytes, without torch."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedgraft.cli.arguments import Out, Overwrite
from fedgraft.cli.console import finish

BF16_BYTES = 2


Form = Literal["packed", "lowrank", "sign", "int8", "sparse", "adapter"]


def compress(
    residual: Annotated[
        Path, typer.Argument(metavar="RESIDUAL", help="A folder that `residual extract` wrote.")
    ],
    out: Out,
    form: Annotated[
        Form,
        typer.Option(
            help="packed loses nothing; sign takes a bit a number, int8 a byte; lowrank takes two "
            "factors, which adapter writes for peft and vLLM; sparse keeps the largest numbers."
        ),
    ] = "packed",
    rank: Annotated[int, typer.Option(help="Of the factors of lowrank and adapter.")] = 16,
    density: Annotated[float, typer.Option(help="The share of numbers that sparse keeps.")] = 0.1,
    overwrite: Overwrite = False,
) -> None:
    """Write a residual in fewer bytes, and say what was lost.

    Every form but adapter is grafted, inspected and compressed again like any
    residual. An adapter is attached to a newer base instead: it has the linear
    layers alone, no embedding, norm or bias.
    """
    from fedgraft.weights.compression import compress as make_small
    from fedgraft.weights.compression import write_adapter
    from fedgraft.weights.residual import Residual

    whole = Residual.open(residual)
    plain = BF16_BYTES * sum(info.num_elements for info in whole.tensors.values())
    if form == "adapter":
        record = write_adapter(whole, out, rank=rank, overwrite=overwrite)
        left_out = record.figures["share_left_out"]
        facts = [f"left out are embeddings, norms and biases: {left_out:.1%} of ||r||^2"]
        steps = [f"fedgraft chat NEWER_BASE --adapter {out}"]
    else:
        record = make_small(
            whole, out, form, rank=rank, density=density, overwrite=overwrite
        ).record
        facts, steps = [], [f"fedgraft graft NEWER_BASE {out} --out runs/grafted"]
    size, error = record.figures["num_bytes"], record.figures["relative_error"]
    finish(
        "adapter" if form == "adapter" else "residual",
        out,
        facts=[
            f"{size / 1e6:.1f} MB, {plain / size:.1f} times smaller than plain bfloat16",
            f"{error:.1%} of the norm is lost" if error else "nothing is lost",
            *facts,
        ],
        steps=steps,
    )
