"""Three clients over Flower's messages make the adapter that they make in one process, to the bit.

The messages are Flower's own bytes and the residents are asked through their sockets; only the
SuperLink is left out. `tests/federation/test_deployment.py` has that one too.
"""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.federation.grids import LocalGrid, node_of

from fedgraft.federation.client import Client
from fedgraft.federation.flower import FlowerExchange
from fedgraft.federation.history import Kind
from fedgraft.federation.in_process import InProcess
from fedgraft.federation.plan import Plan
from fedgraft.federation.resident import serve
from fedgraft.federation.rounds import run_rounds
from fedgraft.federation.workplace import Workplace
from fedgraft.testing import TEXT, save_tiny
from fedgraft.text.corpus import Document
from fedgraft.text.dialogues import Dialogue, Message
from fedgraft.text.examples import Examples

NAMES = ("finance-1", "hr-1", "hr-2")


def examples(name: str, i: int, kind: Kind) -> Examples:
    """Six of a client; of dialogues the last but two is longer than a row."""
    texts = [f"{name} says {k}: {TEXT[(i + k) % 3]}" for k in range(6)]
    if kind == "documents":
        return [Document(id=f"{name}-{k}", source=name, text=text) for k, text in enumerate(texts)]
    return [
        Dialogue(
            id=f"{name}-{k}",
            messages=(
                Message(role="user", content=text * (9 if k == 3 else 1)),
                Message(role="assistant", content=f"{k} of {name}"),
            ),
        )
        for k, text in enumerate(texts)
    ]


def clients(model: Path, state: Path, kind: Kind) -> list[Client]:
    """Three clients, each with text of its own."""
    place, found = Workplace(model), []
    for i, name in enumerate(NAMES):
        ours = examples(name, i, kind)
        found.append(Client(name, place, ours[:4], ours[4:], state / name))
    return found


PLAN = Plan.model_validate(
    {
        "name": "three",
        "departments": {"finance": NAMES[:1], "hr": NAMES[1:]},
        "share": "organisation",
        "num_rounds": 2,
        "training": {"num_tokens": 128, "rank": 2, "learning_rate": 1e-2, "batch_tokens": 64},
        "rule": "fedex",  # means of both factors, and a change of the model's weights
        "row_length": 128,
        "window": 32,
        "timeout": 60,
    }
)


@pytest.mark.parametrize("kind", ["documents", "dialogues"])
def test_the_same_adapter_to_the_bit(tmp_path: Path, kind: Kind) -> None:
    model = save_tiny(tmp_path / "model")
    here = clients(model, tmp_path / "a", kind)
    run_rounds(InProcess(here), PLAN, model, tmp_path / "in-process")

    for client in clients(model, tmp_path / "b", kind):
        place = tmp_path / f"{client.name}.sock"
        threading.Thread(target=serve, args=(client, place), daemon=True).start()
        while not place.exists():
            time.sleep(0.01)
    grid = LocalGrid({name: node_of(str(tmp_path / f"{name}.sock")) for name in NAMES})
    generator = np.random.default_rng(0)
    grid.order = lambda waiting: list(generator.permutation(waiting)[:1])
    exchange = FlowerExchange(grid, NAMES, poll=0.01)
    history = run_rounds(exchange, PLAN, model, tmp_path / "flower")

    assert history.transport == "flower"
    assert history.examples == kind
    assert history.left_out == (dict.fromkeys(NAMES, 1) if kind == "dialogues" else {})
    assert all(part.counted for done in history.rounds for part in done.parts)
    one, other = (
        load_file(tmp_path / way / "adapters" / "organisation" / "adapter_model.safetensors")
        for way in ("in-process", "flower")
    )
    assert one.keys() == other.keys()
    assert any(tensor.any() for name, tensor in one.items() if "lora_B" in name)
    for name, tensor in one.items():
        assert tensor.tobytes() == other[name].tobytes()
