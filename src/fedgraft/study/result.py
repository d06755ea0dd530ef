"""What a study found: the one file `result.json`, from which the report is drawn.

Key by key, as written by a study of any kind:

    kind               `arms` (Result), `forgetting` (Forgetting), `departments` (Departments),
                       `selection` (Selections) or `lineage` (Lineages)
    format             version of this layout
    name, question     of the study
    verdict            a few sentences in plain words
    residual           facts about it: relative norm, exactness, parameters
    losses             training stage -> [step, nats per target]
    estimates          before the run, by kind of training: FLOPs, seconds on the machine at hand
    costs              stage by stage: seconds, tokens, FLOPs
    prices             of the device that ran it, where the study file names them
    settings           the study file as it was read
    inputs             role -> content hash
    versions           fedgraft and the libraries

A study of arms goes on:

    claims             what was promised, the bar, what was measured, reached or not
    decisions          the gate's answer for each seed, with its reasons
    arms               for each arm: its scorecards, one a seed (one where seeds do not matter)
    summary            arm -> score -> mean and spread over the seeds
    comparisons        two arms and a score: how far apart on the same examples, with an interval
    scales             for each seed: the curve on the validation split and the scale chosen
    merging            name -> other ways to add the residual: words, scales by seed, test scores,
                       and how far from plain addition
    adapters           for each department and seed: before (graft) and after
    tuning             what instruction tuning again would cost, by the paper's formula
    tokens             tokens of continued pre-training in each arm
    federations        where adapters are federated: rule, seed, history and traffic of each

A study of forgetting goes on:

    seeds              of the study
    own                what the study's own text is called among the domains
    words              arm -> what it is
    references         base and instruct as they came: score -> value
    points             arm, way (learning rate, replay share), tokens and seed: score -> value
    curves             the same over the seeds: score -> mean and spread
    domains            for each text: nats per token of the base as it came, tokens read, and
                       arm -> score -> mean and spread; `forgotten` among them is what the arm
                       follows less than the instruct model as it came
    comparisons        for each way, after the most tokens: two arms and a score, how far apart on
                       the same examples, with an interval
    learning_rates     training stage -> [step, learning rate]

A study of departments goes on:

    seeds              of the study
    words              arm -> what it is
    scored             arm, department, seed, the model that was scored, its client: score -> value
    summary            arm -> department, or `all` -> score -> mean and spread over the seeds; of
                       clients' models the mean over clients, each alike
    weighted           the same of clients' models alone, weighted by the documents they train on
    tokens             arm -> tokens that all its adapters together were trained on
    partition          which client has how many documents of what, with the first seed
    federations        rule, seed, history and traffic of each

A study of selection goes on:

    seeds              of the study
    words              arm -> what it is; `start` is the model before any training
    against            the arm that those which name no other are compared with
    rivals             arm -> the arm that it is compared with
    num_examples       of all clients, before any choice
    num_left_out       examples that are longer than a row, and nobody has
    num_test           dialogues of the test
    num_not_asked      those that leave no room for an answer in the model's window
    scored             arm, seed: scores, and what was chosen, at what cost
    summary            arm -> score -> mean and spread over the seeds
    compared           arm, score: mean difference to its rival over seeds, its standard error
    mapped             where the examples of the first seed lie, and which were chosen
    partition          which client has how many dialogues of which group, with the first seed

A study of lineages goes on:

    seeds              of the study
    models             name -> what it is made of, how in words, and its tokens where it is trained
    arms               for each model that is scored: its scorecards, one a seed (one where seeds do
                       not matter)
    summary            arm -> score -> mean and spread over the seeds
    score              the score that the verdict speaks of
    against            the arm that others are compared with; null where none is
    comparisons        each other arm, that one and a score: how far apart on the same examples,
                       with an interval; empty where there is no such arm
    axis               what is counted along the lines; empty where there are none
    lines              line -> [place on the axis, arm]
    forecasts          for each plain graft and seed: what its residual is like, how far its target
                       moved, what that promised before any answer, and the share of the instruct
                       side's score that was kept
    num_left_out       examples -> dialogues that are longer than a row, which nobody is tuned on
    learning_rates     training stage -> [step, learning rate]

What `fedgraft federate` writes is no study (Federation):

    kind               `federation`
    format             version of this layout
    name, question     of its file
    verdict            a few sentences in plain words
    history            what happened, round by round; see `federation.history`
    traffic            kind of message -> messages, bytes up, bytes down
    partition          as above
    seconds            of the whole run, on the clock
    settings           the file as it was read
    inputs             role -> content hash
    versions           fedgraft and the libraries
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fedgraft.errors import ReportError
from fedgraft.evaluation.difference import Difference
from fedgraft.evaluation.gate import Decision
from fedgraft.evaluation.scorecard import Scorecard
from fedgraft.federation.aggregate import Rule
from fedgraft.federation.history import History
from fedgraft.noise import Spent
from fedgraft.study.cost import Estimate, Prices, StageCost

_Kind = TypeVar("_Kind")
Unit = Literal["share", "nats", "bits"]

FILE = "result.json"
MIN_SEEDS = 3
"""Below, a spread over seeds says nothing."""

ARMS = ("base", "instruct", "s1", "pretrained_base", "graft")
ARM_WORDS = {
    "base": "the base model as it came",
    "instruct": "the instruct model as it came",
    "s1": "instruct, pre-trained on the new text (S1)",
    "pretrained_base": "base, pre-trained on the new text",
    "graft": "base, pre-trained on the new text, plus the residual",
}

CURVE_ARMS = ("s1", "pretrained_base", "graft")
OLD_FACTS, NEW_FACTS = "knowledge/asked/old", "knowledge/asked/new"
TEXT = "perplexity/new/nats_per_token"
"""On a curve: of the new text of all departments; of a domain, the domain's."""
FORGOTTEN = "forgotten"

NATS = "nats_per_token"
ALL = "all"
"""The departments together: the mean over them, each alike."""
RULE_WORDS: Mapping[Rule, str] = {
    "fedavg": "FedAvg",
    "ffa": "FFA-LoRA",
    "fedsa": "FedSA-LoRA",
    "flora": "FLoRA",
    "flexlora": "FlexLoRA",
    "fedex": "FedEx-LoRA",
}
PERSONAL: Rule = "fedsa"
"""The rule whose clients keep a part of their adapter, so that theirs are scored."""
DEPARTMENT_ARMS: Mapping[str, str] = {
    "graft": "the graft, without an adapter",
    "clients": "each client's adapter, trained on its own text alone; the mean over clients",
    **{
        str(rule): f"the department's adapter, which its clients train together by {words}"
        for rule, words in RULE_WORDS.items()
    },
    "fedsa": "each client's personal adapter by FedSA-LoRA, which shares A alone; the mean over "
    "clients",
    "global": "one adapter, which the clients of all departments train together",
    "alone": "the department's adapter, trained on all of its text at one place",
    "pooled": "one adapter, trained on the text of all departments at one place",
}
"""In the order of what has to leave a client: nothing, an adapter, the text."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Summary(_Record):
    """A score over the seeds."""

    mean: float
    lowest: float
    highest: float
    stdev: float | None
    """Sample standard deviation over seeds; None with one seed."""
    num_seeds: int
    unit: Unit

    @classmethod
    def of(cls, values: Sequence[float], unit: Unit) -> Self:
        """Of one value a seed."""
        return cls(
            mean=fmean(values),
            lowest=min(values),
            highest=max(values),
            stdev=stdev(values) if len(values) > 1 else None,
            num_seeds=len(values),
            unit=unit,
        )


class Claim(_Record):
    """Something promised, and whether it held."""

    text: str
    target: str
    measured: str
    reached: bool


Told = Literal["better", "worse", "the same", "cannot be told", "missing"]


class Comparison(_Record):
    """One score of an arm, less that of another on the same examples."""

    arm: str
    against: str
    score: str
    unit: Unit
    difference: Difference | None
    """None where one of the two was not scored, or on a single example, which tells nothing."""

    @property
    def told(self) -> Told:
        """Which of the two is better, as far as the examples can tell."""
        if self.difference is None:
            return "missing"
        match self.difference.finding:
            case "more":
                return "better" if self.unit == "share" else "worse"
            case "less":
                return "worse" if self.unit == "share" else "better"
            case "the same" | "cannot be told" as other:
                return other


class ArmResult(_Record):
    """One way to make a model, and how it scored."""

    arm: str
    words: str
    scorecards: tuple[Scorecard, ...]


class ScalePoint(_Record):
    """A graft at one scale, on the validation split."""

    scale: float
    scores: dict[str, float]


class ScaleCurve(_Record):
    """The search for the scale of one seed."""

    seed: int
    metric: str
    points: tuple[ScalePoint, ...]
    chosen: float


class MergingResult(_Record):
    """Another way to add the residual: its scale for each seed, and its test scores over seeds."""

    words: str
    scales: tuple[ScaleCurve, ...]
    summary: dict[str, Summary]
    comparisons: tuple[Comparison, ...] = ()
    """With the graft, which is plain addition; none in results of before 2026-11-29."""


class AdapterResult(_Record):
    """A department's adapter over the graft, on the department's held-out documents."""

    department: str
    seed: int
    nats_per_token_before: float
    nats_per_token_after: float
    followed_before: float | None
    """Share of the department's dialogues followed by the graft; None where there are none."""
    followed_after: float | None


class Carried(_Record):
    """Messages, and what they weighed."""

    num_messages: int
    bytes_up: int
    """From clients."""
    bytes_down: int


class Together(_Record):
    """A federation that a study ran."""

    rule: Rule
    seed: int
    shared: bool
    """One adapter for the clients of all departments, not one for each."""
    history: History
    traffic: dict[str, Carried]
    """By kind of message."""


class Holding(_Record):
    """What one client has."""

    client: str
    department: str
    counts: tuple[int, ...]
    """Documents of each label."""
    num_train: int
    num_held_out: int


class Holdings(_Record):
    """Which client has how many documents, or dialogues, of what."""

    words: str
    labels: tuple[str, ...]
    clients: tuple[Holding, ...]
    skew: float
    """How far labels differ between clients; see `federation.partition.Summary`."""
    num_duplicates: int = 0
    """Dropped beforehand, since others say the same."""


class _Written(_Record):
    """What goes to the file, and comes back."""

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the result in a directory.

        Raises ReportError where there is none, or one that this version cannot read.
        """
        return _read(directory, cls.model_validate_json)

    def write(self, directory: Path) -> Path:
        file = directory / FILE
        partial = file.with_suffix(".partial")
        partial.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return partial.rename(file)


class Found(_Written):
    """What every kind of study writes down."""

    kind: str
    format: Literal[1] = 1
    name: str
    question: str
    verdict: str
    residual: dict[str, Any]
    losses: dict[str, tuple[tuple[int, float], ...]]
    estimates: tuple[Estimate, ...] = ()
    """None where the model's sizes are not known to `study.shape`, or the kind is not planned."""
    costs: tuple[StageCost, ...]
    prices: Prices | None = None
    settings: dict[str, Any]
    inputs: dict[str, str]
    versions: dict[str, str]


class Result(Found):
    """See the head of this file."""

    kind: Literal["arms"] = "arms"
    claims: tuple[Claim, ...]
    decisions: tuple[Decision, ...]
    arms: tuple[ArmResult, ...]
    summary: dict[str, dict[str, Summary]]
    comparisons: tuple[Comparison, ...]
    scales: tuple[ScaleCurve, ...]
    merging: dict[str, MergingResult] = {}
    adapters: tuple[AdapterResult, ...]
    tuning: dict[str, float]
    tokens: int
    federations: tuple[Together, ...] = ()


class Way(_Record):
    """How both sides of a curve were trained."""

    learning_rate: float
    replay: float
    """Share of old text in what they read."""

    @property
    def words(self) -> str:
        """`rate 0.0004, replay 30%`."""
        replay = f"replay {self.replay:.0%}" if self.replay else "no replay"
        return f"rate {self.learning_rate:g}, {replay}"


class Point(_Record):
    """One model, after so many tokens."""

    arm: str
    way: Way
    num_tokens: int
    seed: int
    scores: dict[str, float]


class CurvePoint(_Record):
    """The models of all seeds, after so many tokens."""

    arm: str
    way: Way
    num_tokens: int
    scores: dict[str, Summary]


class WayCompared(_Record):
    """The arms of one way with one another, after the most tokens."""

    way: Way
    comparisons: tuple[Comparison, ...]


class DomainResult(_Record):
    """A text, read alone: how far it is from what the base knew, and what reading it did."""

    domain: str
    nats_per_token: float
    """Of the base as it came, on held-out documents: the shift."""
    num_tokens: int
    arms: dict[str, dict[str, Summary]]


class Forgetting(Found):
    """See the head of this file."""

    kind: Literal["forgetting"] = "forgetting"
    seeds: tuple[int, ...]
    own: str
    words: dict[str, str]
    references: dict[str, dict[str, float]]
    points: tuple[Point, ...]
    curves: tuple[CurvePoint, ...]
    domains: tuple[DomainResult, ...]
    comparisons: tuple[WayCompared, ...]
    learning_rates: dict[str, tuple[tuple[int, float], ...]]


ScoredModel = Literal["graft", "global", "department", "client"]
"""The graft alone, or it with an adapter: of all, of a department or of a client."""


class Scored(_Record):
    """One model on the held-out material of one department."""

    arm: str
    department: str
    seed: int
    model: ScoredModel
    client: str | None = None
    num_documents: int = 0
    """Of a client's model: what it trains on, its weight."""
    scores: dict[str, float]


Scores = dict[str, dict[str, dict[str, Summary]]]
"""Arm -> department -> score -> its summary over seeds."""


class Departments(Found):
    """See the head of this file."""

    kind: Literal["departments"] = "departments"
    seeds: tuple[int, ...]
    words: dict[str, str]
    scored: tuple[Scored, ...]
    summary: Scores
    weighted: Scores
    tokens: dict[str, int]
    partition: Holdings
    federations: tuple[Together, ...]


class Federation(_Written):
    """See the head of this file."""

    kind: Literal["federation"] = "federation"
    format: Literal[1] = 1
    name: str
    question: str
    verdict: str
    history: History
    traffic: dict[str, Carried]
    partition: Holdings | None
    """None where clients are elsewhere, and what they have is not known."""
    seconds: float
    settings: dict[str, Any]
    inputs: dict[str, str]
    versions: dict[str, str]


class ScoredChoice(_Record):
    """One arm of a study of selection with one seed: what was chosen, and how the model does."""

    arm: str
    seed: int
    scores: dict[str, float]
    num_examples: float = 0.0
    """Examples that are trained on in a round, the mean over rounds."""
    num_distinct: int = 0
    """Examples that were trained on in any round."""
    coverage: float = 0.0
    """Share of the clients' groups (topics, tasks) of which an example was trained on."""
    seconds_choosing: float = 0.0
    seconds_training: float = 0.0
    """Of all clients and rounds, one after the other."""
    bytes_up: int = 0
    num_kept: int = 0
    """Rounds that left the adapter as it was."""
    spent: Spent | None = None
    """What centroids told of any one example, where they were noised."""


class Marked(_Record):
    """What an arm made of the examples of a map."""

    clusters: tuple[int, ...]
    """[n], of its client's clusters at the last choice; -1 is in none, or passed over. Empty for
    an arm without clusters."""
    chosen: tuple[int, ...]
    """Places of those that were trained on in any round, rising."""


class Mapped(_Record):
    """The examples of all clients in a plane, with the first seed."""

    words: str
    """How the plane was found."""
    plane: tuple[tuple[float, float], ...]
    """[n]"""
    clients: tuple[str, ...]
    """[n]"""
    arms: dict[str, Marked]


class Compared(_Record):
    """An arm against another, seed by seed."""

    arm: str
    score: str
    difference: float
    """Mean over seeds, of the arm less the other."""
    stderr: float | None
    """Standard error of that mean; None with one seed."""
    num_seeds: int

    @property
    def told_apart(self) -> bool:
        """Whether the difference is beyond two standard errors, of three seeds at least."""
        known = self.stderr is not None and self.num_seeds >= MIN_SEEDS
        return known and abs(self.difference) > 2 * (self.stderr or 0.0)


class Selections(Found):
    """See the head of this file."""

    kind: Literal["selection"] = "selection"
    seeds: tuple[int, ...]
    words: dict[str, str]
    against: str
    """The arm that those which name no other are compared with."""
    rivals: dict[str, str]
    """Arm -> the arm that it is compared with."""
    num_examples: int
    """Of all clients, before any choice."""
    num_left_out: int
    """Longer than a row."""
    num_test: int
    num_not_asked: int
    """Test dialogues that leave no room for an answer in the model's window."""
    scored: tuple[ScoredChoice, ...]
    summary: dict[str, dict[str, Summary]]
    compared: tuple[Compared, ...]
    partition: Holdings
    mapped: Mapped | None = None
    """None where no arm has clusters."""


class Made(_Record):
    """How a model came to be."""

    made_of: tuple[str, ...]
    words: str
    num_tokens: int = 0
    """That it was trained on, of its recipe."""
    pretrained: bool = False
    """Whether it read on, and was not tuned."""


class Forecast(_Record):
    """What was known of a graft before it was asked anything, and what came of it."""

    arm: str
    seed: int | None
    residual: str
    target: str
    relative_norm: float
    """||residual|| / ||its base||."""
    effective_rank: float | None
    residual_strength: float | None
    """Largest singular value of the residual over that of the base, mean over matrices."""
    strength: float | None
    """The same of what moved between the residual's base and the target."""
    outcome: Literal["holds", "doubtful", "breaks", "open"]
    kept: float | None
    """Share of the score of the residual's instruct side; None where one was not scored."""


class Lineages(Found):
    """See the head of this file."""

    kind: Literal["lineage"] = "lineage"
    seeds: tuple[int, ...]
    models: dict[str, Made]
    arms: tuple[ArmResult, ...]
    summary: dict[str, dict[str, Summary]]
    score: str
    against: str | None
    comparisons: tuple[Comparison, ...]
    axis: str
    lines: dict[str, tuple[tuple[float, str], ...]]
    forecasts: tuple[Forecast, ...]
    num_left_out: dict[str, int]
    learning_rates: dict[str, tuple[tuple[int, float], ...]]


Whichever = Result | Forgetting | Departments | Federation | Selections | Lineages
"""A result of any kind."""


def load_result(directory: Path) -> Whichever:
    """Read the result in a directory, whatever its kind.

    Raises ReportError where there is none, or one that this version cannot read.
    """
    either: TypeAdapter[Whichever] = TypeAdapter(Annotated[Whichever, Field(discriminator="kind")])
    return _read(directory, either.validate_json)


def _read(directory: Path, validate: Callable[[bytes], _Kind]) -> _Kind:
    file = directory / FILE
    try:
        return validate(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ReportError(
            f"expected the result of a study at {file}, found nothing there; run "
            "`fedgraft study run FILE --out DIR` first and name its DIR"
        ) from error
    except OSError as error:
        raise ReportError(
            f"{file}: expected the result of a study, found {error.strerror}; name the --out of "
            "another, or run the study again"
        ) from error
    except ValidationError as error:
        raise ReportError(
            f"{file}: expected a result of format 1, found {error.error_count()} faults, the "
            f"first: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}; run the study "
            "again with this version (finished stages are kept)"
        ) from error
