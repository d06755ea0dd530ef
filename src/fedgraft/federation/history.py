"""What happened in a federation, round by round: the file `history.json`, which grows by rounds.

Scores are of a named model, never of "the model":

    graft         the grafted model alone
    global        with the adapter that all departments share
    department    with the adapter of the client's department
    client        with what the client made of it in this round: its personal adapter

Each client scores on its own held-out text. A model's mean over clients is given weighted (by
tokens scored) and unweighted (each client alike).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from fedgraft.federation.message import Fault
from fedgraft.noise import Spent

Kind = Literal["documents", "dialogues"]
"""What the clients of a federation have; of dialogues the answers are learned and scored."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Part(_Record):
    """What one client did in one round."""

    client: str
    department: str
    fault: Fault | None = None
    refused: str | None = None
    """Why its update was not taken, in the server's words; None where it was."""
    num_examples: int = 0
    num_left_out: int = 0
    """Of its dialogues, those that are longer than a row; told once, with its sizes."""
    num_scored: int = 0
    """Tokens of its held-out text."""
    scores: dict[str, float] = {}
    """Model -> nats per token, of the adapter that the round began with, and of its own."""
    loss: float | None = None
    """Mean of the last steps of training, nats per token."""
    moved: float | None = None
    """Euclidean norm of what training changed of the factors; not told where the plan has privacy,
    as the drift."""
    drift: float | None = None
    """1 - cosine of that and the mean change of its group: 0 is the same way, 2 against it."""
    seconds_training: float = 0.0
    seconds_scoring: float = 0.0
    seconds: float = 0.0
    """From the question to the answer."""
    bytes_up: int = 0
    bytes_down: int = 0

    @property
    def counted(self) -> bool:
        """Whether its update went into the round's adapter."""
        return self.fault is None and self.refused is None


class Mean(_Record):
    """A model's nats per token over clients."""

    weighted: float
    unweighted: float
    num_clients: int


class Round(_Record):
    """One round. Its `means` of `global` and `department` are of the adapter that it began with."""

    number: int
    parts: tuple[Part, ...]
    kept: dict[str, str]
    """Group -> why it keeps its last adapter; empty where all aggregated."""
    chosen: dict[str, int] = {}
    """Client -> examples that were chosen of it; empty where all train on all of theirs."""
    clusters: tuple[tuple[str, ...], ...] = ()
    """Departments that were mixed with each other; empty where the plan mixes none."""
    means: dict[str, dict[str, Mean]]
    """Department, or `all` -> model -> mean."""
    seconds: dict[str, float]
    """`select`, `train`, `aggregate`, `write`: time on the clock."""


class History(_Record):
    """All of it."""

    format: Literal[1] = 1
    name: str
    plan: dict[str, object]
    model: str
    """Content hash of the grafted model."""
    transport: str
    """`in process` or `flower`."""
    examples: Kind = "documents"
    left_out: dict[str, int] = {}
    """Client -> dialogues that are longer than a row, and take no part."""
    excluded: dict[str, str] = {}
    """Client -> why it took no part in any round, in the server's words."""
    rounds: tuple[Round, ...] = ()
    final: tuple[Part, ...] = ()
    """The last adapters, scored by every client."""
    privacy: Spent | None = None
    centroids: Spent | None = None

    @property
    def seconds(self) -> float:
        return sum(sum(done.seconds.values()) for done in self.rounds)

    @property
    def final_means(self) -> dict[str, dict[str, Mean]]:
        return means(self.final)

    def write(self, file: Path) -> None:
        partial = file.with_suffix(".partial")
        partial.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        partial.rename(file)


def means(parts: Iterable[Part]) -> dict[str, dict[str, Mean]]:
    """Means of each model over the clients of each department, and over all."""
    scored: dict[str, dict[str, list[tuple[float, int]]]] = {}
    for part in parts:
        for model, nats in part.scores.items():
            for group in (part.department, "all"):
                scored.setdefault(group, {}).setdefault(model, []).append((nats, part.num_scored))
    return {
        group: {model: _mean(values) for model, values in models.items()}
        for group, models in sorted(scored.items())
    }


def _mean(values: list[tuple[float, int]]) -> Mean:
    total = sum(num for _, num in values)
    weighted = sum(nats * num for nats, num in values) / total if total else float("nan")
    unweighted = sum(nats for nats, _ in values) / len(values)
    return Mean(weighted=weighted, unweighted=unweighted, num_clients=len(values))
