"""What a server does with the mean of its clients: takes it, or steps towards it as an optimiser.

    d = mean - x     the clients' mean change of the adapter x; the server's rate is n
    fedavg           x <- mean
    fedavgm          m <- momentum m + d;                        x <- x + n m
    fedadagrad       v <- v + d^2;                               x <- x + n d / (sqrt v + tau)
    fedyogi          m <- beta_1 m + (1 - beta_1) d
                     v <- v - (1 - beta_2) d^2 sign(v - d^2);    x <- x + n m / (sqrt v + tau)
    fedadam          m as above
                     v <- beta_2 v + (1 - beta_2) d^2;           x <- x + c n m / (sqrt v + tau)

Reddi et al., "Adaptive federated optimization" (arXiv 2003.00295, algorithm 2); FedAvgM is Hsu et
al. (arXiv 1909.06335). These are the numbers of Flower 1.41 to rounding, so that a run may move
between the engines. Where Flower leaves the paper we follow Flower: v begins at 0, not at tau^2,
and FedAdam has Adam's correction, counted from the second step,
c = sqrt(1 - beta_2^(t + 1)) / (1 - beta_1^(t + 1)) in round t, which starts at 1. Where we leave
Flower: each step is computed in float64 and given in float32 (its FedAdam gives float64), and its
FedAvgM is written so that momentum 0 and rate 1 are FedAvg to the bit.

A and B are stepped as two vectors, so this goes with `fedavg`, `ffa`, `fedsa` and `fedex`, not with
`flora` and `flexlora`, whose factors of one round are no change of those of the last.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fedgraft.errors import FederationError
from fedgraft.federation.update import Tensors
from fedgraft.weights.arithmetic import Floats

Name = Literal["fedavg", "fedavgm", "fedadagrad", "fedyogi", "fedadam"]
STEP = "step"


class Optimiser(BaseModel):
    """How the server steps.

    Raises FederationError for a rate where none has a meaning, and for none where one is needed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name = "fedavg"
    rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The server's learning rate. 1 for FedAvgM where None. The last three move each number by
    about the rate in a round, whatever the size of the clients' change."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of FedAvgM; Flower's default is 0."""
    beta_1: float = Field(default=0.9, ge=0, lt=1)
    """Of FedYogi and FedAdam."""
    beta_2: float = Field(default=0.99, ge=0, lt=1)
    """Of FedYogi and FedAdam."""
    tau: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Of the last three: numbers that change by less than this a round move by less than the
    rate."""

    def model_post_init(self, _: object) -> None:
        if self.name == "fedavg" and self.rate is not None:
            raise FederationError(
                f"expected no rate for fedavg, which takes the clients' mean, found {self.rate:g}; "
                "leave it out, or take fedavgm with momentum 0"
            )
        if self.name in ("fedadagrad", "fedyogi", "fedadam") and self.rate is None:
            raise FederationError(
                f"expected a rate for {self.name}, found none; each number moves by about the rate "
                "in a round, so begin with the clients' learning rate times their steps"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What an optimiser remembers between rounds; empty at the start."""

    step: int = 0
    """Steps taken."""
    momentum: Mapping[str, Floats] = field(default_factory=dict)
    """m, by tensor."""
    squares: Mapping[str, Floats] = field(default_factory=dict)
    """v, by tensor."""

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All of it as named arrays, as safetensors stores them: `step`, `m.NAME`, `v.NAME`."""
        return (
            {STEP: np.array([self.step], np.int64)}
            | {f"m.{name}": tensor for name, tensor in self.momentum.items()}
            | {f"v.{name}": tensor for name, tensor in self.squares.items()}
        )

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[Any]]) -> "State":
        """The state that `tensors` gave.

        Raises FederationError where they are not such.
        """
        steps = tensors.get(STEP)
        if steps is None or steps.shape != (1,) or steps.dtype != np.int64:
            raise FederationError(
                f"expected the state of a server's optimiser, with {STEP!r}, found "
                f"{', '.join(sorted(tensors)[:3]) or 'nothing'}; resume from another round"
            )
        parts: dict[str, dict[str, Floats]] = {"m": {}, "v": {}}
        for name, tensor in tensors.items():
            letter, _, rest = name.partition(".")
            if name == STEP:
                continue
            if letter not in parts or not rest:
                raise FederationError(
                    f"expected {STEP}, m.NAME and v.NAME in the state of a server's optimiser, "
                    f"found {name!r}; resume from another round"
                )
            parts[letter][rest] = tensor
        return cls(step=int(steps[0]), momentum=parts["m"], squares=parts["v"])


def stepped(
    optimiser: Optimiser, state: State, current: Tensors, mean: Tensors
) -> tuple[dict[str, Floats], State]:
    """Return the next adapter and the next state; arguments are left as they are.

    Raises FederationError where the two, or they and the state, are not of one adapter.
    """
    _check_alike(current, mean, "the clients' mean")
    for remembered in (state.momentum, state.squares):
        if remembered:
            _check_alike(current, remembered, "the optimiser's state")
    rate = optimiser.rate or 1.0
    if optimiser.name == "fedadam":
        rate *= _correction(optimiser, state.step + 2)
    following: dict[str, Floats] = {}
    momentum: dict[str, Floats] = {}
    squares: dict[str, Floats] = {}
    for name in current:
        x, target = (tensors[name].astype(np.float64) for tensors in (current, mean))
        d, zero = target - x, np.zeros(x.shape)
        m, v = (part.get(name, zero) for part in (state.momentum, state.squares))
        match optimiser.name:
            case "fedavg":
                x = target
            case "fedavgm":  # x + rate (d + momentum m), with x + d as it came
                x = target + (rate - 1) * d + rate * optimiser.momentum * m
                momentum[name] = _narrowed(optimiser.momentum * m + d)
            case "fedadagrad":
                v = v + d * d
                x = x + rate * d / (np.sqrt(v) + optimiser.tau)
                squares[name] = _narrowed(v)
            case "fedyogi" | "fedadam":
                m = optimiser.beta_1 * m + (1 - optimiser.beta_1) * d
                if optimiser.name == "fedyogi":
                    v = v - (1 - optimiser.beta_2) * d * d * np.sign(v - d * d)
                else:
                    v = optimiser.beta_2 * v + (1 - optimiser.beta_2) * d * d
                x = x + rate * m / (np.sqrt(v) + optimiser.tau)
                momentum[name], squares[name] = _narrowed(m), _narrowed(v)
        following[name] = _narrowed(x)
    return following, State(step=state.step + 1, momentum=momentum, squares=squares)


def _correction(optimiser: Optimiser, power: int) -> float:
    return math.sqrt(1 - optimiser.beta_2**power) / (1 - optimiser.beta_1**power)


def _narrowed(numbers: NDArray[np.float64]) -> Floats:
    return numbers.astype(np.float32)


def _check_alike(current: Tensors, other: Mapping[str, NDArray[Any]], what: str) -> None:
    for name in sorted(current.keys() | other.keys()):
        shapes = [
            list(tensors[name].shape) if name in tensors else "no such tensor"
            for tensors in (current, other)
        ]
        if shapes[0] != shapes[1]:
            raise FederationError(
                f"expected {name!r} of {what} as in the adapter, {shapes[0]}, found {shapes[1]}; "
                "a change of the adapter's rank or layers starts with a new State()"
            )
