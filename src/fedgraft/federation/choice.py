"""A client's part in choosing a coreset: what it tells of its examples, and which ones it takes.

    examples ── features ──> points ── clusters ──> summary: centroids, counts    to the server
                kept          └───── kept ─────┘
                                        │
    how many of each cluster ───────────┴──> places of the examples to train on

Where an example is not to be chosen again (`Selection.repeats`), the places that were trained on in
earlier rounds say which are left: those alone become clusters.

Features, and what an answer gains by its prompt, are those of the model without any adapter, so
they are made once. Points and clusters of a choice are kept too, two choices of them: the second
question is about the clusters of the first, also after the client's process was started anew. All
of it stays in the client's folder:

    features/                   see `selection.features`
    RUN/choice-NNNN.safetensors points and clusters of the choice of a round
    RUN/chosen-NNNN.json        places of the examples that were trained on in a round, ascending
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedgraft.errors import FederationError
from fedgraft.federation.standing import Stored, save_tensors
from fedgraft.selection.clusters import NOISE, Clusters
from fedgraft.selection.coreset import Indices, Selection, Summary, grouped, take, tell
from fedgraft.selection.features import Encoding, Features
from fedgraft.selection.projection import Map, Points, project, shared_map
from fedgraft.text.dialogues import Template
from fedgraft.text.examples import Examples

if TYPE_CHECKING:
    from fedgraft.federation.workplace import Workplace

FEATURES, CHOICE, CHOSEN = "features", "choice", "chosen"
CENTRES = "centres"
"""The tensor of a question that has the centres of cells; all others are of the map."""
NUM_KEPT = 2
"""Choices whose clusters a client keeps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """One choice, and what it depends on beside examples and settings."""

    number: int
    """The round in which it was made."""
    seed: int
    """Of this client and this choice."""
    map_seed: int
    """Of what all clients have in common."""
    window: int
    prompt: Template = "chat"
    num_exchanges: int = 1
    """Planned in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Made:
    """The examples of a client at one choice."""

    places: Indices
    """Of the examples that took part, rising."""
    points: Points
    clusters: Clusters
    gains: NDArray[np.float32] | None

    def save(self, file: Path) -> None:
        tensors = {f"clusters.{one.name}": getattr(self.clusters, one.name) for one in _PARTS}
        tensors |= {"places": self.places, "points": self.points}
        if self.gains is not None:
            tensors["gains"] = self.gains
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(file, tensors)

    @classmethod
    def load(cls, file: Path) -> "_Made":
        found = Stored(file)
        return cls(
            places=found["places"],
            points=found["points"],
            clusters=Clusters(**{one.name: found[f"clusters.{one.name}"] for one in _PARTS}),
            gains=found.get("gains"),
        )


_PARTS = fields(Clusters)


def last_labels(folder: Path, num_examples: int) -> Indices | None:
    """The cluster of each example at a client's last choice; -1 is in none, or passed over.

    None where it has made no choice by clusters.
    """
    files = sorted(folder.glob(f"{CHOICE}-*.safetensors"))
    if not files:
        return None
    made = _Made.load(files[-1])
    labels = np.full(num_examples, NOISE)
    labels[made.places] = made.clusters.labels
    return labels


def all_chosen(folder: Path) -> list[int]:
    """Places of a client's examples that were trained on in any round, ascending."""
    files = folder.glob(f"{CHOSEN}-*.json")
    return sorted({place for file in files for place in json.loads(file.read_bytes())})


class Choice:
    """What one client knows of its own examples when it is asked to choose among them."""

    def __init__(
        self,
        examples: Examples,
        workplace: "Workplace",
        folder: Path,
        features: Path,
    ) -> None:
        """
        Args:
            folder: Of the client in one run.
            features: Where features are kept, whichever run they are for.
        """
        self._examples, self._workplace, self._folder = examples, workplace, folder
        self._features = features
        self._read: dict[tuple[Encoding, int, Template], Features] = {}
        self._gains: dict[tuple[int, Template], NDArray[np.float32]] = {}

    def told(self, selection: Selection, tensors: Map, draw: Draw) -> Summary:
        """Cluster the examples, keep that, and return what the server learns.

        Args:
            tensors: The server's map and centres of cells, where it broadcasts some.

        Raises SelectionError and NonFiniteError as features, projection and clusters do.
        """
        shared = dict(tensors)
        centres = shared.pop(CENTRES, None)
        times = np.zeros(len(self._examples), np.int64)
        if not selection.repeats:
            times = self._times(draw.number)
        for most in np.unique(times) if times.any() else (0,):
            places = np.flatnonzero(times <= most)
            points = self._points(selection, shared, draw, places)
            clusters = grouped(points, selection, centres=centres)
            if clusters.num_clusters:
                break
        gains = None
        if selection.quality:
            gains = self._gains_of_all(draw)[places]
        _Made(places=places, points=points, clusters=clusters, gains=gains).save(
            self._file(draw.number)
        )
        for old in sorted(self._folder.glob(f"{CHOICE}-*.safetensors"))[:-NUM_KEPT]:
            old.unlink()
        told = tell(
            clusters,
            points,
            selection,
            seed=draw.seed,
            centres=centres,
            num_exchanges=draw.num_exchanges,
        )
        return told if selection.repeats else replace(told, num_examples=len(self._examples))

    def taken(self, selection: Selection, counts: Sequence[int], draw: Draw) -> list[int]:
        """Places of the examples to train on, rising: so many of each cluster of a choice.

        Raises FederationError where this client was not asked about its clusters, SelectionError
        where it has others.
        """
        times = None
        if selection.method == "random":
            points = np.zeros((len(self._examples), 0), np.float32)
            made = _Made(
                places=np.arange(len(points)),
                points=points,
                clusters=grouped(points, selection),
                gains=None,
            )
            times = None if selection.repeats else self._times(draw.number)
        else:
            made = self._kept(draw.number)
        taken = take(
            made.clusters,
            made.points,
            np.asarray(counts, np.int64),
            selection,
            seed=draw.seed,
            gains=made.gains,
            times=times,
        )
        found: list[int] = made.places[taken].tolist()
        return found

    def _times(self, number: int) -> Indices:
        """How often each example was trained on in rounds before this one."""
        times = np.zeros(len(self._examples), np.int64)
        for file in self._folder.glob(f"{CHOSEN}-*.json"):
            if int(file.stem.rpartition("-")[2]) < number:
                times[json.loads(file.read_text(encoding="utf-8"))] += 1
        return times

    def _of_all(self, encoding: Encoding, draw: Draw) -> Features:
        """Features of all examples; even to find them on disk takes encoding every example."""
        key = encoding, draw.window, draw.prompt
        if key not in self._read:
            self._read[key] = self._workplace.reader.features(
                self._examples,
                encoding,
                window=draw.window,
                prompt=draw.prompt,
                folder=self._features,
            )
        return self._read[key]

    def _gains_of_all(self, draw: Draw) -> NDArray[np.float32]:
        key = draw.window, draw.prompt
        if key not in self._gains:
            self._gains[key] = self._workplace.reader.gains(
                self._examples, window=draw.window, prompt=draw.prompt
            )
        return self._gains[key]

    def _points(self, selection: Selection, shared: Map, draw: Draw, places: Indices) -> Points:
        features = self._of_all(selection.encoding, draw)
        projection = selection.projection
        if projection.aligned and not shared:
            _, num_layers, hidden = features.shape
            shared = shared_map(
                projection, num_layers=num_layers, hidden=hidden, seed=draw.map_seed
            )
        if len(places) < len(features):
            features = features[places]
        return project(features, projection, shared=shared, seed=draw.seed)

    def _kept(self, number: int) -> _Made:
        file = self._file(number)
        if not file.exists():
            raise FederationError(
                f"expected the clusters of choice {number} in {self._folder}, found none; ask for "
                "centroids before an adapter"
            )
        return _Made.load(file)

    def keep(self, number: int, places: Sequence[int]) -> None:
        """Write down what is trained on in a round, for the client's own people."""
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"{CHOSEN}-{number:04d}.json"
        file.write_text(json.dumps(list(places)) + "\n", encoding="utf-8")

    def _file(self, number: int) -> Path:
        return self._folder / f"{CHOICE}-{number:04d}.safetensors"
