"""A dry run of a study of selection: what its arms would train, read, hold and leave.

    study file, config.json --+--> each arm: clients x rounds x seeds, tokens of one client's round
    text, where it is there --+    features: all examples once through the model, for each encoding

No weight is read and nothing is written. The text is read for how many examples it has and how long
they are, at LETTERS_A_TOKEN; where it is not there, each client is taken to train as long as it may
(`training.num_tokens`), which is the most that can be.

What is chosen without a budget only the run itself knows: PAPER_SHARE is put in its place. In the
mean a client holds n / c examples and gives its share of the budget; of fewer than one example only
so many clients train.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedgraft.errors import StudyError
from fedgraft.federation.partition import Partition
from fedgraft.selection.features import Encoding
from fedgraft.study.cost import graft_flops
from fedgraft.study.machine import Machine
from fedgraft.study.plan import (
    SHARE,
    Plan,
    Reading,
    Work,
    amiss,
    check_machine,
    misfit,
    model_bytes,
    shape_of,
    training_of,
)
from fedgraft.study.selection import Arm, SelectionStudy, load_source
from fedgraft.study.shape import Shape
from fedgraft.training.settings import AdapterSettings
from fedgraft.weights.checkpoint import DTYPES, fetched

LETTERS_A_TOKEN = 4
"""Of English text, about."""
TEMPLATE_TOKENS = 30
"""Of Alpaca's prompt or a chat template around an example, about."""
PAPER_SHARE = 0.015
"""Of all examples at most is what FedHDS chooses by itself (arXiv 2410.10926, table 2)."""
KEPT_ADAPTERS = 2
"""Rounds of its adapter that a client keeps while an arm runs."""


@dataclass(frozen=True, slots=True)
class _Examples:
    """How much there is to train on."""

    count: int
    tokens: float
    """Of one, in the mean."""
    num_groups: int


def plan(
    study: SelectionStudy, machine: Machine, *, num_processes: int = 1, share: float = SHARE
) -> Plan:
    """Say what a study of selection would take on a machine; see the head of this file.

    Raises StudyError as `study.plan.plan` does.
    """
    check_machine(num_processes, share)
    family = study.graft.family if study.graft else None
    model = family.base if family else study.model
    assert model
    shape, at_hand = shape_of(
        model,
        family.shape if family else study.shape,
        "graft.family.shape" if family else "shape",
    )
    settings = study.federation.training
    found = _examples(study)
    works = [
        _arm_work(name, *_runs(study, arm, found), settings, shape)
        for name, arm in study.arms.items()
    ]
    row = study.row_length
    faults = list(amiss(_arm_work("", 1, settings.num_tokens, settings, shape), row, num_processes))
    if faults:
        raise StudyError(
            f"study {study.name}: found {len(faults)} settings with which training could not "
            "start:\n" + "\n".join(f"  federation.training.{fault}" for fault in faults)
        )
    trainings = [training_of(work, row, machine, num_processes, share) for work in works]
    if graft := study.graft:
        work = Work(
            stage="pre-training",
            key="graft.pretrain",
            settings=graft.pretrain,
            num_runs=len(study.seeds),
            shape=shape,
        )
        trainings.insert(0, training_of(work, graft.row_length, machine, num_processes, share))
    precision = trainings[-1].precision
    reading = _reading(study, found, shape, machine.flops(precision) * share * num_processes)
    adapter = shape.adapter_parameters(settings.rank) * DTYPES["F32"].itemsize
    models = (family.base, family.instruct) if family else (model,)
    missing = tuple(one for one in models if fetched(one) is None)
    num_arms = len(study.arms) * len(study.seeds)
    num_grafts = len(study.seeds) if study.graft else 0
    return Plan(
        study=study.name,
        machine=machine,
        num_processes=num_processes,
        share=share,
        base=model,
        shape=shape,
        at_hand=at_hand,
        trainings=tuple(trainings),
        num_grafts=num_grafts,
        graft_flops=num_grafts * graft_flops(shape.num_parameters),
        tuning_ratio=None,
        reading=reading,
        disk={
            "models to fetch": len(missing) * model_bytes(shape),
            **({"newer bases and grafts": 2 * num_grafts * model_bytes(shape)} if family else {}),
            "features of examples": reading.num_bytes if reading else 0,
            "adapters": num_arms * adapter,
            "clients' adapters, while an arm runs": KEPT_ADAPTERS
            * _num_clients(study.partition, found)
            * adapter,
        },
        not_there=study.not_there + missing,
        notes=(
            *_notes(study, found),
            *(
                note
                for one in trainings[: 2 if study.graft else 1]  # arms hold the same
                for note in misfit(one, machine, num_processes)
            ),
        ),
    )


def _arm_work(
    name: str, num_runs: int, num_tokens: int, settings: AdapterSettings, shape: Shape
) -> Work:
    """What the clients of an arm train, each time."""
    return Work(
        stage=name,
        key="federation.training",
        settings=settings.model_copy(update={"num_tokens": num_tokens}),
        num_runs=num_runs,
        shape=shape,
    )


def _examples(study: SelectionStudy) -> _Examples | None:
    """What there is to train on, at LETTERS_A_TOKEN; None where it is not there."""
    if not Path(study.train.file).exists():
        return None
    dialogues = load_source(study.train)
    lengths = [
        TEMPLATE_TOKENS + sum(len(one.content) for one in dialogue.messages) / LETTERS_A_TOKEN
        for dialogue in dialogues
    ]
    short = [length for length in lengths if length <= study.row_length] or lengths
    count = min(len(short), study.train.max_examples or len(short))
    groups = {dialogue.group for dialogue in dialogues}
    return _Examples(count, sum(short) / len(short), len(groups))


def _num_clients(partition: Partition, found: _Examples | None) -> int:
    if partition.name == "tasks" and found:
        return found.num_groups
    return partition.num_clients


def _runs(study: SelectionStudy, arm: Arm, found: _Examples | None) -> tuple[int, int]:
    """How often a client trains in all rounds and seeds, and on how many tokens each time."""
    federation = study.federation
    num_clients = 1 if arm.pooled else _num_clients(study.partition, found)
    asked = max(1, round((arm.sampled or federation.sampled) * num_clients))
    rounds, most = federation.num_rounds * len(study.seeds), federation.training.num_tokens
    if found is None:
        return rounds * asked, most
    share = 1.0 if arm.method == "all" else arm.budget or PAPER_SHARE
    chosen = max(1.0, share * found.count * asked / num_clients)
    trainers = max(1, min(asked, round(chosen)))
    tokens = chosen / trainers * found.tokens
    if federation.passes is not None:
        most = min(most, max(1, round(federation.passes * tokens)))
    return rounds * trainers, most


def _reading(
    study: SelectionStudy, found: _Examples | None, shape: Shape, rate: float
) -> Reading | None:
    """Features of all examples, once for each encoding; None where no arm asks for them."""
    encodings = {
        arm.encoding.model_dump_json(): arm.encoding
        for arm in study.arms.values()
        if arm.method not in ("all", "random")
    }
    own = [encoding for encoding in encodings.values() if not encoding.encoder]
    if not own or found is None:
        return None
    tokens = round(found.count * found.tokens)
    layers = shape.num_hidden_layers
    attention = 4.0 * layers * shape.attention_size * found.tokens
    work = len(own) * tokens * (2.0 * layers * shape.layer_weights + attention)
    numbers = sum(_num_layers(encoding, shape) for encoding in own) * shape.hidden_size
    return Reading(
        num_examples=found.count,
        num_tokens=tokens,
        num_times=len(own),
        flops=work,
        seconds=work / rate,
        num_bytes=found.count * numbers * DTYPES["F32"].itemsize,
    )


def _num_layers(encoding: Encoding, shape: Shape) -> int:
    match encoding.layers:
        case "all":
            return shape.num_hidden_layers + 1
        case "last":
            return 1
        case layers:
            return len(layers)


def _notes(study: SelectionStudy, found: _Examples | None) -> Iterator[str]:
    if found is None:
        yield (
            "the text is not there, so each client is taken to train as long as it may, and "
            "features are not counted"
        )
        return
    yield (
        f"{found.count:,} examples of about {found.tokens:.0f} tokens, "
        f"{_num_clients(study.partition, found)} clients"
    )
    yield (
        "a client trains for a few steps: what it takes to begin and to end, a second or two each "
        "time, is not counted"
    )
    open_ended = [
        name for name, arm in study.arms.items() if arm.method != "all" and arm.budget is None
    ]
    if open_ended:
        yield (
            f"{', '.join(open_ended)}: without a budget only the run knows how many are chosen; "
            f"{PAPER_SHARE:.1%} is taken"
        )
    if any(arm.encoding.encoder for arm in study.arms.values()):
        yield "what another encoder reads is not counted"
