"""A dry run of a study: what it would train, hold, compute and leave, before anything is done.

    study file ----+
    config.json    +--> plan --> parameters, rows, steps, memory, FLOPs, hours, disk
    and headers ---+             (no weight is read, no text is read, nothing is written)

Where the models are not at hand their sizes come from `family.shape` in the file; where they are,
both must agree. Time is operations over rate, so it is as good as the share of the machine's rate
that training reaches; scoring is not in it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fedgraft.errors import StudyError
from fedgraft.models import Precision
from fedgraft.provenance import RECORD
from fedgraft.study.cost import (
    ADAPTERS,
    TRAINING,
    Estimate,
    Operations,
    Prices,
    graft_flops,
    operations,
    training_flops,
    tuning_ratio,
)
from fedgraft.study.machine import Machine
from fedgraft.study.memory import Memory, training_memory
from fedgraft.study.recipes import LineageStudy, Sizes, model_of, settings_of
from fedgraft.study.shape import Shape
from fedgraft.study.study import FederationPart, Study, faults_of
from fedgraft.training.settings import AdapterSettings, Lora, PretrainSettings, TrainingSettings
from fedgraft.weights.checkpoint import CONFIG_DTYPES, DTYPES, Checkpoint, fetched

SHARE = 0.45
"""Of a machine's matrix rate that training reaches unless told otherwise."""
BYTES_A_TOKEN = 4
"""Of English text, about; for saying how often text is read."""
TRAINED_SHARE = 0.8
"""Of documents that are read; the others are held out."""
STATE_COPIES = 3
"""States to resume from that stand at once: two kept, one being written."""
STATE_BYTES = 12
"""A trained parameter in such a state: its float32 number and two moments."""
ARMS_TRAINED = 2
"""S1 and the newer base; a study of departments trains the newer base alone."""
OTHER_ARMS = 4
"""Of a study of departments, beside its rules: each with the tokens of one rule."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Runs that a study asks for."""

    stage: str
    key: str
    """Where the file sets them."""
    settings: TrainingSettings
    num_runs: int
    shape: Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """Runs of one kind; all of them do the same work."""

    stage: str
    """`pre-training`, `domains`, `adapters`, or the models of a study of lineages."""
    shape: Shape
    num_runs: int
    num_tokens: int
    """Of one run, like everything below."""
    row_length: int
    num_rows: int
    num_steps: int
    micro_batch_rows: int
    """Rows in one forward pass of one process."""
    precision: Precision
    gradient_checkpointing: bool
    rank: int | None
    """Of LoRA; all parameters are trained where None."""
    num_trained: int
    """Trainable parameters."""
    paper_flops: float
    """6 x parameters x tokens."""
    operations: Operations
    seconds: float
    memory: Memory
    """Of one process."""
    checkpoints: tuple[int, ...]
    """Token counts at which one is left."""
    bytes_left: int
    """Of all checkpoints of the run."""
    state_bytes: int
    """Beside them while the run goes on, to resume from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grafts:
    """All grafts of a study, and the residuals that are added."""

    num: int
    flops: float
    residual_bytes: int
    num_bytes: int
    """Of the grafts that stand at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Examples that the frozen model reads so that they can be compared."""

    num_examples: int
    num_tokens: int
    num_times: int
    """Encodings, each of which reads them once."""
    flops: float
    """Of all, like the following."""
    seconds: float
    num_bytes: int
    """That are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a study would take."""

    study: str
    machine: Machine
    num_processes: int
    share: float
    base: str
    shape: Shape
    at_hand: bool
    """Whether sizes were read from the checkpoint; else they are the file's."""
    trainings: tuple[Training, ...]
    num_grafts: int
    graft_flops: float
    """Of all grafts."""
    tuning_ratio: float | None
    """How many times a pre-training run's FLOPs the makers' instruction tuning took, if known."""
    disk: Mapping[str, int]
    """Bytes by what they are for."""
    not_there: tuple[str, ...]
    """Text and models that the study needs and a dry run does not."""
    notes: tuple[str, ...]
    """What a person should know before starting."""
    reading: Reading | None = None
    """Of a study of selection."""
    prices: Prices | None = None
    """Of a device; None where the study file names none."""

    @property
    def flops(self) -> float:
        """Of all training."""
        return sum(one.num_runs * one.operations.total for one in self.trainings)

    @property
    def seconds(self) -> float:
        """Of all training, one run after the other."""
        return sum(one.num_runs * one.seconds for one in self.trainings)

    @property
    def kwh(self) -> float | None:
        """Energy of all training on all devices; None where `prices` does not say."""
        return self.prices.kwh(self.seconds, self.num_processes) if self.prices else None

    @property
    def money(self) -> float | None:
        """The same in the currency of `prices`."""
        return self.prices.money(self.seconds, self.num_processes) if self.prices else None

    @property
    def estimates(self) -> tuple[Estimate, ...]:
        """By kind of work, for the result."""
        kinds: dict[str, list[Training]] = {}
        for one in self.trainings:
            work = ADAPTERS if one.stage == "adapters" else TRAINING
            kinds.setdefault(work, []).append(one)
        return tuple(
            Estimate(
                work=work,
                machine=self.machine.name,
                rate=self.machine.flops(ours[0].precision) * self.num_processes,
                num_runs=sum(one.num_runs for one in ours),
                paper_flops=sum(one.num_runs * one.paper_flops for one in ours),
                operations=sum(one.num_runs * one.operations.total for one in ours),
                seconds=sum(one.num_runs * one.seconds for one in ours),
            )
            for work, ours in kinds.items()
        )


def plan(
    study: Study | LineageStudy, machine: Machine, *, num_processes: int = 1, share: float = SHARE
) -> Plan:
    """Say what a study would take on a machine, without doing any of it.

    Args:
        num_processes: Devices that train together, each with its part of a step's rows.
        share: Of the machine's matrix rate that is reached.

    Raises StudyError, with all faults at once, for settings under which a run could not start: a
    budget below one row, rows that cannot be shared out evenly, sizes that are not the model's.
    """
    check_machine(num_processes, share)
    row = study.row_length
    if isinstance(study, LineageStudy):
        came = {
            name: shape_of(checkpoint, study.shape_of(name), "shape")
            for name, checkpoint in study.checkpoints.items()
        }
        first = next(iter(came))
        base, (shape, at_hand) = study.checkpoints[first], came[first]
        shapes = _shapes(study, {name: found for name, (found, _) in came.items()})
        models = {study.checkpoints[name]: shapes[name] for name in came}
        works = list(_of_lineage(study, shapes))
    else:
        base = study.family.base
        shape, at_hand = shape_of(base, study.family.shape, "family.shape")
        models = dict.fromkeys((base, study.family.instruct), shape)
        works = list(_of_study(study, shape))
    faults = [
        f"  {work.key}.{fault}" for work in works for fault in amiss(work, row, num_processes)
    ]
    if faults:
        raise StudyError(
            f"study {study.name}: found {len(faults)} settings with which training could not "
            "start:\n" + "\n".join(faults)
        )
    trainings = tuple(training_of(work, row, machine, num_processes, share) for work in works)
    if isinstance(study, LineageStudy):
        grafts, ratio = _grafts_of_lineage(study, shapes), None
    else:
        grafts, tuning = _grafts_of_study(study, shape, trainings[0]), study.tuning
        ratio = tuning_ratio(tuning, study.pretrain.num_tokens) if tuning else None
    missing = tuple(model for model in models if fetched(model) is None)
    return Plan(
        study=study.name,
        machine=machine,
        num_processes=num_processes,
        share=share,
        base=base,
        shape=shape,
        at_hand=at_hand,
        trainings=trainings,
        num_grafts=grafts.num,
        graft_flops=grafts.flops,
        tuning_ratio=ratio,
        disk={
            "models to fetch": sum(model_bytes(models[model]) for model in missing),
            "residual": grafts.residual_bytes,
            **{f"checkpoints of {one.stage}": one.num_runs * one.bytes_left for one in trainings},
            "grafts": grafts.num_bytes,
            "to resume from, while training": max((t.state_bytes for t in trainings), default=0),
        },
        not_there=study.not_there + missing,
        notes=tuple(_notes(study, shape, machine, trainings, works, num_processes)),
        prices=study.prices,
    )


def _of_study(study: Study, shape: Shape) -> Iterator[Work]:
    """What a study of arms, of forgetting or of departments trains."""
    num_ways = len(study.ways) if study.curve else 1
    num_arms = 1 if study.kind == "departments" else ARMS_TRAINED
    settings: dict[str, tuple[TrainingSettings, int]] = {
        "pre-training": (study.pretrain, num_arms * num_ways * len(study.seeds))
    }
    if study.curve and study.curve.domains:
        runs = ARMS_TRAINED * len(study.curve.domains.texts) * len(study.seeds)
        settings["domains"] = study.domain_settings, runs
    if study.adapters:
        settings["adapters"] = study.adapters, len(study.departments) * len(study.seeds)
    if study.federation:
        settings["adapters"] = study.federation.training, _client_rounds(study, study.federation)
    for stage, (one, num_runs) in settings.items():
        key = "pretrain" if stage == "pre-training" else stage
        yield Work(stage=stage, key=key, settings=one, num_runs=num_runs, shape=shape)


def _shapes(study: LineageStudy, came: Mapping[str, Shape]) -> dict[str, Shape]:
    """Of every model of a study of lineages, those that are made included."""
    shapes = dict(came)
    for name, recipe in study.recipes.items():
        shapes[name] = shapes[model_of(recipe.parent)]
        if recipe.fresh:
            shapes[name] = _resized(name, shapes[name], recipe.fresh)
    return shapes


def _of_lineage(study: LineageStudy, shapes: Mapping[str, Shape]) -> Iterator[Work]:
    """What a study of lineages trains; models that are trained alike stand together."""
    alike: dict[tuple[PretrainSettings, Shape], list[str]] = {}
    for name, recipe in study.recipes.items():
        if recipe.training:
            alike.setdefault((settings_of(recipe.training), shapes[name]), []).append(name)
    for (settings, own), names in alike.items():
        recipe = study.recipes[names[0]]
        yield Work(
            stage=", ".join(names),
            key=f"models.{names[0]}.{recipe.verb}",
            settings=settings,
            num_runs=sum(len(study.seeds) if study.is_seeded(name) else 1 for name in names),
            shape=own,
        )


def _resized(name: str, shape: Shape, sizes: Sizes) -> Shape:
    try:
        return Shape.model_validate(shape.model_dump() | sizes.model_dump(exclude_none=True))
    except ValidationError as error:
        raise StudyError(f"models.{name}.fresh: {'; '.join(faults_of(error))}") from error


def _grafts_of_lineage(study: LineageStudy, shapes: Mapping[str, Shape]) -> Grafts:
    """Each with the size of its model; of those that are scored and go, one stands at a time."""
    grafts = {name: one.graft for name, one in study.recipes.items() if one.graft}
    made = {name: len(study.seeds) if study.is_seeded(name) else 1 for name in grafts}
    sizes = {name: model_bytes(shapes[name]) for name in grafts}
    residuals = {
        added.residual: (len(study.seeds) if any(map(study.is_seeded, added.residual)) else 1)
        * residual_bytes(shapes[model_of(added.residual[0])])
        for added in grafts.values()
    }
    passing = [name for name in grafts if study.is_passing(name)]
    return Grafts(
        num=sum(made.values()),
        flops=sum(n * graft_flops(shapes[name].num_parameters) for name, n in made.items()),
        residual_bytes=sum(residuals.values()),
        num_bytes=sum(n * sizes[name] for name, n in made.items() if name not in passing)
        + max((sizes[name] for name in passing), default=0),
    )


def _grafts_of_study(study: Study, shape: Shape, pretraining: Training) -> Grafts:
    num_ways = len(study.ways) if study.curve else 1
    texts = study.curve.domains.texts if study.curve and study.curve.domains else {}
    num = len(study.seeds) * (
        num_ways * len(pretraining.checkpoints) + len(study.merging) + len(texts)
    )
    return Grafts(
        num=num,
        flops=num * graft_flops(shape.num_parameters),
        residual_bytes=residual_bytes(shape),
        num_bytes=(1 if study.curve else num) * model_bytes(shape),  # a curve's are scored and go
    )


def _client_rounds(study: Study, federation: FederationPart) -> int:
    """How often one client trains in one round, in all arms and seeds; elsewhere as many tokens."""
    num_clients = len(study.departments) * federation.partition.num_clients
    num_arms = len(federation.rules) + OTHER_ARMS if federation.rules else 1
    return num_arms * num_clients * federation.num_rounds * len(study.seeds)


def check_machine(num_processes: int, share: float) -> None:
    """Raise StudyError for no process, and for a share of a machine's rate that cannot be."""
    if not 0 < share <= 1:
        raise StudyError(
            f"expected a share of the machine's rate above 0 and at most 1, found {share:g}; "
            f"{SHARE} is a fair guess on a GPU"
        )
    if num_processes < 1:
        raise StudyError(f"expected at least 1 process, found {num_processes}; give a number above")


def memory_choices(plan: Plan, training: Training) -> dict[str, Memory]:
    """What a run would hold by what is trained: `full`, or LoRA, with checkpointing or without."""
    rank = training.rank or Lora().rank
    return {
        in_words(chosen, recompute): training_memory(
            training.shape,
            micro_batch_rows=training.micro_batch_rows,
            row_length=training.row_length,
            precision=training.precision,
            gradient_checkpointing=recompute,
            rank=chosen,
            num_processes=plan.num_processes,
        )
        for chosen in (None, rank)
        for recompute in (False, True)
    }


def in_words(rank: int | None, gradient_checkpointing: bool) -> str:
    """What is trained, and how."""
    trained = "full" if rank is None else f"LoRA {rank}"
    return f"{trained}, recompute" if gradient_checkpointing else trained


def shape_of(base: str, given: Shape | None, where: str) -> tuple[Shape, bool]:
    """The model's sizes, and whether the checkpoint itself said so."""
    folder = fetched(base)
    if folder is None:
        if given is None:
            raise StudyError(
                f"expected a model at hand or its sizes in `{where}`, found {base} not fetched and "
                f"no sizes; copy them from its config.json, or fetch it with `hf download {base}`"
            )
        return given, False
    checkpoint = Checkpoint.open(folder)
    found = Shape.of(checkpoint)
    if given is not None:
        for key in Shape.model_fields:
            stated, there = getattr(given, key), getattr(found, key)
            if key in given.model_fields_set and stated != there:
                raise StudyError(
                    f"{where}.{key}: expected {there}, which {folder} has, found {stated}; "
                    "correct it, or take `shape` out: the checkpoint is at hand"
                )
    return found, True


def _rows_per_step(settings: TrainingSettings, row: int) -> int:
    return max(1, settings.batch_tokens // row)


def _rank(settings: TrainingSettings) -> int | None:
    """Of LoRA; None where all parameters are trained."""
    match settings:
        case AdapterSettings():
            return settings.rank
        case PretrainSettings(lora=Lora() as lora):
            return lora.rank
    return None


def _budgets(settings: TrainingSettings) -> tuple[int, ...]:
    return settings.budgets if isinstance(settings, PretrainSettings) else ()


def amiss(work: Work, row: int, num_processes: int) -> Iterator[str]:
    """Settings with which runs could not start."""
    yield from _faults(work, row)
    yield from _uneven(work.settings, row, num_processes)


def _faults(work: Work, row: int) -> Iterator[str]:
    """Settings with which no number of processes could start."""
    settings, tokens = work.settings, work.settings.num_tokens
    if tokens < row:
        yield (
            f"num_tokens: expected at least one row of {row} tokens, found {tokens}; raise "
            "it or choose a smaller row_length"
        )
    for budget in _budgets(settings):
        if not row <= budget < tokens:
            yield (
                f"budgets: expected token counts from one row ({row}) to below num_tokens "
                f"({tokens}), found {budget}; correct it"
            )
    where = "rank" if isinstance(settings, AdapterSettings) else "lora.rank"
    rank, narrowest = _rank(settings), min(min(size) for size in work.shape.matrices.values())
    if rank is not None and rank > narrowest:
        yield (
            f"{where}: expected at most {narrowest}, the model's narrowest layer, found {rank}; "
            "choose a smaller one"
        )


def _uneven(settings: TrainingSettings, row: int, processes: int) -> Iterator[str]:
    """Rows of a step that processes and forward passes cannot share out evenly."""
    rows = _rows_per_step(settings, row)
    if rows % processes:
        yield (
            f"batch_tokens: expected the {rows} rows of a step to be shared out evenly among "
            f"{processes} processes; choose a multiple of {processes * row}, or "
            "another number of processes"
        )
    elif settings.micro_batch_rows and (rows // processes) % min(
        settings.micro_batch_rows, rows // processes
    ):
        yield (
            f"micro_batch_rows: expected a divisor of the {rows // processes} rows that a "
            f"process has in a step, found {settings.micro_batch_rows}; choose a divisor"
        )


def training_of(
    work: Work,
    row: int,
    machine: Machine,
    num_processes: int,
    share: float,
) -> Training:
    settings, shape = work.settings, work.shape
    rows_per_step, rank = _rows_per_step(settings, row), _rank(settings)
    own_rows = rows_per_step // num_processes
    micro = min(settings.micro_batch_rows or own_rows, own_rows)
    precision = machine.precision if settings.precision == "auto" else settings.precision
    num_steps = max(1, round(settings.num_tokens / row / rows_per_step))
    num_rows = num_steps * rows_per_step
    counted = operations(
        shape,
        num_rows * row,
        row,
        gradient_checkpointing=settings.gradient_checkpointing,
        rank=rank,
    )
    adapter = isinstance(settings, AdapterSettings)
    trained = shape.num_parameters if rank is None else shape.adapter_parameters(rank)
    checkpoints = tuple(sorted({*_budgets(settings), settings.num_tokens}))
    stored = trained * DTYPES["F32"].itemsize if adapter else model_bytes(shape)
    return Training(
        stage=work.stage,
        shape=shape,
        num_runs=work.num_runs,
        num_tokens=num_rows * row,
        row_length=row,
        num_rows=num_rows,
        num_steps=num_steps,
        micro_batch_rows=micro,
        precision=precision,
        gradient_checkpointing=settings.gradient_checkpointing,
        rank=rank,
        num_trained=trained,
        paper_flops=training_flops(shape.num_parameters, num_rows * row),
        operations=counted,
        seconds=counted.total / (machine.flops(precision) * share * num_processes),
        memory=training_memory(
            shape,
            micro_batch_rows=micro,
            row_length=row,
            precision=precision,
            gradient_checkpointing=settings.gradient_checkpointing,
            rank=rank,
            num_processes=num_processes,
        ),
        checkpoints=checkpoints,
        bytes_left=len(checkpoints) * stored,
        state_bytes=STATE_COPIES * STATE_BYTES * trained,
    )


def model_bytes(shape: Shape) -> int:
    """A checkpoint of the model on disk, in the dtype of its weights."""
    names = {name: key for key, name in CONFIG_DTYPES.items()}
    return shape.num_parameters * DTYPES[names[shape.dtype]].itemsize


def residual_bytes(shape: Shape) -> int:
    """A residual on disk, which is float32."""
    return shape.num_parameters * DTYPES["F32"].itemsize


def _notes(
    study: Study | LineageStudy,
    shape: Shape,
    machine: Machine,
    trainings: tuple[Training, ...],
    works: list[Work],
    num_processes: int,
) -> Iterator[str]:
    row, positions = study.row_length, shape.max_position_embeddings
    for training in trainings:
        yield from misfit(training, machine, num_processes)
    if row > positions:
        yield (
            f"rows of {row} tokens are longer than the model's {positions} positions: a document "
            "over that is refused when training starts"
        )
    for work in works:
        if work.settings.batch_tokens < row and work.stage != "adapters":
            yield f"{work.key}.batch_tokens is below a row ({row}): a step reads one row"
    texts = [Path(path) for part in study.departments.values() for path in part.corpus]
    size = sum(_text_bytes(path) for path in texts)
    read = _read_of_departments(study)
    if size and read and not study.not_there:
        tokens = size / BYTES_A_TOKEN * TRAINED_SHARE
        yield (
            f"the text is {size / 1e6:.1f} MB, about {tokens / 1e6:.2g}M tokens to train on at "
            f"{BYTES_A_TOKEN} bytes each: a run reads it {read / tokens:.1f} times"
        )


def _read_of_departments(study: Study | LineageStudy) -> float:
    """Tokens of the departments' text in the longest run that reads it; 0 where none does."""
    share = study.replay.share if study.replay else 0.0
    if isinstance(study, Study):
        return study.pretrain.num_tokens * (1 - share)
    readings = [one.pretrain for one in study.recipes.values() if one.pretrain]
    return max(
        (
            one.num_tokens * (1 - (share if one.replay is None else one.replay))
            for one in readings
            if not one.texts
        ),
        default=0.0,
    )


def misfit(training: Training, machine: Machine, num_processes: int) -> Iterator[str]:
    """Where a run does not fit into a device's memory, and the first thing that would help."""
    if training.memory.total > machine.memory_bytes:
        yield (
            f"{training.stage} does not fit: {_gigabytes(training.memory.total)} a process, "
            f"{_gigabytes(machine.memory_bytes)} on {machine.name}; "
            + _remedy(training, machine, num_processes)
        )


def _remedy(training: Training, machine: Machine, num_processes: int) -> str:
    """The first thing that would make it fit: smaller passes, recomputing, more devices."""

    def fits(rows: int, recompute: bool, processes: int) -> bool:
        need = training_memory(
            training.shape,
            micro_batch_rows=rows,
            row_length=training.row_length,
            precision=training.precision,
            gradient_checkpointing=recompute,
            rank=training.rank,
            num_processes=processes,
        )
        return need.total <= machine.memory_bytes

    now = training.gradient_checkpointing
    if fits(1, now, num_processes):
        return "set micro_batch_rows: 1 (the result is the same)"
    if fits(1, True, num_processes):
        return "set gradient_checkpointing: true and micro_batch_rows: 1 (the result is the same)"
    processes, rows = num_processes, training.num_rows // training.num_steps
    while rows % (processes := 2 * processes) == 0:
        if fits(1, True, processes):
            return (
                f"{processes} processes with gradient_checkpointing: true and micro_batch_rows: 1 "
                "would do"
            )
    return "take LoRA, more rows a step for more processes, or larger devices"


def _text_bytes(path: Path) -> int:
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file() and p.name != RECORD)
    return path.stat().st_size if path.exists() else 0


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
