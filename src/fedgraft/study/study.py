"""A study file: the question, the family, the text, and the settings of every arm.

    kind           asked for by         what is compared
    arms           (nothing)            ways to a model that has read the new text
    forgetting     curve                the same, against tokens read
    departments    federation.rules     ways to an adapter for each department, over the graft

Studies of other kinds have files of their own: `study.selection`, `study.recipes`.

Paths may name a place, `pocket:base` or `data:dept/hr.jsonl`; the caller says where places are.
Others are relative to the study file. A model may also be a name on the hub.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from fedgraft.errors import StudyError
from fedgraft.evaluation.gate import DEFAULT_RULES, Rule
from fedgraft.evaluation.scorecard import RIGHT_AND_FOLLOWED
from fedgraft.federation import aggregate
from fedgraft.federation.partition import Partition
from fedgraft.federation.plan import Plan, Settings
from fedgraft.study.cost import Prices, Tuning
from fedgraft.study.result import ARMS, Way
from fedgraft.study.shape import Shape
from fedgraft.training.settings import AdapterSettings, PretrainSettings, TrainingSettings
from fedgraft.weights.compression import SmallForm
from fedgraft.weights.merging import PLAIN, Factors, Method

Kind = Literal["arms", "forgetting", "departments"]
MODELS = ("base", "instruct", "model", "encoder", "checkpoint")
"""Keys of a file whose value is a model, which may be a name on the hub."""
_File = TypeVar("_File", bound=BaseModel)


class Part(BaseModel):
    """A part of a study file: unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FamilyPart(Part):
    base: str
    instruct: str
    shape: Shape | None = None
    """Sizes from the models' config.json, for planning before they are fetched."""


class Texts(Part):
    """Where text comes from, and the field that holds it in JSONL."""

    corpus: tuple[str, ...] = Field(min_length=1)
    field: str = "text"


class Replay(Texts):
    """Old text that is mixed in, so that less is forgotten."""

    share: float = Field(gt=0, lt=1)


class Scored(Part):
    """Material of one kind for choosing (validation) and for reporting (test)."""

    validation: str
    test: str
    groups: tuple[str, ...] | None = Field(default=None, min_length=1)
    """The groups that count, e.g. `old`; all where None."""


class ScaleSearch(Part):
    """Scales to try on the validation split; the best by `metric` is used."""

    grid: tuple[FiniteFloat, ...] = Field(default=(1.0,), min_length=1)
    metric: str = RIGHT_AND_FOLLOWED


class Form(Part):
    """A residual in fewer bytes; see `weights.compression`."""

    name: SmallForm
    rank: int = Field(default=16, gt=0)
    """Of `lowrank` alone."""
    density: float = Field(default=0.1, gt=0, le=1)
    """Of `sparse` alone."""

    @property
    def words(self) -> str:
        """`low rank 16`."""
        match self.name:
            case "lowrank":
                return f"low rank {self.rank}"
            case "sparse":
                return f"sparse, {100 * self.density:g}% kept"
            case "sign":
                return "1 bit a number"
            case "int8":
                return "8 bits a number"
            case "packed":
                return "packed"


class Merging(Part):
    """A way to add the residual that is compared with plain addition, over the same scales."""

    method: Method = PLAIN
    factors: Factors = Factors()
    form: Form | None = None
    """The residual is stored in that form first; as it is where None."""


class Domains(Part):
    """Texts of other kinds, each read alone: how far is it from what the base knows, and what does
    reading it cost?"""

    num_tokens: int = Field(gt=0)
    """Read of each; one of the curve's budgets, where the study's own text is compared with them.
    Without replay, at the learning rate of `pretrain`."""
    own: str = "own text"
    """What the study's own text is called beside them."""
    texts: dict[Annotated[str, Field(pattern=r"^\w[\w. -]*$")], Texts] = Field(min_length=1)


class Curve(Part):
    """A study of forgetting against tokens, in place of a study of arms; a point at each of the
    budgets of `pretrain` and at its end."""

    learning_rates: tuple[float, ...] = ()
    """That of `pretrain` and others; that one alone where empty."""
    domains: Domains | None = None


class FederationPart(Settings):
    """How departments train adapters together: the settings of `federation.plan`, and who their
    clients are. `training` is of one client in one round."""

    partition: Partition = Partition(num_clients=3)
    """How the documents of each department go to its clients."""
    rules: tuple[aggregate.Rule, ...] = ()
    """With them the study is one of departments, which compares them; `rule` is then that of the
    adapter that all departments share."""

    @field_validator("partition")
    @classmethod
    def _seedless_partition(cls, partition: Partition) -> Partition:
        if "seed" in partition.model_fields_set:
            raise ValueError("the seed comes from `seeds`; take it out here")
        return partition

    @model_validator(mode="after")
    def _told_elsewhere(self) -> "FederationPart":
        told = {"seed": "seeds", "row_length": "row_length", "window": "evaluation.window"}
        if twice := sorted(told.keys() & self.model_fields_set):
            raise ValueError(f"{twice[0]}: comes from the study's `{told[twice[0]]}`; take it out")
        if len(set(self.rules)) != len(self.rules):
            raise ValueError(f"rules: one is given twice in {list(self.rules)}")
        if self.rules and self.share != "department":
            raise ValueError(
                "share: a study of departments makes the adapter of each department and the one "
                "that all share; take it out"
            )
        return self

    def plan(self, name: str, departments: Mapping[str, Iterable[str]], **changes: Any) -> Plan:
        """The plan of clients by department, with changes of the settings."""
        settings = self.model_dump(exclude={"partition", "rules"}, exclude_unset=True)
        members = {department: tuple(names) for department, names in departments.items()}
        return Plan.model_validate(settings | {"name": name, "departments": members} | changes)


class EvaluationPart(Part):
    """How arms are scored."""

    window: int = Field(default=256, ge=16)
    max_new_tokens: int = Field(default=48, gt=0)
    max_documents: int | None = Field(default=None, gt=0)
    """Held-out documents a department at most, the first by hash; all where None."""
    max_dialogues: int | None = Field(default=None, gt=0)
    """Dialogues in the search for the scale at most, and at each point of a curve; the test set of
    arms is never cut."""


class StudyFile(Part):
    """What study files of every kind have in common."""

    noun: ClassVar[str] = "study"
    """What a file of the kind is called where it is refused."""
    brief: ClassVar[bool] = False
    """Whether `as_written` leaves out what a file does not ask for, such as other recipes."""

    name: str
    question: str

    _as_written: dict[str, Any] = PrivateAttr(default_factory=dict)
    _not_there: tuple[str, ...] = PrivateAttr(default=())

    @classmethod
    def load(cls, file: str | Path, places: Mapping[str, Path], *, dry: bool = False) -> Self:
        """Read a study file and find every path that it names.

        A dry run reads no text, so there text may be missing (`not_there`).

        Raises StudyError with *all* faults at once: unknown and missing keys, values out of their
        bounds, settings that contradict each other, unknown places, paths that lead nowhere.
        """
        written = read_yaml(file, cls, cls.noun)
        content, not_there = with_paths(
            written.model_dump(exclude_unset=True), Path(file), places, dry=dry
        )
        study = cls.model_validate(content)
        study._as_written = written.model_dump(mode="json", exclude_none=cls.brief)
        study._not_there = not_there
        return study

    @property
    def as_written(self) -> dict[str, Any]:
        """The settings with defaults filled in and paths as the file names them."""
        return self._as_written

    @property
    def not_there(self) -> tuple[str, ...]:
        """Text, as the file names it, that a dry run did not find."""
        return self._not_there


class Study(StudyFile):
    """Everything that a run needs; read from YAML."""

    family: FamilyPart
    departments: dict[str, Texts] = Field(min_length=1)
    replay: Replay | None = None
    dialogues: Scored | None = None
    questions: Scored | None = None
    row_length: int = Field(default=256, ge=16)
    pretrain: PretrainSettings
    scale: ScaleSearch = ScaleSearch()
    merging: dict[Annotated[str, Field(pattern=r"^\w[\w. -]*$")], Merging] = {}
    """By name, other ways to add the residual; each gets its own scale and its own test scores."""
    adapters: AdapterSettings | None = None
    curve: Curve | None = None
    """With it the study is one of forgetting against tokens, with replay and without."""
    federation: FederationPart | None = None
    """Adapters that clients train together, in place of `adapters`; with `rules` in it the study is
    one of departments."""
    seeds: tuple[int, ...] = Field(default=(1,), min_length=1)
    evaluation: EvaluationPart = EvaluationPart()
    gate: tuple[Rule, ...] = DEFAULT_RULES
    tuning: Tuning | None = None
    """The instruction tuning that the family's makers did, for comparing costs."""
    prices: Prices | None = None
    """Of the device that runs it, for money and energy in plan and report."""

    @field_validator("pretrain", "adapters")
    @classmethod
    def _seedless(cls, settings: TrainingSettings | None) -> TrainingSettings | None:
        if settings and "seed" in settings.model_fields_set:
            raise ValueError("the seed comes from `seeds`; take it out here")
        return settings

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds are given twice in {list(self.seeds)}")
        if taken := set(ARMS) & self.merging.keys():
            raise ValueError(f"{' and '.join(sorted(taken))}: an arm's name; take another")
        if self.merging and self.dialogues is None:
            raise ValueError("a comparison of ways to merge needs dialogues (validation and test)")
        if len(self.scale.grid) > 1 and self.dialogues is None:
            raise ValueError("a search for the scale needs dialogues (validation and test)")
        if self.curve:
            self._check_curve(self.curve)
        if self.federation:
            self._check_federation(self.federation)
        return self

    @property
    def kind(self) -> Kind:
        """What the study compares; see the head of this file."""
        if self.curve:
            return "forgetting"
        return "departments" if self.federation and self.federation.rules else "arms"

    @property
    def ways(self) -> tuple[Way, ...]:
        """How the sides of a curve are trained: at each rate, without replay and with."""
        rates = self.curve.learning_rates if self.curve else ()
        shares = (0.0, self.replay.share) if self.replay else (0.0,)
        return tuple(
            Way(learning_rate=rate, replay=share)
            for rate in rates or (self.pretrain.learning_rate,)
            for share in shares
        )

    @property
    def domain_settings(self) -> PretrainSettings:
        """How the domains of a curve are read: each step at the rate that it has in the curve,
        whose runs go on."""
        assert self.curve
        assert self.curve.domains
        num_tokens = self.curve.domains.num_tokens
        warmup = self.pretrain.warmup * self.pretrain.num_tokens / num_tokens
        changed = {"num_tokens": num_tokens, "budgets": (), "warmup": warmup}
        return self.pretrain.model_copy(update=changed)

    def _check_curve(self, curve: Curve) -> None:
        pretrain, domains = self.pretrain, curve.domains
        idle = {"scale", "merging", "adapters", "federation", "gate", "tuning"}
        if idle := idle & self.model_fields_set:
            raise ValueError(
                f"a curve grafts the plain residual and tunes nothing; take {_listed(idle)} out"
            )
        if self.dialogues is None:
            raise ValueError("a curve of forgetting needs dialogues (validation and test)")
        budgets = [*pretrain.budgets, pretrain.num_tokens]
        if not pretrain.budgets:
            raise ValueError("pretrain.budgets: expected budgets to draw a curve through; add some")
        if pretrain.schedule != "constant":
            raise ValueError(
                "pretrain.schedule: expected constant, so that no budget is read at rates that "
                f"another one chose, found {pretrain.schedule}"
            )
        if curve.learning_rates and pretrain.learning_rate not in curve.learning_rates:
            raise ValueError(
                f"curve.learning_rates: expected that of pretrain, {pretrain.learning_rate:g}, "
                f"among them, found {list(curve.learning_rates)}"
            )
        if len(set(curve.learning_rates)) < len(curve.learning_rates):
            raise ValueError(
                "curve.learning_rates: expected each rate once, found "
                f"{list(curve.learning_rates)}; leave out the second one"
            )
        warming = pretrain.warmup * pretrain.num_tokens
        if domains and not (domains.num_tokens in budgets and warming < domains.num_tokens):
            raise ValueError(
                f"curve.domains.num_tokens: expected one of the budgets {budgets}, beyond the "
                f"warm-up of {warming:g} tokens, found {domains.num_tokens}"
            )
        if domains and domains.own in domains.texts:
            raise ValueError(
                f"curve.domains.texts: {domains.own} is what the study's own text is called; take "
                "another name"
            )

    def _check_federation(self, federation: FederationPart) -> None:
        if self.adapters:
            raise ValueError(
                "federation: trains the adapters of the departments; take `adapters` out"
            )
        idle = {"merging", "gate", "tuning"} & self.model_fields_set
        if federation.rules and idle:
            raise ValueError(
                f"a study of departments compares adapters over the graft; take {_listed(idle)} out"
            )
        if federation.rules and len(self.scale.grid) > 1:
            raise ValueError(
                "scale.grid: a study of departments searches for no scale; name one alone"
            )
        numbers = range(federation.partition.num_clients)
        somebody = {name: [f"{name}-{number}" for number in numbers] for name in self.departments}
        for rule in dict.fromkeys((federation.rule, *federation.rules)):
            try:
                federation.plan(self.name, somebody, rule=rule, sizes={})
            except ValidationError as error:
                faults = "; ".join(faults_of(error))
                raise ValueError(f"federation with rule {rule}: {faults}") from error


def read_yaml(file: str | Path, kind: type[_File], noun: str) -> _File:
    """A YAML file as a record of the kind.

    Raises StudyError with *all* faults at once: unknown and missing keys, values out of bounds.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StudyError(f"{file}: expected a {noun} in YAML, found: {error}") from error
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        faults = faults_of(error)
        raise StudyError(
            f"{file}: expected a {noun}, found {len(faults)} faults:\n"
            + "\n".join(f"  {fault}" for fault in faults)
        ) from error


def faults_of(error: ValidationError) -> list[str]:
    """`where: what` for each fault."""
    return [
        f"{'.'.join(map(str, fault['loc'])) or 'the file'}: {fault['msg']}"
        for fault in error.errors()
    ]


def with_paths(
    content: Mapping[str, Any], file: Path, places: Mapping[str, Path], *, dry: bool = False
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The content of a file with every path in it found, and the text that a dry run did not find.

    Raises StudyError with all paths at once that lead nowhere or name an unknown place.
    """
    faults: list[str] = []
    not_there: list[str] = []

    def find(name: str, *, model: bool = False) -> str:
        place, colon, rest = name.partition(":")
        if colon and place not in places:
            known = ", ".join(f"{p}:" for p in places) or "none"
            faults.append(f"  {name}: no place is called {place!r} (known: {known})")
            return name
        found = places[place] / rest if colon else file.absolute().parent / name
        if found.exists() or (model and not colon and name.count("/") == 1):
            pass
        elif dry and not model:
            not_there.append(name)
        else:
            faults.append(f"  {name}: there is nothing at {found}")
        return str(found) if colon or found.exists() else name

    def resolve(value: Any, key: str = "") -> Any:
        match value:
            case dict() if key == "models":
                return {name: resolve(one, "model") for name, one in value.items()}
            case dict():
                return {name: resolve(one, name) for name, one in value.items()}
            case tuple() | list() if key in ("corpus", "dialogues"):
                return tuple(find(one) for one in value)
            case str() if key in MODELS:
                return find(value, model=True)
            case str() if key in ("validation", "test", "file", "data"):
                return find(value)
        return value

    resolved = resolve(dict(content))
    if faults:
        raise StudyError(f"{file}: found {len(faults)} paths amiss:\n" + "\n".join(faults))
    return resolved, tuple(not_there)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))
