"""A coreset of a file on disk: its lines, the reason for each, and a page with a map of all lines.

OUT/coreset.jsonl    the chosen lines, as they stand in the file
OUT/reasons.jsonl    for each of them: line, client, cluster, size, distance
OUT/map.html         where all lines lie, coloured by cluster and by client
OUT/fedgraft.json    how it was made
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedgraft.provenance import Record, new_artefact, version
from fedgraft.report import figures
from fedgraft.report.template import fill
from fedgraft.report.words import Plot, Tile, count, flatten
from fedgraft.selection.select import Selected

CORESET, REASONS, PAGE = "coreset.jsonl", "reasons.jsonl", "map.html"
MOST_SHOWN = 200
"""Reasons on the page; all are in the file."""


def write_coreset(selected: Selected, out: Path, *, overwrite: bool = False) -> Path:
    """Write the directory `out`; return its page.

    Raises ArtefactError where `out` exists or cannot be written.
    """
    with new_artefact(out, overwrite=overwrite) as folder:
        text = "".join(f"{line}\n" for line in selected.lines)
        (folder / CORESET).write_text(text, encoding="utf-8")
        reasons = [json.dumps(asdict(one), ensure_ascii=False) for one in selected.reasons]
        (folder / REASONS).write_text("".join(f"{one}\n" for one in reasons), encoding="utf-8")
        (folder / PAGE).write_text(render(selected), encoding="utf-8")
        Record.make(
            "coreset",
            inputs=dict(selected.inputs),
            settings=dict(selected.settings),
            figures={
                "num_examples": len(selected.clients),
                "num_chosen": len(selected.lines),
                "num_clusters": num_clusters(selected),
                "num_noise": sum(one < 0 for one in selected.clusters),
                "num_too_long": len(selected.too_long),
            },
        ).write(folder)
    return out / PAGE


def num_clusters(selected: Selected) -> int:
    """Clusters of all clients."""
    pairs = zip(selected.clients, selected.clusters, strict=True)
    return len({pair for pair in pairs if pair[1] >= 0})


def render(selected: Selected) -> str:
    """The page of a coreset; same coreset, same page."""
    held, taken = Counter(selected.clients), Counter(one.client for one in selected.reasons)
    return fill(
        "coreset.html",
        count,
        selected=selected,
        tiles=list(_tiles(selected)),
        plots=list(_plots(selected)),
        clients=[(name, number, taken[name]) for name, number in sorted(held.items())],
        reasons=selected.reasons[:MOST_SHOWN],
        num_clusters=num_clusters(selected),
        settings=list(flatten(selected.settings)),
        result={"inputs": selected.inputs, "versions": {"fedgraft": version()}},
        version=version(),
    )


def _tiles(selected: Selected) -> Iterator[Tile]:
    chosen, compared = len(selected.lines), len(selected.clients)
    noise = sum(one < 0 for one in selected.clusters)
    yield Tile(
        value=f"{chosen:,}",
        words=f"of {compared:,} examples are chosen, {chosen / compared:.1%}",
        colour=figures.BLUE,
    )
    yield Tile(
        value=f"{num_clusters(selected):,}", words="clusters in the clients", colour=figures.GREEN
    )
    yield Tile(
        value=f"{noise / compared:.0%}", words="of the examples lie in none", colour=figures.GREY
    )


def _plots(selected: Selected) -> Iterator[Plot]:
    """The map by cluster, and by client where there are several."""
    where = f"Drawn by {selected.plane_words}. A ring is a chosen example."
    yield by_cluster(
        selected.plane, selected.clients, selected.clusters, selected.chosen, caption=where
    )
    if len(set(selected.clients)) > 1:
        yield by_client(selected.plane, selected.clients, selected.chosen, caption=where)


def by_cluster(
    plane: NDArray[np.float32],
    clients: Sequence[str],
    clusters: Sequence[int],
    chosen: Sequence[int],
    *,
    caption: str,
) -> Plot:
    """A map of examples, coloured by the clusters of each client."""
    pairs = list(zip(clients, clusters, strict=True))
    numbers = {pair: n for n, pair in enumerate(sorted(set(pairs))) if pair[1] >= 0}
    return Plot(
        title="By cluster",
        svg=figures.places(plane, [numbers.get(pair, -1) for pair in pairs], chosen),
        caption=f"{caption} Neighbouring colours are other clusters; grey is in none.",
    )


def by_client(
    plane: NDArray[np.float32], clients: Sequence[str], chosen: Sequence[int], *, caption: str
) -> Plot:
    """A map of examples, coloured by client."""
    names = sorted(set(clients))
    return Plot(
        title="By client",
        svg=figures.places(
            plane,
            [names.index(one) for one in clients],
            chosen,
            names=names if len(names) <= len(figures.WHEEL) else (),
        ),
        caption=caption,
    )
