"""Rounds: clients train, the server aggregates, and the round is kept.

    sizes      once: who is there, with which model and tokenizer, with documents or dialogues
    round      select ──> train ──> check ──> aggregate ──> write
               who, and   a question    each answer   a group at   rounds/0003/, whole or
               on what    to each       on its own    a time       not at all
    scores     once: the last adapters on every client's held-out text

A client that does not answer, or whose update is refused, is named with the reason, and the round
goes on with the others. A group with fewer answers than the quorum keeps its last adapter, and the
round says so. Evaluation rides on training: each client scores the adapter that it got and the one
that it made, so that a round is one exchange.

With a selection there are two: each client tells the centroids of its examples' clusters, and then
trains on so many examples of each as the server chose (`choosing`), group by group. A
client of which nothing is chosen is not asked to train; a group without any keeps its adapter.

Who was not there at the beginning is asked again in the first round that it is sampled for: how
much it has, and, where examples are chosen once, the question for centroids of that choice. Those
who come late together choose among themselves; what was chosen before stays. Who still does not
answer is named in that round.

Below `out`:

    rounds/NNNN/     where every group stands after a round, and the history so far; the last two
    adapters/GROUP/  PEFT directories, when all is done
    history.json     see `history`
    run.txt          the name of this run, under which clients keep what is theirs
    ledger.jsonl     what left the clients, see `ledger`

The same call on the same `out` goes on after the last whole round.
"""

import math
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedgraft.errors import FederationError, ReportError
from fedgraft.federation.aggregate import Layer, aggregate, mean_b
from fedgraft.federation.asking import Answered, Asking, Watch, count
from fedgraft.federation.choosing import Choosing, Chosen, placeless
from fedgraft.federation.hierarchy import Clusters, mix
from fedgraft.federation.history import History, Kind, Part, Round, means
from fedgraft.federation.ledger import Ledger
from fedgraft.federation.message import FAULTS, Answer, Exchange, Question, narrowed, widened
from fedgraft.federation.optimiser import stepped
from fedgraft.federation.plan import Plan
from fedgraft.federation.privacy import noised, spent
from fedgraft.federation.robust import clipped, krum, median, trimmed_mean
from fedgraft.federation.standing import (
    Standing,
    Stored,
    load_standing,
    save_standing,
    save_tensors,
)
from fedgraft.federation.task import Scored
from fedgraft.federation.update import (
    Factor,
    Size,
    Template,
    Tensors,
    Update,
    check,
    layers_of,
    ordered,
)
from fedgraft.federation.workplace import Workplace
from fedgraft.noise import Spent, check_installed
from fedgraft.provenance import Record, derive_seed, hash_json, new_artefact, told_if_unwritable
from fedgraft.selection import privacy as cells
from fedgraft.training.adapter import write_adapter
from fedgraft.weights.arithmetic import Floats

ROUNDS, ADAPTERS, HISTORY, LEDGER = "rounds", "adapters", "history.json", "ledger.jsonl"
RUN = "run.txt"
NUM_KEPT = 2
"""Rounds that stay on disk."""
FREE = {"name", "num_rounds", "timeout"}
"""Parts of a plan that may change when a run goes on."""

Ready = Mapping[tuple[str, Size], Mapping[str, NDArray[Any]]]
"""Group and size -> the tensors that its clients are sent."""


def run_rounds(
    exchange: Exchange,
    plan: Plan,
    model: str | Path,
    out: Path,
    *,
    watch: Watch = lambda _: None,
) -> History:
    """Run all rounds of a plan and return what happened; goes on where an earlier call stopped.

    Args:
        model: The grafted model, for its hash and for the first adapter; it is only read.

    Raises FederationError where a department has no client that can take part, and where `out`
    holds a run of another plan or model; ArtefactError where `out` cannot be written.
    """
    with told_if_unwritable(out, left="finished rounds are kept"):
        out.mkdir(parents=True, exist_ok=True)
        return _Run(exchange, plan, model, out, watch).everything()


def run_name(out: Path) -> str:
    """The name of the run in `out`, under which its clients keep what is theirs; empty for none."""
    file = out / RUN
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""


class _Run:
    """One run: the groups, where they stand, and what has happened so far."""

    def __init__(
        self, exchange: Exchange, plan: Plan, model: str | Path, out: Path, watch: Watch
    ) -> None:
        self.plan, self.out = plan, out
        self.workplace = Workplace(model)
        self.model = self.workplace.content_hash
        if plan.privacy or (plan.selection and plan.selection.privacy):
            check_installed()
        self.group_of = {name: group for group, names in plan.groups.items() for name in names}
        if not run_name(out):
            (out / RUN).write_text(f"{plan.name}-{secrets.token_hex(6)}\n", encoding="utf-8")
        ledger = Ledger(out / LEDGER)
        self.asking = Asking(exchange, plan, self.workplace, ledger, run_name(out), watch)
        self.choosing = Choosing(self.asking, plan, self.workplace)
        self.trained: set[str] = set()
        self.coreset: Chosen | None = None
        self.num_examples: dict[str, int] = {}
        self.excluded: dict[str, str] = {}
        """Clients that can never take part, and why."""
        self.unscored: set[str] = set()
        """Clients that hold nothing out."""
        self.standings: dict[str, Standing] = {}
        self.history = History(
            name=plan.name,
            plan=plan.model_dump(mode="json"),
            model=self.model,
            transport=exchange.transport,
        )

    def everything(self) -> History:
        if finished := self._resume():
            return finished
        self._check_departments(self._ask_sizes(self.plan.clients, 0))
        if not self.standings:
            self.standings = dict.fromkeys(self.plan.groups, Standing(adapters=self._fresh(0)))
        first = next(iter(self.standings.values()))
        self.layers = layers_of(next(iter(first.adapters.values())))
        for number in range(len(self.history.rounds) + 1, self.plan.num_rounds + 1):
            self._round(number)
        return self._finish()

    # ── beginning ────────────────────────────────────────────────────────────────────────────

    def _resume(self) -> History | None:
        """Take up the last whole round; the history of a run that is finished already."""
        done = sorted((self.out / ROUNDS).glob("[0-9]*"))
        if not done:
            return None
        folder = done[-1]
        record = Record.read(folder)
        mine = {"model": self.model, "plan": self._plan_hash}
        if record is None or record.inputs != mine:
            raise FederationError(
                f"{folder}: expected a round of this plan and model, found one of "
                f"{'another' if record else 'none'}; take up its plan again or choose another --out"
            )
        history = _load_history(folder / HISTORY)
        if len(history.rounds) > self.plan.num_rounds:
            raise FederationError(
                f"{folder}: expected at most the {self.plan.num_rounds} rounds of the plan, found "
                f"{len(history.rounds)}; raise num_rounds or choose another --out"
            )
        self.trained = set(record.settings["trained"])
        if chosen := record.settings.get("coreset"):
            taken = {name: tuple(counts) for name, counts in chosen["taken"].items()}
            self.coreset = Chosen(round=chosen["round"], taken=taken)
        self.standings = {group: load_standing(folder / group) for group in self.plan.groups}
        written = self.out / HISTORY
        if written.exists() and len(history.rounds) == self.plan.num_rounds:
            finished = _load_history(written)
            if finished.final and len(finished.rounds) == self.plan.num_rounds:
                return finished
        changed = {"plan": self.history.plan, "name": self.plan.name}
        self.history = history.model_copy(update=changed)
        return None

    @property
    def _plan_hash(self) -> str:
        """Noise that was chosen for an epsilon is for so many rounds and no more."""
        selection = self.plan.selection
        noises = (self.plan.privacy, selection.privacy if selection else None)
        chosen = any(noise and noise.epsilon for noise in noises)
        free = FREE - {"num_rounds"} if chosen else FREE
        return hash_json(self.plan.model_dump(mode="json", exclude=free))

    def _fresh(self, number: int) -> dict[Size, dict[str, Floats]]:
        """New adapters. FLoRA needs some every round; else the model is not kept in memory."""
        seed = derive_seed(self.plan.seed, "adapter", number)
        found = {size: self.workplace.fresh(size, seed) for size in self.plan.all_sizes}
        if self.plan.rule != "flora":
            self.workplace.close()
        return found

    def _ask_sizes(self, names: Iterable[str], number: int) -> dict[str, Part]:
        """Find out who can take part; who cannot is named, and not asked again."""
        questions = {
            name: Question(
                kind="sizes", round=number, phase="select", settings=self.asking.task(name)
            )
            for name in names
        }
        parts: dict[str, Part] = {}
        kinds: dict[str, Kind] = {}
        for answer in self.asking.ask(questions):
            part = self.asking.part(answer, self.asking.logged(answer, "select", {}))
            parts[part.client] = part
            if part.fault in ("other model", "other tokenizer", "no data"):
                self.excluded[part.client] = FAULTS[part.fault]
            if part.counted:
                told = answer.payload
                kinds[part.client] = "dialogues" if count(told, "num_dialogues") else "documents"
                self.num_examples[part.client] = part.num_examples
                if count(told, "num_documents") == part.num_examples:
                    self.unscored.add(part.client)
            self.asking.watch(Answered(round=number, phase="select", part=part))
        if kinds and not number and not self.history.rounds:
            (most, _), *_ = Counter(sorted(kinds.values())).most_common()
            self.history = self.history.model_copy(update={"examples": most})
        for part in self._of_another_kind(parts, kinds):
            parts[part.client] = part
            self.excluded[part.client] = part.refused or ""
            self.asking.watch(Answered(round=number, phase="select", part=part))
        left_out = {name: part.num_left_out for name, part in parts.items() if part.num_left_out}
        left_out = {**self.history.left_out, **left_out}
        changed = {"left_out": left_out, "excluded": dict(sorted(self.excluded.items()))}
        self.history = self.history.model_copy(update=changed)
        return parts

    def _of_another_kind(
        self, parts: Mapping[str, Part], kinds: Mapping[str, Kind]
    ) -> Iterable[Part]:
        """Refuse clients with dialogues among others with documents, or those among these.

        What most have at the beginning is what the federation has: means over clients would
        otherwise mix nats per token of answers and of text.
        """
        for name, kind in kinds.items():
            if kind != self.history.examples:
                refused = (
                    f"client {name!r}: expected {self.history.examples}, as most clients have, "
                    f"found {kind}; let it take part in a federation of its own"
                )
                yield parts[name].model_copy(update={"refused": refused})

    def _check_departments(self, parts: Mapping[str, Part]) -> None:
        """Raise FederationError where a department has nobody that can take part."""
        faults = {
            name: part.refused or FAULTS[part.fault or "failed"]
            for name, part in parts.items()
            if not part.counted
        }
        for department, clients in self.plan.departments.items():
            if all(name in faults for name in clients):
                listed = "\n".join(f"  {name}: {faults[name]}" for name in clients)
                raise FederationError(
                    f"department {department}: expected a client that can take part, found none:\n"
                    f"{listed}"
                )

    # ── a round ──────────────────────────────────────────────────────────────────────────────

    def _round(self, number: int) -> None:
        clock = _Clock()
        sampled = self._sampled(number)
        absent = self._still_absent(sampled, number)
        asked = [name for name in sampled if name not in absent]
        able = {name: n for name, n in self.num_examples.items() if name not in self.excluded}
        coreset = self.choosing.chosen(asked, number, self.coreset, able)
        if coreset:
            self.coreset = coreset
            absent |= {name: coreset.absent[name] for name in asked if name in coreset.absent}
            asked = [name for name in asked if coreset.of(name)]
        started = self._start_of_newcomers(asked, number)
        clock.lap("select")
        incoming = self.out / f".incoming-{number:04d}"
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir()
        ready = self._ready(asked)
        questions = {
            name: self._training_question(name, number, ready, started, coreset) for name in asked
        }
        parts = dict(absent)
        updates: dict[str, list[Update]] = {group: [] for group in self.plan.groups}
        for answer in self.asking.ask(questions):
            part, update = self._received(answer, number, incoming)
            parts[part.client] = part
            if update:
                updates[self.group_of[part.client]].append(update)
            self.asking.watch(Answered(round=number, phase="train", part=part))
        clock.lap("train")
        kept: dict[str, str] = {}
        for group, found in updates.items():
            expected = [name for name in (*asked, *absent) if self.group_of[name] == group]
            try:
                self._check_quorum(group, expected, found, parts)
                if not self.plan.privacy:  # both tell of changes before the noise
                    for name, moved, drift in self._movements(group, found):
                        changed = {"moved": moved, "drift": drift}
                        parts[name] = parts[name].model_copy(update=changed)
                self.standings[group] = self._aggregated(group, found, number, len(expected))
            except FederationError as error:
                kept[group] = str(error)
        clusters = self._mixed({group: updates[group] for group in updates if group not in kept})
        self.trained |= {name for name, part in parts.items() if part.fault is None}
        clock.lap("aggregate")
        listed = tuple(parts[name] for name in sorted(parts))
        done = Round(
            number=number,
            parts=listed,
            kept=kept,
            chosen={} if coreset is None else {name: coreset.of(name) for name in sampled},
            clusters=clusters,
            means=means(listed),
            seconds=clock.seconds,
        )
        self._write(done, clock)
        shutil.rmtree(incoming)
        self.asking.watch(self.history.rounds[-1])

    def _sampled(self, number: int) -> list[str]:
        """The clients of a round: the same share of every department, one at least."""
        rng = np.random.default_rng(derive_seed(self.plan.seed, "sample", number))
        asked: list[str] = []
        for names in self.plan.departments.values():
            able = sorted(set(names) - self.excluded.keys())
            count = max(1, round(self.plan.sampled * len(able)))
            asked += rng.permutation(able)[:count].tolist()
        return sorted(asked)

    def _still_absent(self, sampled: Iterable[str], number: int) -> dict[str, Part]:
        """Ask those who never told how much they have; who still cannot take part, and why."""
        unknown = [name for name in sampled if name not in self.num_examples]
        parts = self._ask_sizes(unknown, number) if unknown else {}
        return {name: part for name, part in parts.items() if not part.counted}

    def _start_of_newcomers(self, asked: Iterable[str], number: int) -> dict[str, Tensors]:
        """FedSA-LoRA: department -> the mean B of its clients, where somebody new will need it."""
        if self.plan.rule != "fedsa":
            return {}
        needed = {self.plan.department_of(name) for name in asked if name not in self.trained}
        return self._mean_b(needed, number)

    def _mean_b(self, departments: Iterable[str], number: int) -> dict[str, Tensors]:
        """Ask the clients of departments that have trained for their B, and average it."""
        names = [
            name
            for department in departments
            for name in self.plan.departments[department]
            if name in self.trained
        ]
        settings = {name: self.asking.task(name, own=True, sent="B") for name in names}
        questions = {
            name: Question(kind="adapter", round=number, phase="select", settings=settings[name])
            for name in names
        }
        found: dict[str, list[Update]] = {}
        for answer in self.asking.ask(questions):
            update = self._update(answer)
            refused = answer.fault or self._refused(update, number, ("B",))
            self.asking.logged(answer, "select", {} if refused else _shapes(update))
            if not refused:
                found.setdefault(self.plan.department_of(answer.client), []).append(update)
        return {department: dict(mean_b(updates)) for department, updates in found.items()}

    def _ready(self, names: Iterable[str]) -> Ready:
        """What groups send to their clients, as it travels: once for all who get the same."""
        wanted = {(self.group_of[name], self.plan.size_of(name)) for name in names}
        return {
            (group, size): narrowed(self.standings[group].sent(size), self.plan.wire)
            for group, size in wanted
        }

    def _training_question(
        self,
        name: str,
        number: int,
        ready: Ready,
        started: Mapping[str, Tensors],
        coreset: Chosen | None,
    ) -> Question:
        plan = self.plan
        tensors = ready[self.group_of[name], plan.size_of(name)]
        trained, scored = "AB", self._scored(number)
        match plan.rule:
            case "ffa":
                trained = "B"
                if name in self.trained:
                    tensors = _without(tensors, "A")
            case "fedsa":
                mean = narrowed(started.get(plan.department_of(name), {}), plan.wire)
                tensors = _without(tensors, "B") if name in self.trained else {**tensors, **mean}
                scored = scored if scored == "graft" else ""
        settings = self.asking.task(
            name,
            training=plan.training,
            trained=trained,
            scored=scored,
            proximal=plan.proximal,
            passes=plan.passes,
            selection=plan.selection and placeless(plan.selection),
            choice=coreset.round if coreset else number,
            taken=" ".join(map(str, coreset.taken[name])) if coreset else "",
        )
        return Question(
            kind="adapter",
            round=number,
            phase="train",
            settings=settings,
            tensors=tensors,
        )

    def _scored(self, number: int) -> Scored:
        """What the adapter that a round begins with is called; the first one changes nothing."""
        if number == 1:
            return "graft"
        return "department" if self.plan.share == "department" else "global"

    # ── an answer ────────────────────────────────────────────────────────────────────────────

    def _received(self, answer: Answer, number: int, incoming: Path) -> tuple[Part, Update | None]:
        """Look at an answer; an update that counts lies on disk, and is read tensor by tensor."""
        if answer.fault:
            return self.asking.part(answer, self.asking.logged(answer, "train", {})), None
        update = self._update(answer)
        refused = self._refused(update, number, self.plan.sent)
        unlogged = self.asking.logged(answer, "train", {} if refused else _shapes(update))
        refused = refused or unlogged
        part = self.asking.part(answer, refused)
        if refused:
            return part, None
        file = incoming / f"{update.client}.safetensors"
        save_tensors(file, update.tensors)
        return part, replace(update, tensors=Stored(file))

    def _update(self, answer: Answer) -> Update:
        size = self.plan.size_of(answer.client)
        arrays = {k: v for k, v in answer.payload.items() if isinstance(v, np.ndarray)}
        num_examples = answer.payload.get("num_examples")
        return Update(
            client=answer.client,
            num_examples=num_examples if type(num_examples) is int else 0,
            tensors=widened(arrays),
            rank=size.rank,
            alpha=size.alpha,
            base=self.model,
            round=answer.round,
        )

    def _refused(self, update: Update, number: int, sent: tuple[Factor, ...]) -> str | None:
        """Why an update is none of this round, None where it is one."""
        template = Template(
            base=self.model,
            round=number,
            layers=self.layers,
            sizes=[self.plan.size_of(update.client)],
            max_norm=self.plan.max_norm,
            max_examples=self.plan.max_examples,
            sent=sent,
        )
        try:
            check(update, template)
        except FederationError as error:
            return str(error)
        return None

    # ── an aggregation ───────────────────────────────────────────────────────────────────────

    def _check_quorum(
        self, group: str, asked: list[str], found: list[Update], parts: Mapping[str, Part]
    ) -> None:
        if not asked:
            raise FederationError(
                f"{group}: expected examples to train on, found none chosen of any client; its "
                "last adapter stays"
            )
        needed = max(1, math.ceil(self.plan.quorum * len(asked)))
        if len(found) < needed:
            missing = ", ".join(
                f"{name} ({parts[name].fault or 'refused'})"
                for name in asked
                if not parts[name].counted
            )
            raise FederationError(
                f"{group}: expected updates of {needed} of {len(asked)} clients, found "
                f"{len(found)}; its last adapter stays. Without: {missing}"
            )

    def _movements(
        self, group: str, updates: list[Update]
    ) -> Iterable[tuple[str, float, float | None]]:
        """How far each client's factors moved, and how much across the group's mean movement."""
        starts = self.standings[group].adapters
        total = {
            name: sum(_moved(one, starts, name) * one.num_examples for one in ordered(updates))
            for name in updates[0].tensors
            if len({one.size for one in updates}) == 1
        }
        length = math.sqrt(math.fsum(float(np.vdot(t, t)) for t in total.values()))
        for update in updates:
            squares, across = 0.0, 0.0
            for name in update.tensors:
                moved = _moved(update, starts, name)
                squares += float(np.vdot(moved, moved))
                across += float(np.vdot(moved, total[name])) if total else 0.0
            norm = math.sqrt(squares)
            drift = 1 - across / (norm * length) if norm and length else None
            yield update.client, norm, drift

    def _mixed(self, updates: Mapping[str, list[Update]]) -> Clusters:
        """Mix the departments that have a new adapter; the others stay as they are."""
        mixing = self.plan.mixing
        if mixing is None or len(updates) < 2:
            return ()
        (size,) = self.plan.all_sizes
        adapters = {group: self.standings[group].adapters[size] for group in updates}
        weights = {
            group: len(found) if self.plan.privacy else sum(one.num_examples for one in found)
            for group, found in updates.items()
        }
        following, clusters = mix(adapters, weights, mixing)
        for group, tensors in following.items():
            self.standings[group] = replace(self.standings[group], adapters={size: tensors})
        return clusters

    def _aggregated(
        self, group: str, updates: list[Update], number: int, num_asked: int
    ) -> Standing:
        plan, standing = self.plan, self.standings[group]
        fresh = self._fresh(number) if plan.rule == "flora" else None
        following = standing.advanced(self._layers(group, updates, number, num_asked), fresh)
        if plan.optimiser.name == "fedavg":
            return following
        (size,) = standing.adapters
        moving = [name for name in standing.adapters[size] if name in updates[0].tensors]
        old, new = (
            {name: one.adapters[size][name] for name in moving} for one in (standing, following)
        )
        taken, state = stepped(plan.optimiser, standing.optimiser, old, new)
        adapters = {size: {**following.adapters[size], **taken}}
        return Standing(adapters=adapters, changes=following.changes, optimiser=state)

    def _layers(
        self, group: str, updates: list[Update], number: int, num_asked: int
    ) -> Iterable[Layer]:
        plan, robust = self.plan, self.plan.robust
        if plan.privacy:
            return noised(
                updates,
                self.standings[group].adapters[updates[0].size],
                plan.privacy,
                num_rounds=plan.num_rounds,
                num_expected=num_asked,
                seed=derive_seed(plan.seed, "privacy", group, number),
            )
        sizes = plan.all_sizes if plan.rule == "flexlora" else None
        match robust.name if robust else None:
            case "trimmed_mean":
                assert robust
                return trimmed_mean(updates, robust.num_hostile)
            case "median":
                return median(updates)
            case "krum":
                assert robust
                kept = len(updates) - robust.num_hostile
                updates = krum(updates, robust.num_hostile, max(1, kept))
            case "clipping":
                start = self.standings[group].adapters.get(updates[0].size)
                one_size = len(plan.all_sizes) == 1
                updates = clipped(updates, start=start if one_size else None)
        return aggregate(updates, plan.rule, sizes)

    # ── what stays ───────────────────────────────────────────────────────────────────────────

    def _write(self, done: Round, clock: "_Clock") -> None:
        folder = self.out / ROUNDS / f"{done.number:04d}"
        with new_artefact(folder, overwrite=True) as partial:
            for group, standing in self.standings.items():
                (partial / group).mkdir()
                save_standing(partial / group, standing)
            clock.lap("write")
            done = done.model_copy(update={"seconds": clock.seconds})
            rounds = (*self.history.rounds, done)
            self.history = self.history.model_copy(
                update={
                    "rounds": rounds,
                    "privacy": self._spent(len(rounds)),
                    "centroids": self._told(),
                }
            )
            self.history.write(partial / HISTORY)
            Record.make(
                "round",
                inputs={"model": self.model, "plan": self._plan_hash},
                settings={
                    "number": done.number,
                    "trained": sorted(self.trained),
                    "coreset": self.coreset
                    and {"round": self.coreset.round, "taken": dict(self.coreset.taken)},
                },
            ).write(partial)
        self.history.write(self.out / HISTORY)
        for old in sorted((self.out / ROUNDS).glob("[0-9]*"))[:-NUM_KEPT]:
            shutil.rmtree(old)

    def _spent(self, num_rounds: int) -> Spent | None:
        if self.plan.privacy is None:
            return None
        return spent(self.plan.privacy, num_rounds, num_planned=self.plan.num_rounds)

    def _told(self) -> Spent | None:
        """What centroids told of any one example: of the client that told most often.

        The ledger counts, since a round that was begun twice was told twice.
        """
        selection = self.plan.selection
        if selection is None or selection.privacy is None:
            return None
        told = Counter(
            entry.client for entry in self.asking.ledger.entries if entry.kind == "centroids"
        )
        return cells.spent(
            selection.privacy,
            max(told.values(), default=0),
            num_planned=selection.num_exchanges(self.plan.num_rounds),
        )

    def _finish(self) -> History:
        """Score the last adapters, write them, and close the history."""
        number = self.plan.num_rounds + 1
        if self.plan.rule == "fedsa":
            self._complete_b(number)
        for group, standing in self.standings.items():
            size = max(standing.adapters)
            write_adapter(
                self.out / ADAPTERS / group,
                standing.as_one_adapter(size),
                size.scale,
                Record.make(
                    "adapter",
                    inputs={"model": self.model, "plan": self._plan_hash},
                    settings={"department": group, "rank": size.rank, "alpha": size.alpha},
                    figures={"num_rounds": self.plan.num_rounds},
                ),
                overwrite=True,
            )
        silent = self.excluded.keys() | self.unscored
        names = [name for name in self.plan.clients if name not in silent]
        ready = self._ready(names)
        questions = {name: self._scoring_question(name, number, ready) for name in names}
        last = {part.client: part.scores.get("client") for part in self.history.rounds[-1].parts}
        final = []
        for answer in self.asking.ask(questions):
            part = self.asking.part(answer, self.asking.logged(answer, "evaluate", {}))
            own = last.get(part.client)
            if own is not None and part.counted:
                part = part.model_copy(update={"scores": {**part.scores, "client": own}})
            final.append(part)
            self.asking.watch(Answered(round=number, phase="evaluate", part=part))
        parts = tuple(sorted(final, key=lambda part: part.client))
        self.history = self.history.model_copy(update={"final": parts})
        self.history.write(self.out / HISTORY)
        return self.history

    def _complete_b(self, number: int) -> None:
        """FedSA-LoRA: the B of a group's adapter, for who is new, is the mean of its clients'."""
        found = self._mean_b(self.plan.departments, number)
        for group, names in self.plan.groups.items():
            departments = {self.plan.department_of(name) for name in names}
            mean = [found[one] for one in sorted(departments) if one in found]
            if not mean:
                continue
            b: dict[str, Floats] = {
                name: np.mean([one[name] for one in mean], axis=0, dtype=np.float64).astype("f4")
                for name in mean[0]
            }
            standing = self.standings[group]
            adapters = {size: {**tensors, **b} for size, tensors in standing.adapters.items()}
            self.standings[group] = Standing(adapters=adapters, optimiser=standing.optimiser)

    def _scoring_question(self, name: str, number: int, ready: Ready) -> Question:
        return Question(
            kind="scores",
            round=number,
            phase="evaluate",
            settings=self.asking.task(name, scored=self._scored(number)),
            tensors=ready[self.group_of[name], self.plan.size_of(name)],
        )


class _Clock:
    """Time on the clock, by what it was spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, what: str) -> None:
        now = time.monotonic()
        self.seconds[what] = round(now - self._last, 4)
        self._last = now


def _load_history(file: Path) -> History:
    try:
        return History.model_validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ReportError(
            f"{file}: expected the history of a federation, found: {error}; remove the folder of "
            "its round, and the run goes on from the one before"
        ) from error


def _moved(update: Update, starts: Mapping[Size, Tensors], name: str) -> Floats:
    return update.tensors[name] - starts[update.size][name]


def _without(tensors: Mapping[str, NDArray[Any]], factor: Factor) -> dict[str, NDArray[Any]]:
    return {name: t for name, t in tensors.items() if not name.endswith(f".lora_{factor}.weight")}


def _shapes(update: Update) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in update.tensors.items()}
