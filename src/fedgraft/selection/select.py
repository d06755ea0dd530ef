"""A coreset of a file: the lines that deserve training, and why; all of it at one place.

    FILE.jsonl ── features ──> points ── clients, clusters, choice ──> lines, reasons
                                 └────── plane ──────────────────────> a map of all lines

The choice is that of a federation (`coreset.coreset`), but nobody keeps anything from anybody.
Clients are the values of a field of the lines; without one, a single client has all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedgraft.errors import SelectionError
from fedgraft.models import open_tokenizer
from fedgraft.provenance import derive_seed, hash_files
from fedgraft.selection import privacy
from fedgraft.selection.anchors import anchors
from fedgraft.selection.coreset import Selection, coreset, grouped
from fedgraft.selection.features import Features
from fedgraft.selection.projection import Map, Points, Projection, project, shared_map
from fedgraft.selection.reader import Reader
from fedgraft.text.corpus import read_json_lines
from fedgraft.text.dialogues import Template, short_enough
from fedgraft.text.examples import (
    Examples,
    are_dialogues,
    example_texts,
    examples_at,
    tokenizer_for,
)
from fedgraft.text.sources import raw_lines
from fedgraft.text.tasks import load_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EVERYBODY = "everybody"
MOST_EMBEDDED = 5000
"""Points from which the map is made by principal components: t-SNE takes minutes then."""
NUM_LETTERS = 160


@dataclass(frozen=True, kw_only=True, slots=True)
class Reason:
    """Why a line was chosen."""

    line: int
    """Of the file, from 1 on; blank ones count."""
    client: str
    cluster: int
    """Of the client's clusters."""
    cluster_size: int
    server_cluster: int
    """Of the clusters of all clients' centroids."""
    distance: float
    """From the centroid, in the space of the points."""
    text: str
    """The beginning of what it says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selected:
    """A coreset of a file, and what it was chosen from."""

    lines: tuple[str, ...]
    """Those chosen, as they stand in the file."""
    reasons: tuple[Reason, ...]
    chosen: tuple[int, ...]
    """Places of the chosen among the n lines that were compared, rising."""
    clients: tuple[str, ...]
    """[n]"""
    clusters: tuple[int, ...]
    """[n], of the line's client; -1 is noise."""
    plane: NDArray[np.float32]
    """[n, 2], where a map draws them."""
    plane_words: str
    too_long: tuple[int, ...]
    """Lines that do not fit the window, and were left out."""
    settings: Mapping[str, object]
    inputs: Mapping[str, str]


def select(
    file: str | Path,
    model: str | Path,
    selection: Selection,
    *,
    client_field: str | None = None,
    prompt: Template = "chat",
    window: int = 1024,
    seed: int = 0,
    features: Path | None = None,
) -> Selected:
    """Choose a coreset of a JSONL file of dialogues, instructions or documents.

    Args:
        model: A checkpoint whose hidden states compare the lines; it is only read.
        client_field: The field that says which client a line belongs to.
        window: Longest dialogue, in tokens; of a document so many are looked at.
        features: Folder that features are kept in, for another choice of the same file.

    Raises SelectionError where no line is short enough or nothing is clustered, and for a line
    without its client; and as
    `text.tasks.load_examples`, features, projection and clusters do.
    """
    path = Path(file)
    examples = load_examples(path)
    rows = [(number, row) for number, row in read_json_lines(path)]
    owners = [_owner(path, number, row, client_field) for number, row in rows]
    reader = Reader(model)
    kept = _fitting(path, open_tokenizer(reader.path), examples, prompt, window)
    compared = examples_at(examples, kept)
    found = reader.features(
        compared, selection.encoding, window=window, prompt=prompt, folder=features
    )
    members: dict[str, list[int]] = {}
    for place, line in enumerate(kept):
        members.setdefault(owners[line], []).append(place)
    shared, centres = _laid_out(reader, selection, found, window, seed)
    points: dict[str, Points] = {
        client: project(
            found[places], selection.projection, shared=shared, seed=derive_seed(seed, client)
        )
        for client, places in sorted(members.items())
    }
    gains = None
    if selection.quality:
        all_gains = reader.gains(compared, window=window, prompt=prompt)
        gains = {client: all_gains[places] for client, places in members.items()}
    chosen = coreset(points, selection, seed=seed, gains=gains, centres=centres)
    if not chosen:
        raise SelectionError(
            f"{path}: expected clusters to choose from, found none among {len(kept)} examples of "
            f"{len(members)} clients; make min_cluster_size smaller, keep what lies alone (noise: "
            "singletons), or take the method local where there is one client"
        )
    labels = np.empty(len(kept), np.int64)
    for client, places in members.items():
        labels[places] = grouped(points[client], selection, centres=centres).labels
    texts = example_texts(compared)
    reasons = {
        members[one.client][one.index]: Reason(
            line=rows[kept[members[one.client][one.index]]][0],
            client=one.client,
            cluster=one.cluster,
            cluster_size=one.cluster_size,
            server_cluster=one.server_cluster,
            distance=round(one.distance, 6),
            text=texts[members[one.client][one.index]][:NUM_LETTERS],
        )
        for one in chosen
    }
    places = sorted(reasons)
    raw = raw_lines(path, {reason.line for reason in reasons.values()})
    plane, words = _plane(found, points, members, selection.projection, seed)
    left_out = sorted(set(range(len(examples))) - set(kept))
    return Selected(
        lines=tuple(raw[reasons[place].line] for place in places),
        reasons=tuple(reasons[place] for place in places),
        chosen=tuple(places),
        clients=tuple(owners[line] for line in kept),
        clusters=tuple(labels.tolist()),
        plane=plane,
        plane_words=words,
        too_long=tuple(rows[line][0] for line in left_out),
        settings={
            **selection.model_dump(mode="json", exclude_none=True),
            "client_field": client_field,
            "prompt": prompt,
            "window": window,
            "seed": seed,
        },
        inputs={"examples": hash_files([path]), "model": reader.content_hash},
    )


def _owner(path: Path, number: int, row: Mapping[str, object], field: str | None) -> str:
    if field is None:
        return EVERYBODY
    if not isinstance(owner := row.get(field), str) or not owner.strip():
        raise SelectionError(
            f"{path}, line {number}: expected its client in the field {field!r}, found "
            f"{'none' if owner is None else 'another value'}; name another field, or none at all"
        )
    return owner


def _fitting(
    path: Path,
    tokenizer: "PreTrainedTokenizerBase",
    examples: Examples,
    prompt: Template,
    window: int,
) -> list[int]:
    """Places of the examples that fit the window: all documents, and dialogues of that length."""
    if not are_dialogues(examples):
        return list(range(len(examples)))
    own = tokenizer_for(tokenizer, examples, prompt)
    kept = [place for place, one in enumerate(examples) if short_enough(own, [one], window)[0]]
    if not kept:
        raise SelectionError(
            f"{path}: expected dialogues of at most {window} tokens, found none among "
            f"{len(examples)}; raise the window"
        )
    return kept


def _laid_out(
    reader: Reader, selection: Selection, found: Features, window: int, seed: int
) -> tuple[Map | None, Points | None]:
    """The map that all clients have in common, and the centres of cells, where there are any."""
    projection = selection.projection
    if not projection.aligned:
        return None, None
    _, num_layers, hidden = found.shape
    texts = None
    if projection.needs_anchors or selection.privacy:
        texts = reader.features(anchors(), selection.encoding, window=window)
    shared = shared_map(
        projection,
        num_layers=num_layers,
        hidden=hidden,
        seed=seed,
        anchors=texts if projection.needs_anchors else None,
    )
    if selection.privacy is None or texts is None:
        return shared, None
    public = project(texts, projection, shared=shared)
    return shared, privacy.centres(public, selection.privacy.num_cells, seed=seed)


def _plane(
    found: Features,
    points: Mapping[str, Points],
    members: Mapping[str, Sequence[int]],
    projection: Projection,
    seed: int,
) -> tuple[NDArray[np.float32], str]:
    """Where a map draws each line, and how that was found."""
    own = all(one.shape[1] == 2 for one in points.values())
    if own and (projection.aligned or len(points) == 1):
        plane = np.empty((len(found), 2), np.float32)
        for client, places in members.items():
            plane[places] = points[client]
        return plane, "the two dimensions that were clustered"
    return drawn(found, seed=seed)


def drawn(found: Features, *, seed: int) -> tuple[Points, str]:
    """Where a map draws examples, [n, 2], and how that was found: t-SNE where they are not many."""
    if len(found) <= MOST_EMBEDDED:
        plane = Projection(name="tsne", num_dimensions=2, scaling="unit")
        return project(found, plane, seed=seed), "t-SNE of all layers"
    plane = Projection(name="pca", num_dimensions=2, scaling="unit")
    return project(found, plane, seed=seed), "two principal components of all layers"
