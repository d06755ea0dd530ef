"""Arguments and options that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

from fedgraft.cli.places import resolve

MODEL = "A folder, a hub name (org/name@revision), or pocket:base, pocket:instruct."

Model = Annotated[str, typer.Argument(parser=resolve, metavar="MODEL", help=MODEL)]
Base = Annotated[str, typer.Argument(parser=resolve, metavar="BASE", help=MODEL)]
Instruct = Annotated[
    str, typer.Argument(parser=resolve, metavar="INSTRUCT", help="The model tuned from BASE.")
]
Target = Annotated[
    str, typer.Argument(parser=resolve, metavar="TARGET", help="What BASE became: a newer base.")
]
Out = Annotated[Path, typer.Option("--out", help="Where to write; appears complete or not at all.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")]
Data = Annotated[
    list[Path],
    typer.Option("--data", help="Text: what `fedgraft corpus` reads or wrote; repeat for more."),
]
Adapter = Annotated[
    Path | None, typer.Option("--adapter", help="A folder that `fedgraft adapt` wrote.")
]


def count(text: str) -> int:
    """A number of tokens as people write it: `500k`, `10M`, `1.5B` or digits."""
    factors = {"k": 10**3, "m": 10**6, "b": 10**9}
    number, factor = text.replace("_", "").replace(",", ""), 1
    if number[-1:].lower() in factors:
        number, factor = number[:-1], factors[number[-1].lower()]
    try:
        tokens = round(float(number) * factor)
    except (ValueError, OverflowError):
        tokens = 0
    if tokens < 1:
        raise typer.BadParameter(f"expected a number of tokens such as 500k or 10M, found {text!r}")
    return tokens


Tokens = Annotated[
    int, typer.Option("--tokens", parser=count, metavar="N", help="Budget, e.g. 500k or 10M.")
]
