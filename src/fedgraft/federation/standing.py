"""Where a group stands after a round: its adapter, and what its rule added to the model's weights.

    weights of a layer = the grafted model's + left @ right + alpha / r * B A
                                               └─ Change ─┘   └─ adapter ─┘

Only FLoRA and FedEx-LoRA have changes. They add up over rounds, as stacked factors that are
multiplied out once their ranks exceed the layer's shorter side. In a message a change travels as
`LAYER.change.left` and `LAYER.change.right` beside the factors; as an artefact the two are one PEFT
adapter of a higher rank, which is the same model.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedgraft.errors import FederationError
from fedgraft.federation.aggregate import Change, Layer, added_up
from fedgraft.federation.optimiser import State
from fedgraft.federation.update import Size, Tensors, named
from fedgraft.weights.arithmetic import Floats

LEFT, RIGHT = ".change.left", ".change.right"
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """What the clients of a group begin a round with."""

    adapters: Mapping[Size, Tensors]
    changes: Mapping[str, Change] = field(default_factory=dict)
    """Layer -> what was added to its weights so far."""
    optimiser: State = field(default_factory=State)

    def sent(self, size: Size) -> dict[str, Floats]:
        """The tensors of a question to a client whose adapter is of that size."""
        return {**self.adapters[size], **change_tensors(self.changes)}

    def advanced(
        self, layers: Iterable[Layer], fresh: Mapping[Size, Tensors] | None = None
    ) -> "Standing":
        """What follows from an aggregation. Factors that it does not name are those of `fresh`.

        FLoRA names none, so a new adapter begins. FFA-LoRA names B alone and FedSA-LoRA A: the
        other factors stay where `fresh` is None.
        """
        begun = self.adapters if fresh is None else fresh
        adapters = {size: dict(tensors) for size, tensors in begun.items()}
        changes = dict(self.changes)
        for layer in layers:
            for size, tensors in layer.adapters.items():
                adapters[size].update(tensors)
            if layer.change is not None:
                old = changes.get(layer.module)
                changes[layer.module] = added_up([old] if old else [], layer.change)
        return Standing(adapters=adapters, changes=changes, optimiser=self.optimiser)

    def as_one_adapter(self, size: Size) -> dict[str, Floats]:
        """Factors of alpha / r = that of `size` that make the same model: adapter and change.

        The change stands behind the adapter: B = [B, left r / alpha], A = [A; right].
        """
        merged = dict(self.adapters[size])
        for module, change in self.changes.items():
            a, b = named(module, "A"), named(module, "B")
            merged[a] = np.vstack([merged[a], change.right])
            merged[b] = np.hstack([merged[b], change.left / np.float32(size.scale)])
        return merged


def change_tensors(changes: Mapping[str, Change]) -> dict[str, Floats]:
    """Changes by the names under which they travel."""
    left = {f"{module}{LEFT}": change.left for module, change in changes.items()}
    return left | {f"{module}{RIGHT}": change.right for module, change in changes.items()}


def changes_of(tensors: Tensors) -> dict[str, Change]:
    """The changes among the tensors of a question. Raises FederationError for half of one."""
    found = {}
    for name, left in tensors.items():
        if name.endswith(LEFT):
            module = name.removesuffix(LEFT)
            if (right := tensors.get(f"{module}{RIGHT}")) is None:
                raise FederationError(
                    f"expected {module}{RIGHT} beside {name}, found none; use one version of "
                    "fedgraft everywhere"
                )
            found[module] = Change(left=left, right=right)
    return found


def factors_of(tensors: Tensors) -> dict[str, Floats]:
    """The factors among the tensors of a question."""
    return {name: t for name, t in tensors.items() if not name.endswith((LEFT, RIGHT))}


def save_tensors(file: Path, tensors: Arrays) -> None:
    """Write arrays to a file that appears whole or not at all."""
    partial = file.with_suffix(".partial")
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, partial)
    partial.rename(file)


class Stored(Mapping[str, NDArray[Any]]):
    """Tensors of a file, read when asked for. Raises FederationError where it is broken."""

    def __init__(self, file: Path) -> None:
        try:
            with safe_open(file, "numpy") as opened:
                self._names = tuple(sorted(opened.keys()))
        except (OSError, SafetensorError) as error:
            raise FederationError(
                f"{file}: expected tensors in safetensors, found: {error}; remove the folder of "
                "this round, and the run goes on from the one before"
            ) from error
        self._file = file

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._file, "numpy") as opened:
            tensor: NDArray[Any] = opened.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save_standing(folder: Path, standing: Standing) -> None:
    """Write all of it into a folder."""
    for number, (size, tensors) in enumerate(standing.adapters.items()):
        about = {"rank": np.array([size.rank]), "alpha": np.array([size.alpha])}
        save_tensors(folder / f"adapter-{number}.safetensors", {**tensors, **about})
    if standing.changes:
        save_tensors(folder / "change.safetensors", change_tensors(standing.changes))
    save_tensors(folder / "optimiser.safetensors", standing.optimiser.tensors())


def load_standing(folder: Path) -> Standing:
    """Read what `save_standing` wrote. Raises FederationError where it is not whole."""
    adapters = {}
    for file in sorted(folder.glob("adapter-*.safetensors")):
        tensors = dict(Stored(file))
        size = Size(int(tensors.pop("rank")[0]), float(tensors.pop("alpha")[0]))
        adapters[size] = tensors
    change = folder / "change.safetensors"
    return Standing(
        adapters=adapters,
        changes=changes_of(Stored(change)) if change.exists() else {},
        optimiser=State.of(Stored(folder / "optimiser.safetensors")),
    )
