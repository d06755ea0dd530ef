"""A study of selection: how well a model does after clients trained on what was chosen of theirs.

    train ── shared out ──> clients ── each arm: choose, train, aggregate ──> adapter ──> scored
    test  ──────────────────────────────────────────────────────────────────────────────────┘

    start       the model as it comes, or a graft made for each seed
    arm         a way to choose (`selection.coreset.Selection`), for all clients together, or
                `pooled`: the examples of all at one place, as one client

All arms have the same clients, rounds and settings of training; only what is chosen differs. Each
is compared with the arm `against` seed by seed: the mean of the differences, and its standard error
over seeds.

The file, beside `name`, `question` and `seeds`:

    model: runs/grafted        # or graft: { family, departments, replay, pretrain, ... }
    train: { file: ... }       # dialogues, Dolly, or a folder of Natural Instructions' tasks
    test: { file: ... }
    prompt: chat               # or alpaca
    partition: { num_clients: 12, name: dirichlet, field: group, alpha: 0.5 }
    federation: { num_rounds: 3, training: {...} }
    arms:
      fedit: { method: all }
      random: { method: random, budget: 0.015 }
      aligned: { method: federated, budget: 0.015 }
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from fedgraft.errors import FederationError, StudyError
from fedgraft.evaluation.scorecard import evaluate
from fedgraft.federation.asking import Answered, Event, Watch
from fedgraft.federation.choice import all_chosen, last_labels
from fedgraft.federation.client import Client
from fedgraft.federation.history import History
from fedgraft.federation.in_process import InProcess
from fedgraft.federation.partition import Partition
from fedgraft.federation.plan import ORGANISATION, Name, Plan, Settings
from fedgraft.federation.rounds import ADAPTERS, HISTORY, LEDGER, run_name, run_rounds
from fedgraft.federation.workplace import Workplace
from fedgraft.models import open_model, open_tokenizer
from fedgraft.progress import progress
from fedgraft.provenance import derive_seed, hash_json
from fedgraft.selection.clusters import NOISE
from fedgraft.selection.coreset import Selection
from fedgraft.selection.projection import Projection, project, shared_map
from fedgraft.selection.reader import Reader
from fedgraft.selection.select import drawn
from fedgraft.study.cost import StageCost
from fedgraft.study.result import (
    Holdings,
    Mapped,
    Marked,
    ScoredChoice,
    Selections,
    Summary,
)
from fedgraft.study.rivals import START, WORDS, against, leading, over_seeds, verdict
from fedgraft.study.run import Run, versions
from fedgraft.study.shape import Shape
from fedgraft.study.stage import Say, model_hash, run_stage
from fedgraft.study.study import (
    EvaluationPart,
    FamilyPart,
    Part,
    Replay,
    ScaleSearch,
    Study,
    StudyFile,
    Texts,
    faults_of,
)
from fedgraft.study.together import counted
from fedgraft.text.dialogues import (
    Dialogue,
    Template,
    encode,
    prompt_ids,
    short_enough,
    with_template,
)
from fedgraft.text.examples import hash_examples
from fedgraft.text.tasks import load_instructions, load_tasks, task_names
from fedgraft.training.adapter import merge_adapter, open_adapted
from fedgraft.training.settings import PretrainSettings
from fedgraft.weights.checkpoint import Checkpoint, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCORED, MARKS, PLANE = "scored.json", "marks.json", "plane.json"
MAP = "map"
"""Below the output of a study: where all examples lie."""
CLIENTS = "clients"
"""Below the output of a federation: a folder for what each client keeps."""
NAMES: Mapping[str, str] = {
    **{"random": "random directions", "anchors": "anchors", "nystroem": "Nyström landmarks"},
    **{"tsne": "t-SNE", "pca": "PCA", "kernel_pca": "kernel PCA", "umap": "UMAP"},
}
"""Projections, for the report."""
NUM_DIRECTIONS = 64
"""That a map is drawn from; they keep distances to about a sixth."""


class GraftPart(Part):
    """A model that is made for each seed: pre-trained on text, with the residual grafted on."""

    family: FamilyPart
    departments: dict[str, Texts] = Field(min_length=1)
    replay: Replay | None = None
    row_length: int = Field(default=256, ge=16)
    pretrain: PretrainSettings
    scale: float = 1.0


class Source(Part):
    """Dialogues of a file, or a part of them."""

    file: str
    """Dialogues or Dolly's kind of JSONL; or a folder of Natural Instructions, with `part`."""
    part: Literal["train", "test"] | None = None
    """Of the official lists of Natural Instructions; tasks that are not on disk are left out."""
    only: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Groups (categories, tasks) that are taken; all where None."""
    without: tuple[str, ...] = ()
    """Groups that are left out."""
    max_examples: int | None = Field(default=None, gt=0)
    """At most so many of those that are short enough, the first by hash."""


class Arm(Selection):
    """A way to choose, and what else is the arm's own."""

    pooled: bool = False
    """The examples of all clients at one place, as one client."""
    sampled: float | None = Field(default=None, gt=0, le=1)
    """Share of the clients that a round asks; that of `federation` where None."""
    against: Name | None = None
    """The arm that it is compared with; that of the study where None."""
    words: str = ""
    """What it is, for the report."""

    @property
    def selection(self) -> Selection:
        own = {"pooled", "sampled", "against", "words"}
        return Selection.model_validate(self.model_dump(exclude=own, exclude_unset=True))


class SelectionStudy(StudyFile):
    """Everything that a study of selection needs; read from YAML."""

    noun = "study of selection"

    model: str | None = None
    shape: Shape | None = None
    """Sizes of `model` from its config.json, for a plan before it is fetched."""
    graft: GraftPart | None = None
    train: Source
    test: Source
    prompt: Template = "chat"
    partition: Partition
    federation: Settings
    row_length: int = Field(default=256, ge=16)
    arms: dict[Name, Arm] = Field(min_length=1)
    against: Name = "random"
    """The arm that those which name no other are compared with."""
    seeds: tuple[int, ...] = Field(default=(1,), min_length=1)
    evaluation: EvaluationPart = EvaluationPart()

    @property
    def kind(self) -> Literal["selection"]:
        return "selection"

    @model_validator(mode="after")
    def _consistent(self) -> "SelectionStudy":
        if (self.model is None) == (self.graft is None):
            found = "neither" if self.model is None else "both"
            raise ValueError(f"expected either model or graft, found {found}")
        if self.graft and self.shape:
            raise ValueError("shape: is the model's; the sizes of a graft go to graft.family.shape")
        rivals = {f"arms.{name}.against": arm.against for name, arm in self.arms.items()}
        for key, rival in {"against": self.against, **rivals}.items():
            if rival is not None and (rival not in self.arms or key == f"arms.{rival}.against"):
                raise ValueError(
                    f"{key}: {rival} is none of the other arms {', '.join(self.arms)}; name one"
                )
        if START in self.arms:
            raise ValueError(f"arms: {START} is the model before training; take another name")
        told = {"selection": "arms", "seed": "seeds", "row_length": "row_length"}
        told |= {"prompt": "prompt", "window": "evaluation.window"}
        told |= {"share": "(all clients have one adapter)"}
        if twice := sorted(told.keys() & self.federation.model_fields_set):
            raise ValueError(f"federation.{twice[0]}: comes from {told[twice[0]]}; take it out")
        if "seed" in self.partition.model_fields_set:
            raise ValueError("partition: the seed comes from `seeds`; take it out")
        for name in self.arms:
            try:
                self.plan(name, ["somebody-1", "somebody-2"], seed=0)
            except ValidationError as error:
                raise ValueError(f"arms.{name}: {'; '.join(faults_of(error))}") from error
        return self

    @property
    def rivals(self) -> dict[str, str]:
        """Arm -> the arm that it is compared with; none with itself."""
        named = {name: arm.against or self.against for name, arm in self.arms.items()}
        named[START] = self.against
        return {name: rival for name, rival in named.items() if rival != name}

    def plan(self, arm: str, clients: Iterable[str], *, seed: int) -> Plan:
        """The plan of an arm."""
        own = self.arms[arm]
        changes: dict[str, Any] = {
            "name": f"{self.name}-{arm}",
            "departments": {ORGANISATION: tuple(clients)},
            "share": "organisation",
            "row_length": self.row_length,
            "window": self.evaluation.window,
            "prompt": self.prompt,
            "seed": derive_seed(seed, "federation"),
            "selection": own.selection,
        }
        if own.sampled is not None:
            changes["sampled"] = own.sampled
        return Plan.model_validate(self.federation.model_dump(exclude_unset=True) | changes)

    def as_arms(self) -> Study:
        """The study of arms whose graft this one begins with."""
        assert self.graft
        return Study(
            name=self.name,
            question=self.question,
            family=self.graft.family,
            departments=self.graft.departments,
            replay=self.graft.replay,
            row_length=self.graft.row_length,
            pretrain=self.graft.pretrain,
            scale=ScaleSearch(grid=(self.graft.scale,)),
            seeds=self.seeds,
            evaluation=self.evaluation,
        )


def load_source(source: Source) -> tuple[Dialogue, ...]:
    """The dialogues of a source, however many.

    Raises StudyError where nothing is left of it, and as `text.tasks` does.
    """
    file = Path(source.file)
    if source.part:
        here = {found.stem for found in (file / "tasks").glob("*.json")}
        names = [name for name in task_names(file, source.part) if name in here]
        dialogues = load_tasks(file, names)
    else:
        dialogues = load_instructions(file)
    kept = [
        dialogue
        for dialogue in dialogues
        if dialogue.group not in source.without
        and (source.only is None or dialogue.group in source.only)
    ]
    if not kept:
        groups = ", ".join(sorted({dialogue.group for dialogue in dialogues})[:12])
        raise StudyError(f"{file}: expected dialogues of the groups asked for, found {groups}")
    return tuple(kept)


def first_by_hash(dialogues: Sequence[Dialogue], limit: int | None) -> list[Dialogue]:
    """At most so many dialogues, chosen by what they say; all, in their order, without a limit."""
    if limit is None:
        return list(dialogues)
    return sorted(dialogues, key=lambda one: hash_json(one.model_dump(mode="json")))[:limit]


def run(
    study: SelectionStudy, out: Path, *, say: Say = lambda _: None, num_processes: int = 1
) -> Selections:
    """Run and score every arm for every seed, and write `result.json` into `out`.

    Finished stages are kept: after an interruption, or with more seeds, the same call goes on.

    Raises StudyError for examples that cannot be shared out, and as stages do.
    """
    _Run(study, out, say, num_processes).everything()
    return Selections.load(out)


class _Run:
    def __init__(self, study: SelectionStudy, out: Path, say: Say, num_processes: int) -> None:
        self.study, self.out, self.say = study, out, say
        self.train, self.everything_to_test = load_source(study.train), load_source(study.test)
        self.test: list[Dialogue] = []
        self.num_left_out = self.num_not_asked = 0
        self.costs: list[StageCost] = []
        self.model_run = Run(study.as_arms(), out, say, num_processes) if study.graft else None

    def everything(self) -> None:
        study = self.study
        if self.model_run:
            self.model_run.extract()
        scored: list[ScoredChoice] = []
        first: dict[str, list[Dialogue]] = {}
        for seed in study.seeds:
            model = self._model(seed)
            clients = self._clients(model, seed)
            first = first or clients
            scored.append(self._start(model, seed))
            scored += [self._arm(arm, model, clients, seed) for arm in study.arms]
        summary = over_seeds(scored)
        compared = against(scored, study.rivals)
        Selections(
            name=study.name,
            question=study.question,
            verdict=verdict(summary, compared, study.against, study.rivals),
            seeds=study.seeds,
            words={name: in_words(arm) for name, arm in study.arms.items()},
            against=study.against,
            rivals=study.rivals,
            num_examples=sum(map(len, first.values())),
            num_left_out=self.num_left_out,
            num_test=len(self.test),
            num_not_asked=self.num_not_asked,
            scored=tuple(scored),
            summary=summary,
            compared=compared,
            partition=self._holdings(first),
            mapped=self._mapped(first, summary),
            residual=self.model_run.residual_facts() if self.model_run else {},
            losses=self.model_run.losses if self.model_run else {},
            costs=(*(self.model_run.costs if self.model_run else ()), *self.costs),
            settings=study.as_written,
            inputs={"train": hash_examples(self.train), "test": hash_examples(self.test)},
            versions=versions(),
        ).write(self.out)

    def _model(self, seed: int) -> Path:
        if self.model_run:
            return self.model_run.grafted(seed)
        assert self.study.model
        return resolve(self.study.model)

    def _clients(self, model: Path, seed: int) -> dict[str, list[Dialogue]]:
        """Who holds which dialogues; those longer than a row are left out, and counted."""
        study = self.study
        tokenizer = with_template(open_tokenizer(model), study.prompt)
        kept, self.num_left_out = short_enough(tokenizer, self.train, study.row_length)
        if self.num_left_out:
            self.say(
                f"{self.num_left_out} of {len(self.train)} dialogues are longer than a row of "
                f"{study.row_length} tokens and are left out"
            )
        kept = first_by_hash(kept, study.train.max_examples)
        self._hold(model, tokenizer)
        partition = study.partition.model_copy(update={"seed": derive_seed(seed, "clients")})
        labels = {"group": [one.group for one in kept], "task": [one.group for one in kept]}
        labels["department"] = [one.department or one.group for one in kept]
        ids = [f"{number}/{one.id}" for number, one in enumerate(kept)]
        try:
            places = partition.clients(labels, ids=ids)
        except FederationError as error:
            raise StudyError(f"{study.name}, partition: {error}") from error
        return {client: [kept[place] for place in mine] for client, mine in places.items()}

    def _hold(self, model: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Take the test dialogues that leave room for an answer in the model's window."""
        window = Checkpoint.open(model).config.get("max_position_embeddings")
        room = window - self.study.evaluation.max_new_tokens if isinstance(window, int) else None
        kept = [
            one
            for one in self.everything_to_test
            if room is None
            or len(prompt_ids(tokenizer, one.messages, name=f"dialogue {one.id!r}")) <= room
        ]
        if window is not None:
            kept = [
                one
                for one in kept
                if not one.given_answers or len(encode(tokenizer, one.answered())[0]) <= window
            ]
        self.num_not_asked = len(self.everything_to_test) - len(kept)
        if self.num_not_asked:
            self.say(
                f"{self.num_not_asked} of {len(self.everything_to_test)} test dialogues leave no "
                f"room for an answer in the model's window of {window} tokens and are not asked"
            )
        self.test = first_by_hash(kept, self.study.test.max_examples)
        if not self.test:
            raise StudyError(
                f"{self.study.name}, test: expected dialogues that leave room for "
                f"{self.study.evaluation.max_new_tokens} new tokens in the model's window of "
                f"{window}, found none; ask for shorter answers"
            )

    def _start(self, model: Path, seed: int) -> ScoredChoice:
        def make(folder: Path) -> None:
            self._write(
                folder, ScoredChoice(arm=START, seed=seed, scores=self._scores(model, None))
            )

        title, settings = f"seed {seed}: score the start", {"prompt": self.study.prompt}
        return self._stage(f"seed-{seed}/{START}", model, settings, make, title)

    def _arm(
        self, arm: str, model: Path, clients: Mapping[str, list[Dialogue]], seed: int
    ) -> ScoredChoice:
        """Choose, train together, and score what came out."""
        study = self.study
        if study.arms[arm].pooled:
            clients = {"everybody": [one for ours in clients.values() for one in ours]}
        plan = study.plan(arm, clients, seed=seed)
        title = f"seed {seed}: {arm}"

        def make(folder: Path) -> None:
            work = folder / f".federation-{hash_json(plan.model_dump(mode='json'))[-12:]}"
            asked = plan.num_rounds * max(1, round(plan.sampled * len(clients)))
            with progress(title, asked, "answers") as advance:

                def watch(event: Event) -> None:
                    if isinstance(event, Answered) and event.phase == "train":
                        loss = event.part.loss
                        advance(1, "" if loss is None else f"loss {loss:.3f}")

                history = self._together(model, clients, plan, work, watch)
            for name in (ADAPTERS, HISTORY, LEDGER):
                (work / name).rename(folder / name)
            found = ScoredChoice(
                arm=arm,
                seed=seed,
                scores=self._scores(model, folder / ADAPTERS / ORGANISATION),
                **_told(history, clients, work),
            )
            self._write(folder, found)
            (folder / MARKS).write_text(_marked(clients, work).model_dump_json(), encoding="utf-8")

        settings = {"plan": plan.model_dump(mode="json")}
        inputs = {name: hash_examples(ours) for name, ours in clients.items()}
        return self._stage(f"seed-{seed}/{arm}", model, settings, make, title, inputs)

    def _mapped(
        self,
        clients: Mapping[str, Sequence[Dialogue]],
        summary: Mapping[str, Mapping[str, Summary]],
    ) -> Mapped | None:
        """Where the examples lie, and what two arms chose: the best with clusters, and `against`.

        The plane is of random directions of all layers: as far apart as features, and few.
        """
        study, seed = self.study, self.study.seeds[0]
        read = {
            arm: Marked.model_validate_json((self.out / f"seed-{seed}/{arm}/{MARKS}").read_bytes())
            for arm in study.arms
        }
        clustered = [arm for arm in read if read[arm].clusters and not study.arms[arm].pooled]
        if not clustered:
            return None
        best = leading(summary, clustered)
        model = self._model(seed)

        def make(folder: Path) -> None:
            reader, directions = Reader(model), Projection(num_dimensions=NUM_DIRECTIONS)
            encoding = study.arms[best].encoding
            points = []
            for ours in clients.values():
                found = reader.features(
                    ours,
                    encoding,
                    window=study.evaluation.window,
                    prompt=study.prompt,
                    folder=self.out / "features",
                )
                _, num_layers, hidden = found.shape
                shared = shared_map(directions, num_layers=num_layers, hidden=hidden, seed=seed)
                points.append(project(found, directions, shared=shared))
            plane, words = drawn(np.concatenate(points)[:, None], seed=seed)
            names = [name for name, ours in clients.items() for _ in ours]
            mapped = Mapped(
                words=words,
                plane=tuple((round(float(x), 2), round(float(y), 2)) for x, y in plane),
                clients=tuple(names),
                arms={},
            )
            (folder / PLANE).write_text(mapped.model_dump_json(), encoding="utf-8")

        inputs = {name: hash_examples(ours) for name, ours in clients.items()}
        run_stage(
            self.out / MAP,
            title=f"draw the examples, as {best} reads them",
            inputs={"model": model_hash(Checkpoint.open(model)), **inputs},
            settings={
                "encoding": study.arms[best].encoding.model_dump(mode="json"),
                "prompt": study.prompt,
                "window": study.evaluation.window,
                "seed": seed,
            },
            make=make,
            say=self.say,
        )
        plane = Mapped.model_validate_json((self.out / MAP / PLANE).read_bytes())
        shown = {arm: read[arm] for arm in (best, study.against)}
        return plane.model_copy(update={"arms": shown})

    def _together(
        self,
        model: Path,
        clients: Mapping[str, list[Dialogue]],
        plan: Plan,
        work: Path,
        watch: Watch,
    ) -> History:
        workplace = Workplace(model)
        members = [
            Client(
                name,
                workplace,
                ours,
                [],
                work / CLIENTS / name,
                encoder=plan.selection.encoding.encoder if plan.selection else None,
                features=self.out / "features",
                shows_points=True,
            )
            for name, ours in clients.items()
        ]
        return run_rounds(InProcess(members), plan, model, work, watch=watch)

    def _scores(self, model: Path, adapter: Path | None) -> dict[str, float]:
        """What the model says to the test dialogues, and how it expects their answers."""
        settings = self.study.evaluation
        opened = merge_adapter(open_adapted(model, adapter)) if adapter else open_model(model)
        answered = [one for one in self.test if one.given_answers]
        card = evaluate(
            opened,
            with_template(open_tokenizer(model), self.study.prompt),
            arm="test",
            dialogues=self.test,
            responses=[one.answered() for one in answered],
            window=settings.window,
            max_new_tokens=settings.max_new_tokens,
            num_examples=0,
        )
        return {name: score.value for name, score in card.scores.items() if name in WORDS}

    def _stage(
        self,
        place: str,
        model: Path,
        settings: Mapping[str, Any],
        make: Callable[[Path], None],
        title: str,
        inputs: Mapping[str, str] = MappingProxyType({}),
    ) -> ScoredChoice:
        record = run_stage(
            self.out / place,
            title=title,
            inputs={
                "model": model_hash(Checkpoint.open(model)),
                "test": hash_examples(self.test),
                **inputs,
            },
            settings={**settings, **self.study.evaluation.model_dump(mode="json")},
            make=make,
            say=self.say,
        )
        self.costs.append(StageCost(stage=place, seconds=record.figures["seconds"]))
        return ScoredChoice.model_validate_json((self.out / place / SCORED).read_bytes())

    def _write(self, folder: Path, scored: ScoredChoice) -> None:
        (folder / SCORED).write_text(scored.model_dump_json(indent=1), encoding="utf-8")

    def _holdings(self, clients: Mapping[str, Sequence[Dialogue]]) -> Holdings:
        partition = self.study.partition
        field = f" by {partition.label_field}" if partition.label_field else ""
        return counted(
            f"{len(clients)} clients, shared out{field}: {partition.name}"
            + (f", alpha {partition.alpha:g}" if partition.name == "dirichlet" else ""),
            {name: [one.group for one in ours] for name, ours in clients.items()},
            dict.fromkeys(clients, ORGANISATION),
            {name: (len(ours), 0) for name, ours in clients.items()},
        )


def _told(
    history: History, clients: Mapping[str, Sequence[Dialogue]], work: Path
) -> dict[str, Any]:
    """What a federation says of its choices, beside its scores."""
    groups = {one.group for ours in clients.values() for one in ours}
    chosen: dict[str, set[int]] = {}
    run = run_name(work)
    for name, ours in clients.items():
        if not any(done.chosen for done in history.rounds):
            chosen[name] = set(range(len(ours)))
        else:
            chosen[name] = set(all_chosen(work / CLIENTS / name / run))
    seen = {clients[name][place].group for name, places in chosen.items() for place in places}
    parts = [part for done in history.rounds for part in done.parts if part.counted]
    return {
        "num_examples": fmean(
            sum(part.num_examples for part in done.parts if part.counted) for done in history.rounds
        ),
        "num_distinct": sum(map(len, chosen.values())),
        "coverage": len(seen) / len(groups),
        "seconds_choosing": sum(done.seconds.get("select", 0.0) for done in history.rounds),
        "seconds_training": sum(part.seconds_training for part in parts),
        "bytes_up": sum(part.bytes_up for part in parts),
        "num_kept": sum(bool(done.kept) for done in history.rounds),
        "spent": history.centroids,
    }


def _marked(clients: Mapping[str, Sequence[Dialogue]], work: Path) -> Marked:
    """What was clustered and trained on, of all clients one after the other."""
    clusters: list[int] = []
    chosen: list[int] = []
    clustered, before = False, 0
    for name, ours in clients.items():
        kept = work / CLIENTS / name / run_name(work)
        labels = last_labels(kept, len(ours))
        clustered |= labels is not None
        clusters += [NOISE] * len(ours) if labels is None else labels.tolist()
        chosen += [before + place for place in all_chosen(kept)]
        before += len(ours)
    return Marked(clusters=tuple(clusters) if clustered else (), chosen=tuple(chosen))


def in_words(arm: Arm) -> str:
    """What an arm is, in a line."""
    if arm.words:
        return arm.words
    share = f"{100 * arm.budget:.2g}% of all" if arm.budget else "one of each cluster"
    where = ", all at one place" if arm.pooled else ""
    where += "" if arm.repeats else ", none twice"
    match arm.method:
        case "all":
            return f"all examples{where}"
        case "random":
            words = "by chance"
        case "local":
            words = "each client by itself" if not arm.pooled else "the clusters of all text"
        case "points":
            words = "a point of every example goes to the server"
        case "federated":
            projection = arm.projection
            words = f"FedHDS, {NAMES[projection.name]} in {projection.num_dimensions} dimensions"
    return f"{words}, {share}{where}"
