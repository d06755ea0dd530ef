"""A server's step: FedAvg where it should be, Flower's numbers otherwise, and saved to the bit."""

import math
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file

from fedgraft.errors import FederationError
from fedgraft.federation.optimiser import Name, Optimiser, State, stepped
from fedgraft.federation.update import Tensors
from fedgraft.weights.arithmetic import Floats

NAMES: tuple[Name, ...] = get_args(Name)
FLOATS = st.floats(-1e6, 1e6, width=32)
START = {"w": np.array([0.5, -1.0, 0.0], np.float32), "b": np.array([[2.0]], np.float32)}
MEANS = [
    {"w": np.array(w, np.float32), "b": np.array([[b]], np.float32)}
    for w, b in (([0.6, -0.5, 0.1], 1.0), ([0.2, -0.5, -0.3], 1.5), ([1.0, 0.0, 0.01], 2.0))
]
SETTINGS: dict[str, Optimiser] = {
    "fedavgm": Optimiser(name="fedavgm", rate=0.5, momentum=0.9),
    "fedadagrad": Optimiser(name="fedadagrad", rate=0.1),
    "fedyogi": Optimiser(name="fedyogi", rate=0.01, beta_2=0.9),
    "fedadam": Optimiser(name="fedadam", rate=0.1),
}
FLOWER: dict[str, list[float]] = {
    "fedavgm": [0.5930001, 0.115, -0.152, 1.12],
    "fedadagrad": [0.5792098, -0.758437, 0.004125391, 1.875595],
    "fedyogi": [0.5026065, -0.9878494, -0.0008187928, 1.989373],
    "fedadam": [0.543563, -0.755847, -0.01655472, 1.794422],
}
"""What Flower 1.41.0 made of START by three rounds with MEANS: w, then b. `by_flower` below."""


def rounds(optimiser: Optimiser, means: list[dict[str, Floats]] = MEANS) -> Iterator[Any]:
    """Yield the adapter and the state after each round from START."""
    current, state = dict(START), State()
    for mean in means:
        current, state = stepped(optimiser, state, current, mean)
        yield current, state


def flat(tensors: dict[str, Floats]) -> list[float]:
    return [float(x) for name in ("w", "b") for x in tensors[name].flat]


@given(
    st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=6),
    st.sampled_from([Optimiser(), Optimiser(name="fedavgm", momentum=0.0)]),
)
def test_fedavgm_without_momentum_at_rate_one_is_fedavg_to_the_bit(
    pairs: list[tuple[float, float]], optimiser: Optimiser
) -> None:
    current, mean = ({"w": np.array(side, np.float32)} for side in zip(*pairs, strict=True))
    state = State()
    for _ in range(2):
        found, state = stepped(optimiser, state, current, mean)
        assert (found["w"] + 0).tobytes() == (mean["w"] + 0).tobytes()  # -0 and 0 are one number
        current, mean = mean, current


@pytest.mark.parametrize("name", SETTINGS)
def test_the_numbers_are_flowers(name: str) -> None:
    *_, (found, _) = rounds(SETTINGS[name])
    assert flat(found) == pytest.approx(FLOWER[name], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_flower_itself_gives_them_where_it_is_installed(name: str) -> None:
    pytest.importorskip("flwr")
    assert by_flower(SETTINGS[name]) == pytest.approx(FLOWER[name], rel=1e-6)


def by_flower(optimiser: Optimiser) -> list[float]:
    """Three rounds by Flower's strategy, told the clients' mean in place of their messages."""
    app, strategy = (import_module(f"flwr.{name}") for name in ("app", "serverapp.strategy"))

    def record(tensors: Tensors) -> Any:
        return app.ArrayRecord({name: app.Array(tensor) for name, tensor in tensors.items()})

    match optimiser.name:
        case "fedavgm":
            server = strategy.FedAvgM(
                server_learning_rate=optimiser.rate, server_momentum=optimiser.momentum
            )
        case "fedadagrad":
            server = strategy.FedAdagrad(eta=optimiser.rate, tau=optimiser.tau)
        case "fedyogi" | "fedadam":
            kind = strategy.FedYogi if optimiser.name == "fedyogi" else strategy.FedAdam
            server = kind(
                eta=optimiser.rate,
                beta_1=optimiser.beta_1,
                beta_2=optimiser.beta_2,
                tau=optimiser.tau,
            )
    current = record(START)
    for number, mean in enumerate(MEANS, 1):
        told = (record(mean), app.MetricRecord())
        averaging = strategy.FedAvg
        with (
            mock.patch.object(averaging, "configure_train", return_value=[]),
            mock.patch.object(averaging, "aggregate_train", return_value=told),
        ):
            server.configure_train(number, current, app.ConfigRecord(), mock.Mock())
            current, _ = server.aggregate_train(number, [])
    arrays = {name: array.numpy().astype(np.float32) for name, array in current.items()}
    return flat(arrays)


def by_hand(optimiser: Optimiser) -> list[float]:
    """The equations at the head of optimiser.py, a number at a time."""
    results = []
    assert optimiser.rate
    for i, x in enumerate(flat(START)):
        m = v = 0.0
        for t, mean in enumerate(MEANS, 1):
            d = flat(mean)[i] - x
            match optimiser.name:
                case "fedavgm":
                    m = optimiser.momentum * m + d
                    x += optimiser.rate * m
                case "fedadagrad":
                    v += d**2
                    x += optimiser.rate * d / (math.sqrt(v) + optimiser.tau)
                case "fedyogi" | "fedadam":
                    m = optimiser.beta_1 * m + (1 - optimiser.beta_1) * d
                    c, keep = 1.0, optimiser.beta_2
                    if optimiser.name == "fedyogi":
                        sign = (v > d**2) - (v < d**2)
                        v -= (1 - keep) * d**2 * sign
                    else:
                        v = keep * v + (1 - keep) * d**2
                        c = math.sqrt(1 - keep ** (t + 1)) / (1 - optimiser.beta_1 ** (t + 1))
                    x += c * optimiser.rate * m / (math.sqrt(v) + optimiser.tau)
        results.append(x)
    return results


@pytest.mark.parametrize("name", SETTINGS)
def test_the_numbers_are_those_of_the_equations(name: str) -> None:
    *_, (found, _) = rounds(SETTINGS[name])
    assert flat(found) == pytest.approx(by_hand(SETTINGS[name]), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_stop_and_resume_equals_never_stopping_to_the_bit(name: Name, tmp_path: Path) -> None:
    optimiser = SETTINGS.get(name, Optimiser())
    *_, (expected, whole) = rounds(optimiser)
    (current, state), *_ = rounds(optimiser, MEANS[:1])
    for mean in MEANS[1:]:
        save_file(state.tensors(), tmp_path / "state.safetensors")
        restored = State.of(load_file(tmp_path / "state.safetensors"))
        current, state = stepped(optimiser, restored, current, mean)
    assert {k: v.tobytes() for k, v in current.items()} == {
        k: v.tobytes() for k, v in expected.items()
    }
    assert state.step == whole.step == len(MEANS)
    assert list(state.tensors()) == list(whole.tensors())


@pytest.mark.parametrize("name", NAMES)
def test_results_are_float32_and_inputs_are_left_alone(name: Name) -> None:
    before = {k: v.tobytes() for k, v in START.items()}
    for current, state in rounds(SETTINGS.get(name, Optimiser())):
        tensors: list[NDArray[Any]] = [*current.values(), *state.momentum.values()]
        assert {tensor.dtype for tensor in (*tensors, *state.squares.values())} == {
            np.dtype(np.float32)
        }
    assert {k: v.tobytes() for k, v in START.items()} == before


@pytest.mark.parametrize("name", NAMES)
def test_no_change_leaves_the_adapter_as_it_is(name: Name) -> None:
    optimiser = SETTINGS.get(name, Optimiser())
    found, _ = stepped(optimiser, State(), START, START)
    assert flat(found) == flat(START)


def test_another_adapter_than_the_states_is_refused() -> None:
    _, state = stepped(SETTINGS["fedadam"], State(), START, MEANS[0])
    other = START | {"w": np.zeros(4, np.float32)}
    message = r"expected 'w' of the optimiser's state as in the adapter, \[4\], found \[3\]; a chan"
    with pytest.raises(FederationError, match=message):
        stepped(SETTINGS["fedadam"], state, other, other)
    with pytest.raises(FederationError, match=r"'w' of the clients' mean .*\[3\], found no such"):
        stepped(Optimiser(), State(), START, {"b": START["b"]})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "with 'step', found nothing; resume from another round"),
        ({"lora": np.zeros(1)}, "with 'step', found lora"),
        ({"step": np.zeros(1, np.float32)}, "with 'step', found step"),
        ({"step": np.zeros(1, np.int64), "x.w": np.zeros(1)}, "found 'x.w'; resume from another"),
        ({"step": np.zeros(1, np.int64), "m": np.zeros(1)}, "m.NAME and v.NAME .*, found 'm'"),
    ],
)
def test_what_is_no_state_is_refused(tensors: dict[str, NDArray[Any]], message: str) -> None:
    with pytest.raises(FederationError, match=message):
        State.of(tensors)


def test_a_rate_is_given_where_it_means_something() -> None:
    message = "no rate for fedavg, which takes the clients' mean, found 0.5; leave it out, or take"
    with pytest.raises(FederationError, match=message):
        Optimiser(rate=0.5)
    for name in ("fedadagrad", "fedyogi", "fedadam"):
        with pytest.raises(FederationError, match=f"expected a rate for {name}, found none; each"):
            Optimiser(name=name)
    assert Optimiser(name="fedavgm", momentum=0).rate is None  # the mean, as a step of 1 is


@pytest.mark.parametrize(
    "settings", [{"name": "sgd"}, {"rate": 0}, {"rate": math.inf}, {"momentum": 1}, {"tau": 0}]
)
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Optimiser(**settings)
