"""The server's side of a coreset: clients are asked for centroids, and told how many to take.

    clients ── centroids, counts ──> check ──> choose, group by group ──> how many of each cluster

What is chosen and why: `selection.coreset`; what a client does with it: `choice`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedgraft.errors import SelectionError
from fedgraft.federation.asking import Answered, Asking
from fedgraft.federation.choice import CENTRES
from fedgraft.federation.history import Part
from fedgraft.federation.message import Answer, Question, widened
from fedgraft.federation.plan import Plan
from fedgraft.federation.workplace import Workplace
from fedgraft.provenance import derive_seed
from fedgraft.selection import privacy as cells
from fedgraft.selection.anchors import anchors
from fedgraft.selection.coreset import Selection, Summary, choose
from fedgraft.selection.coreset import check as check_summary
from fedgraft.selection.projection import Map, project, shared_map


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """What was chosen of the clients' examples."""

    round: int
    """Of the choice."""
    taken: Mapping[str, tuple[int, ...]]
    """Client -> how many examples of each of its clusters."""
    absent: Mapping[str, Part] = field(default_factory=dict)
    """Clients that told no centroids, and why."""

    def of(self, name: str) -> int:
        """How many examples of a client."""
        return sum(self.taken.get(name, ()))


class Choosing:
    """Chooses for the clients of a plan, in each round or once."""

    def __init__(self, asking: Asking, plan: Plan, workplace: Workplace) -> None:
        self._asking, self._plan, self._workplace = asking, plan, workplace
        self._map: Map | None = None

    def chosen(
        self,
        asked: Iterable[str],
        number: int,
        last: Chosen | None,
        num_examples: Mapping[str, int],
    ) -> Chosen | None:
        """Which examples the clients of a round train on, None where they need no server for it.

        Chosen once, it is chosen from all clients, and later from those alone who were not there.

        Args:
            last: What was chosen last.
            num_examples: Of every client that may take part, also in other rounds.
        """
        selection = self._plan.selection
        if selection is None or selection.method == "all":
            return None
        before = None if selection.every_round else last
        of_choice = before.round if before else number
        if before:
            names = [name for name in asked if name not in before.taken]
        elif selection.every_round:
            names = list(asked)
        else:
            names = sorted(num_examples)
        absent: dict[str, Part] = {}
        if selection.method == "random":
            summaries = {name: _uncut(num_examples[name]) for name in names}
        else:
            summaries, absent = self._summaries(names, of_choice, selection)
        taken = dict(before.taken) if before else {}
        for group, members in self._plan.groups.items():
            ours = {name: summaries[name] for name in members if name in summaries}
            seed = derive_seed(self._plan.seed, "choice", group, number)
            found = choose(ours, selection, seed=seed) if ours else {}
            taken |= {name: tuple(counts.tolist()) for name, counts in found.items()}
        return Chosen(round=of_choice, taken=taken, absent=absent)

    def _summaries(
        self, names: Iterable[str], number: int, selection: Selection
    ) -> tuple[dict[str, Summary], dict[str, Part]]:
        """Ask clients for the centroids of their examples; those without, with the reason."""
        tensors = self._laid_out(selection)
        num_exchanges = selection.num_exchanges(self._plan.num_rounds)
        encoder = self._workplace.reader.encoder_hash(selection.encoding)
        questions = {
            name: Question(
                kind="centroids",
                round=number,
                phase="select",
                settings=self._asking.task(
                    name,
                    selection=placeless(selection),
                    encoder=encoder,
                    num_exchanges=num_exchanges,
                ),
                tensors=tensors,
            )
            for name in names
        }
        found: dict[str, Summary] = {}
        absent: dict[str, Part] = {}
        for answer in self._asking.ask(questions):
            refused = self._asking.logged(answer, "select", {})
            if not refused and not answer.fault:
                summary, refused = self._summary(answer, number, selection)
                if summary:
                    found[answer.client] = summary
            part = self._asking.part(answer, refused)
            if not part.counted:
                absent[answer.client] = part
            self._asking.watch(Answered(round=number, phase="select", part=part))
        return found, absent

    def _summary(
        self, answer: Answer, number: int, selection: Selection
    ) -> tuple[Summary | None, str | None]:
        """The summary of an answer that passed the gate, or why it is none."""
        given: Mapping[str, Any] = widened(answer.payload)
        if answer.round != number:
            return None, (
                f"client {answer.client!r}: expected centroids of round {number}, found those of "
                f"round {answer.round}; an answer counts once"
            )
        if not given.keys() >= {"centroids", "counts"}:
            return None, (
                f"client {answer.client!r}: expected centroids and counts, found "
                f"{', '.join(given) or 'nothing'}; use one version of fedgraft everywhere"
            )
        found = Summary(
            centroids=given["centroids"], counts=given["counts"], num_examples=given["num_examples"]
        )
        dimensions = 0 if selection.method == "local" else selection.projection.num_dimensions
        most = self._plan.max_examples
        try:
            check_summary(answer.client, found, num_dimensions=dimensions, max_examples=most)
        except SelectionError as error:
            return None, str(error)
        return found, None

    def _laid_out(self, selection: Selection) -> Map:
        """What every client's points are made by; nothing where a seed is enough.

        Both the map and the centres of cells are made of the anchors, which are public.
        """
        projection, privacy = selection.projection, selection.privacy
        if not projection.needs_anchors and not privacy:
            return {}
        if self._map is None:
            found = self._workplace.reader.features(
                anchors(), selection.encoding, window=self._plan.window
            )
            _, num_layers, hidden = found.shape
            shared = shared_map(
                projection,
                num_layers=num_layers,
                hidden=hidden,
                seed=self._plan.seed,
                anchors=found if projection.needs_anchors else None,
            )
            tensors = dict(shared) if projection.needs_anchors else {}
            if privacy:
                points = project(found, projection, shared=shared)
                seed = derive_seed(self._plan.seed, "cells")
                tensors[CENTRES] = cells.centres(points, privacy.num_cells, seed=seed)
            self._map = tensors
        return self._map


def placeless(selection: Selection) -> Selection:
    """A selection as it travels: a folder of this machine says nothing on another."""
    encoding = selection.encoding.model_copy(update={"encoder": None})
    return selection.model_copy(update={"encoding": encoding})


def _uncut(num_examples: int) -> Summary:
    """All examples of a client in one cluster, for a draw."""
    return Summary(
        centroids=np.zeros((min(1, num_examples), 0), np.float32),
        counts=np.full(min(1, num_examples), num_examples),
        num_examples=num_examples,
    )
