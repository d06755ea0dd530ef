"""An inspection as one HTML page: will the graft hold, and where in the model lies what.

Heat maps are tables with a background: every number can be read, on any screen, by any reader.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedgraft.provenance import Record, new_artefact, version
from fedgraft.report.template import fill
from fedgraft.weights.inspection import Figures, Inspection

PAGE, FIGURES = "inspection.html", "inspection.json"
BLUE, VERMILION = "0, 114, 178", "213, 94, 0"
STRONGEST = 0.62
"""Opacity of the strongest colour, under which dark text can still be read."""
TITLES = {
    "holds": "The graft should hold",
    "doubtful": "It may go either way",
    "breaks": "The graft will lose instructions",
    "open": "Not known without a newer base",
}
ROLES = {
    "base": "the base that was subtracted",
    "newer base": "what the base became",
    "residual": "the residual",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A number on its background."""

    text: str
    background: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Map:
    """A figure by layer and module."""

    title: str
    caption: str
    groups: tuple[tuple[str, int], ...]
    """Kinds of module, and how many columns each has."""
    columns: tuple[str, ...]
    rows: tuple[tuple[int, tuple[Cell | None, ...]], ...]
    """Layer -> its cells; None where the layer has no such module."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """A number that the eye meets first."""

    value: str
    words: str


def write_inspection(inspection: Inspection, out: Path, *, overwrite: bool = False) -> Path:
    """Write the directory `out` with the figures, their page and a record; return the page.

    Raises ArtefactError where `out` exists or cannot be written.
    """
    with new_artefact(out, overwrite=overwrite) as folder:
        (folder / FIGURES).write_text(inspection.model_dump_json(indent=1) + "\n", encoding="utf-8")
        (folder / PAGE).write_text(render(inspection), encoding="utf-8")
        Record.make("inspection", inputs=inspection.inputs).write(folder)
    return out / PAGE


def render(inspection: Inspection) -> str:
    """Return the page of an inspection; same inspection, same page."""
    return fill(
        "inspection.html",
        cells,
        inspection=inspection,
        forecast=inspection.forecast,
        titles=TITLES,
        tiles=list(_tiles(inspection)),
        maps=list(_maps(inspection)),
        heads=heads(inspection),
        kinds=[*inspection.kinds.items(), ("all", inspection.whole)],
        tensors=[(tensor.name, tensor.figures) for tensor in inspection.tensors],
        roles=ROLES,
        version=version(),
    )


def heads(inspection: Inspection) -> list[str]:
    """Name what `cells` shows."""
    ours = ["residual", "rank", "inexact"]
    theirs = ["change", "strength", "cosine", "conflict"]
    return [*ours, *theirs] if inspection.whole.change else ours


def cells(figures: Figures) -> list[str]:
    """Put the figures of a part into words."""
    lost, change = figures.num_not_restored, figures.change
    words = [
        share(figures.relative_norm),
        rank(figures.effective_rank),
        "not counted" if lost is None else f"{lost:,}",
    ]
    if change:
        words += [share(change.relative_norm), share(change.strength)]
        words += [signed(change.cosine), share(change.sign_conflict)]
    return words


def _tiles(inspection: Inspection) -> Iterator[Tile]:
    whole = inspection.whole
    yield Tile(
        value=share(whole.relative_norm), words="of the weights' norm is what tuning changed"
    )
    if change := whole.change:
        yield Tile(
            value=share(change.relative_norm),
            words="of the weights' norm is what continued pre-training changed",
        )
        yield Tile(
            value=share(inspection.forecast.strength),
            words="is the strength of its strongest direction, against the weights' own",
        )
        yield Tile(
            value=signed(change.cosine), words="is the cosine between the two; 0 is unrelated"
        )
    elif whole.num_not_restored is not None:
        yield Tile(
            value=f"{whole.num_not_restored:,}",
            words=f"of {whole.num_elements:,} numbers are not restored bit for bit",
        )


def _maps(inspection: Inspection) -> Iterator[Map]:
    """A map for every figure that was measured and differs by layer."""
    yield _map(
        inspection,
        "What instruction tuning changed",
        "Norm of the residual, as a share of the weights'.",
        lambda figures: figures.relative_norm,
        share,
    )
    if inspection.whole.change:
        yield _map(
            inspection,
            "What continued pre-training changed",
            "Norm of newer base - base, as a share of the weights'.",
            lambda figures: figures.change.relative_norm if figures.change else None,
            share,
        )
        yield _map(
            inspection,
            "How strong is the strongest direction of that change?",
            "Its largest singular value, as a share of the weights' own. The forecast rests on "
            "the mean of this map, and on how that compares with the residual's strength.",
            lambda figures: figures.change.strength if figures.change else None,
            share,
        )
        yield _map(
            inspection,
            "Do the two point the same way?",
            "Cosine between the residual and what continued pre-training changed. Blue: the "
            "same way; orange: against each other.",
            lambda figures: figures.change.cosine if figures.change else None,
            signed,
        )
        yield _map(
            inspection,
            "Do their signs conflict?",
            "Of the numbers that are large in both, the share with opposite signs. 50% is "
            "chance; orange: more than that.",
            lambda figures: figures.change.sign_conflict if figures.change else None,
            share,
            middle=0.5,
        )
    yield _map(
        inspection,
        "How many directions the residual has",
        "Effective rank: near 1 the residual is one direction; the most is the smaller side of "
        "the matrix. Estimated, within about 7%.",
        lambda figures: figures.effective_rank,
        rank,
    )


def _map(
    inspection: Inspection,
    title: str,
    caption: str,
    figure: Callable[[Figures], float | None],
    words: Callable[[float | None], str],
    *,
    middle: float = 0.0,
) -> Map:
    """Lay out one figure; columns without any value are left out.

    Colours go from the middle, which has none, to the value that is farthest from it.
    """
    values = {
        module: {layer: figure(figures) for layer, figures in by_layer.items()}
        for module, by_layer in inspection.cells.items()
        if any(figure(figures) is not None for figures in by_layer.values())
    }
    kind_of = {tensor.module: tensor.kind for tensor in inspection.tensors}
    ordered = sorted(values, key=lambda module: (kind_of[module], module))
    known = [v for by_layer in values.values() for v in by_layer.values() if v is not None]
    farthest = max((abs(value - middle) for value in known), default=0.0) or 1.0

    def cell(module: str, layer: int) -> Cell | None:
        value = values[module].get(layer)
        if value is None:
            return None
        strength = STRONGEST * abs(value - middle) / farthest
        against = value < 0 or (middle and value > middle)
        colour = VERMILION if against else BLUE
        return Cell(text=words(value), background=f"rgba({colour}, {strength:.3f})")

    kinds = [kind_of[module] for module in ordered]
    return Map(
        title=title,
        caption=caption,
        groups=tuple((kind, kinds.count(kind)) for kind in dict.fromkeys(kinds)),
        columns=tuple(_short(module) for module in ordered),
        rows=tuple(
            (layer, tuple(cell(module, layer) for module in ordered)) for layer in inspection.layers
        ),
    )


def _short(module: str) -> str:
    """`self_attn.q_proj.bias` is `q_proj bias`."""
    name, _, bias = module.partition(".bias")
    bias = " bias" if module.endswith(".bias") else ""
    return name.rpartition(".")[2] + bias


def share(number: float | None) -> str:
    """`16.5%`, `0.12%`."""
    if number is None:
        return "none"
    return f"{number:.1%}" if number >= 0.01 or not number else f"{100 * number:.2g}%"


def signed(number: float | None) -> str:
    """`+0.21`."""
    return "none" if number is None else f"{round(number, 2) + 0.0:+.2f}"  # no -0.00


def rank(number: float | None) -> str:
    """`2.9`, `61`."""
    if number is None:
        return "none"
    return f"{number:.1f}" if number < 10 else f"{number:.0f}"
