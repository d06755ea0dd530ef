"""`graft`: target + scale * residual, in every way that there is."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedgraft.cli.arguments import Out, Overwrite, Target
from fedgraft.cli.console import finish
from fedgraft.cli.places import resolve
from fedgraft.cli.scale import choose as choose_scale
from fedgraft.cli.weights import BaseAdapter, InstructAdapter, side

Way = Literal["plain", "ties", "dare", "dare_ties", "breadcrumbs"]
PARENTS, WAYS, AUTO = "Parents, for --scale auto or instead of RESIDUAL", "Merging", "Scale auto"


def number(text: str) -> float:
    """A scale as people write it."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"expected a number or auto for --scale, found {text!r}") from None


def spelled(model: str | None, adapter: Path | None) -> str:
    """A side of a family in a sum."""
    return f"({model} + {adapter})" if adapter else f"{model}"


def graft(
    target: Target,
    out: Out,
    residuals: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RESIDUAL]...",
            help="What `residual extract` wrote; several are added up. None with --base and "
            "--instruct: subtracted while they are read.",
        ),
    ] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X|auto",
            help="The factor on a residual [1.0]; repeat for several. auto chooses it without "
            "labels (needs --base and --data).",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            parser=resolve,
            metavar="BASE",
            help="What the residual was taken from.",
            rich_help_panel=PARENTS,
        ),
    ] = None,
    instruct: Annotated[
        str | None,
        typer.Option(
            parser=resolve,
            metavar="INSTRUCT",
            help="The model tuned from BASE.",
            rich_help_panel=PARENTS,
        ),
    ] = None,
    base_adapter: BaseAdapter = None,
    instruct_adapter: InstructAdapter = None,
    method: Annotated[
        Way, typer.Option(help="How residuals are thinned and put together.", rich_help_panel=WAYS)
    ] = "plain",
    density: Annotated[
        float,
        typer.Option(help="Share of each tensor that a method keeps.", rich_help_panel=WAYS),
    ] = 1.0,
    gamma: Annotated[
        float,
        typer.Option(
            help="Share of each tensor, the largest numbers, that breadcrumbs leaves out.",
            rich_help_panel=WAYS,
        ),
    ] = 0.01,
    seed: Annotated[
        int, typer.Option(help="Of what dare drops at random.", rich_help_panel=WAYS)
    ] = 0,
    factor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=X|FIRST-LAST=X",
            help="A further factor, by kind of module or by layer; repeat for more.",
            rich_help_panel=WAYS,
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Held-out text of what TARGET has read; repeat for more.", rich_help_panel=AUTO
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Requests of your own, a line each.", rich_help_panel=AUTO),
    ] = None,
    any_parent: Annotated[
        bool,
        typer.Option(
            "--any-parent",
            help="Graft onto a checkpoint that is not known to descend from the base.",
        ),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the result back from the disk and compare.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Add a residual to a newer base: target + scale * residual.

    The result is a complete model directory with the tokenizer, chat template and
    generation settings of the instruct side; transformers and vLLM load it as it is.

    Plain addition is the default and hard to beat. --method and --density thin
    residuals out before they are added; --factor weighs kinds of modules (embedding,
    output, attention, mlp, norm) and layers: --factor embedding=0 --factor 0-5=0.5.

    With --scale auto the instruct model answers a few dozen plain requests, and of
    the scales at which TARGET keeps most of what it has read, the one is taken that
    stays closest to those answers. No instruction data is needed.
    """
    from fedgraft.provenance import check_free
    from fedgraft.weights.family import Family
    from fedgraft.weights.graft import graft as add
    from fedgraft.weights.merging import Factors, Method
    from fedgraft.weights.residual import Difference, Residual

    addends: list[Residual | Difference] = [Residual.open(path) for path in residuals or []]
    if not addends:
        if base is None or instruct is None:
            raise typer.BadParameter("expected RESIDUAL, or both --base and --instruct")
        sides = side(base, base_adapter), side(instruct, instruct_adapter)
        addends = [Difference(Family.open(*sides))]
    elif base_adapter or instruct_adapter:
        raise typer.BadParameter("expected --base-adapter, --instruct-adapter without RESIDUAL")
    check_free(out, overwrite=overwrite)
    way = Method(name=method, density=density, gamma=gamma, seed=seed)
    texts = scale or ["1.0"]
    if texts == ["auto"]:
        if len(addends) > 1:
            raise typer.BadParameter("expected one RESIDUAL for --scale auto")
        if base_adapter or instruct_adapter:
            raise typer.BadParameter("expected no adapters for --scale auto; extract a RESIDUAL")
        scales = [
            choose_scale(
                target, addends[0], base=base, instruct=instruct, data=data, prompts=prompts
            )
        ]
    else:
        scales = [number(text) for text in texts]
    if len(scales) == 1:
        scales *= len(addends)
    add(
        target,
        addends,
        out,
        scale=scales[0] if len(scales) == 1 else scales,
        method=way,
        factors=Factors.parse(factor or []),
        any_parent=any_parent,
        verify=verify,
        overwrite=overwrite,
    )
    subtracted = f"({spelled(instruct, instruct_adapter)} - {spelled(base, base_adapter)})"
    names = [str(path) for path in residuals or []] or [subtracted]
    sums = " + ".join(f"{s:g} x {name}" for s, name in zip(scales, names, strict=True))
    finish(
        "graft",
        out,
        facts=[f"{target} + {sums}", *(["read back as it was written"] if verify else [])],
        steps=[f"fedgraft chat {out}", f"fedgraft evaluate {out} --data FILE"],
    )
