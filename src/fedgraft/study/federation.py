"""A federation file: who takes part with what text, and how; and its run in this process.

    name: handbooks
    model: runs/grafted                  # or pocket:instruct, or a name on the hub
    departments:
      hr: { corpus: [hr.jsonl], num_clients: 3 }
      finance: { corpus: [finance/], num_clients: 2 }
    num_rounds: 4
    training: { num_tokens: 20_000, learning_rate: 1.0e-3, rank: 8, alpha: 16 }

and whatever else `federation.plan.Settings` knows. Clients are named `hr-1`, `hr-2`, ...

In place of `corpus` all departments may have `dialogues: [hr.jsonl]`: then answers are learned and
scored. Not some of them: a mean over departments would mix nats per token of answers and of text.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from fedgraft.errors import FedgraftError, StudyError
from fedgraft.federation.asking import Watch
from fedgraft.federation.client import Client
from fedgraft.federation.history import History
from fedgraft.federation.partition import Partition
from fedgraft.federation.plan import Name, Plan, Settings
from fedgraft.federation.rounds import HISTORY, LEDGER
from fedgraft.federation.workplace import Workplace
from fedgraft.models import open_tokenizer
from fedgraft.study.material import (
    Owners,
    first_by_hash,
    hash_documents,
    shared_out,
    split_dialogues,
    split_texts,
)
from fedgraft.study.result import ALL, RULE_WORDS, Federation, Holdings
from fedgraft.study.run import versions
from fedgraft.study.study import Texts, faults_of, read_yaml, with_paths
from fedgraft.study.together import holdings, traffic, train_together
from fedgraft.text.corpus import Splits
from fedgraft.text.dialogues import with_template
from fedgraft.text.examples import Example
from fedgraft.weights.checkpoint import resolve

log = logging.getLogger(__name__)


class Holder(BaseModel):
    """Who has text: documents or dialogues, never both."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    corpus: tuple[str, ...] = ()
    """Files and folders of documents."""
    dialogues: tuple[str, ...] = ()
    """JSONL of dialogues, or of Dolly's or Alpaca's instructions."""
    field: str = "text"
    """Of the rows of a corpus."""

    @model_validator(mode="after")
    def _of_one_kind(self) -> "Holder":
        if self.corpus and self.dialogues:
            raise ValueError("expected either corpus or dialogues, found both; take one out")
        return self

    def split(self, kind: str, name: str) -> Splits[Example]:
        """What it has, split. Raises as `material.split_texts` and `split_dialogues` do."""
        if self.dialogues:
            return split_dialogues(kind, name, self.dialogues)
        return split_texts(kind, name, Texts(corpus=self.corpus, field=self.field))


class Member(Holder):
    """A department in a federation file; it may name no text where its clients are elsewhere."""

    num_clients: int = Field(default=1, ge=1)


class FederationFile(Settings):
    """Everything that `fedgraft federate` needs; read from YAML."""

    name: Name
    question: str = "What do the departments learn together?"
    model: str
    departments: dict[Name, Member] = Field(min_length=1)
    partition: Partition = Partition()
    """How a department's text is shared out among its clients, in this process."""
    max_documents: int | None = Field(default=None, gt=0)
    """Held-out documents that a client scores on at most, the first by hash."""

    _as_written: dict[str, Any] = PrivateAttr(default_factory=dict)

    @field_validator("partition")
    @classmethod
    def _of_known_clients(cls, partition: Partition) -> Partition:
        if twice := partition.model_fields_set & {"num_clients", "seed"}:
            told = "num_clients of each department" if "num_clients" in twice else "the plan's seed"
            raise ValueError(f"{sorted(twice)[0]} comes from {told}; take it out here")
        if partition.name == "tasks" or (partition.name == "departments" and partition.field):
            raise ValueError(
                f"expected a partition into num_clients of each department, found {partition.name} "
                f"by {partition.label_field}; take dirichlet, quantity or departments without field"
            )
        return partition

    @model_validator(mode="after")
    def _of_one_kind(self) -> "FederationFile":
        kinds = {
            kind: [name for name, member in self.departments.items() if getattr(member, kind)]
            for kind in ("corpus", "dialogues")
        }
        if all(kinds.values()):
            found = "; ".join(f"{kind} in {', '.join(names)}" for kind, names in kinds.items())
            raise ValueError(
                f"departments: expected a corpus in all or dialogues in all, found {found}; nats "
                "per token of text and of answers have no common mean, so make two federations"
            )
        return self

    @model_validator(mode="after")
    def _can_be_planned(self) -> "FederationFile":
        try:
            _ = self.plan
        except ValidationError as error:
            raise ValueError("; ".join(faults_of(error))) from error
        return self

    @classmethod
    def load(
        cls, file: str | Path, places: Mapping[str, Path], *, dry: bool = False
    ) -> "FederationFile":
        """Read a federation file and find every path that it names; text may be missing if dry.

        Raises StudyError with all faults at once.
        """
        written = read_yaml(file, cls, "federation")
        content, _ = with_paths(written.model_dump(exclude_unset=True), Path(file), places, dry=dry)
        found = cls.model_validate(content)
        found._as_written = written.model_dump(mode="json")
        return found

    @property
    def as_written(self) -> dict[str, Any]:
        """The settings with defaults filled in and paths as the file names them."""
        return self._as_written

    @property
    def plan(self) -> Plan:
        """Who takes part, by name, and how."""
        own = {"question", "model", "departments", "partition", "max_documents"}
        members = {
            department: numbered(department, member.num_clients)
            for department, member in self.departments.items()
        }
        settings = self.model_dump(exclude=own, exclude_unset=True)
        return Plan.model_validate(settings | {"departments": members})


class ClientFile(Holder):
    """What a machine of a department says of its client: `fedgraft federate serve`."""

    name: Name
    model: str
    state: Path
    """A folder of its own, for factors and clusters that it keeps."""
    encoder: str | None = None
    """Another model that compares its examples, where the federation's selection has one."""
    max_documents: int | None = Field(default=None, gt=0)
    """Held-out documents that it scores on at most, the first by hash."""

    @model_validator(mode="after")
    def _has_text(self) -> "ClientFile":
        if not self.corpus and not self.dialogues:
            raise ValueError("expected either corpus or dialogues, found neither; name its text")
        return self

    @classmethod
    def load(cls, file: str | Path, places: Mapping[str, Path]) -> "ClientFile":
        """Read a client's file. Raises StudyError with all faults at once."""
        written = read_yaml(file, cls, "client")
        content, _ = with_paths(written.model_dump(exclude_unset=True), Path(file), places)
        state = Path(file).absolute().parent / written.state
        return cls.model_validate(content | {"state": state})

    def client(self) -> Client:
        """The client, with its text read. Raises as `Holder.split` does."""
        splits = _none_for_a_test(self.split("client", self.name))
        if splits.num_duplicates:
            log.warning("%s: %d copies were dropped", self.name, splits.num_duplicates)
        return Client(
            self.name,
            Workplace(self.model),
            splits.train,
            first_by_hash(splits.validation, self.max_documents),
            self.state,
            encoder=self.encoder,
        )


def numbered(department: str, num_clients: int) -> tuple[str, ...]:
    """The clients of a department, as the partition `departments` names them."""
    stem, width = department.strip("-."), len(str(num_clients))
    return tuple(f"{stem}-{number:0{width}}" for number in range(1, num_clients + 1))


def load_departments(file: FederationFile) -> dict[str, Splits[Example]]:
    """Read the text of every department.

    Nothing is kept for a test: what is held out is all for `validation`.

    Raises StudyError with the faults of all departments at once.
    """
    splits: dict[str, Splits[Example]] = {}
    faults = []
    for name, member in file.departments.items():
        try:
            splits[name] = _read(name, member)
        except FedgraftError as error:
            faults.append(f"  {error}")
    if faults:
        raise StudyError(
            f"{file.name}: found {len(faults)} departments that cannot take part:\n"
            + "\n".join(faults)
        )
    return splits


def _read(name: str, member: Member) -> Splits[Example]:
    if not member.corpus and not member.dialogues:
        raise StudyError(
            f"department {name}: expected a corpus or dialogues, found none; name its text"
        )
    try:
        return _none_for_a_test(member.split("department", name))
    except StudyError:
        raise
    except FedgraftError as error:
        raise StudyError(f"department {name}: {error}") from error


def _none_for_a_test(splits: Splits[Example]) -> Splits[Example]:
    return replace(splits, validation=(*splits.validation, *splits.test), test=())


def shared(file: FederationFile, departments: Mapping[str, Splits[Example]]) -> Owners:
    """Share out what departments have among their clients, under the names of the plan.

    Raises StudyError, with the faults of all departments at once, where a client has nothing to
    train on or to be scored on.
    """
    found: dict[str, dict[str, Splits[Example]]] = {}
    faults = []
    for name, splits in departments.items():
        names = numbered(name, file.departments[name].num_clients)
        partition = Partition.model_validate(
            file.partition.model_dump(exclude_unset=True) | {"num_clients": len(names)}
        )
        try:
            ours = shared_out({name: splits}, partition, file.seed)[name]
        except StudyError as error:
            faults.append(f"  {error}")
        else:
            found[name] = dict(zip(names, ours.values(), strict=True))
    if faults:
        raise StudyError(
            f"{file.name}: found {len(faults)} departments that cannot be shared out:\n"
            + "\n".join(faults)
        )
    return found


def run(file: FederationFile, out: Path, *, watch: Watch = lambda _: None) -> Federation:
    """Run the federation of a file in this process, and write `result.json` into `out`.

    The same call on the same `out` goes on after the last whole round.

    Raises StudyError for text that cannot take part, DialogueError for dialogues that the model
    has no template for, and as `run_rounds` does.
    """
    started = time.monotonic()
    model = resolve(file.model)
    departments = load_departments(file)
    clients = shared(file, departments)
    if any(member.dialogues for member in file.departments.values()):
        with_template(open_tokenizer(model), file.prompt)
    train_together(model, clients, file.plan, out, max_documents=file.max_documents, watch=watch)
    texts = [split.train for ours in clients.values() for split in ours.values()]
    return finished(
        file,
        out,
        time.monotonic() - started,
        partition=holdings(
            clients,
            file.partition,
            num_duplicates=sum(split.num_duplicates for split in departments.values()),
        ),
        inputs={"training text": hash_documents(*texts)},
    )


def finished(
    file: FederationFile,
    out: Path,
    seconds: float,
    *,
    partition: Holdings | None = None,
    inputs: Mapping[str, str] = MappingProxyType({}),
) -> Federation:
    """Write `result.json` of rounds that are done, from what they left in `out`.

    Raises FederationError where the ledger is broken.
    """
    history = History.model_validate_json((out / HISTORY).read_bytes())
    result = Federation(
        name=file.name,
        question=file.question,
        verdict=verdict(history),
        history=history,
        traffic=traffic(out / LEDGER),
        partition=partition,
        seconds=round(seconds, 2),
        settings=file.as_written,
        inputs={"model": history.model, **inputs},
        versions=versions(),
    )
    result.write(out)
    return result


def verdict(history: History) -> str:
    """A few sentences that follow from a history by rule."""
    last = history.final_means
    departments = [name for name in last if name != ALL]
    first = history.rounds[0].means if history.rounds else {}
    better, told = 0, []
    for name in departments:
        before = first.get(name, {}).get("graft")
        after = last[name].get("department") or last[name].get("global")
        if before and after:
            better += after.weighted < before.weighted
            told.append(f"{name} {before.weighted:.3f} to {after.weighted:.3f}")
    words = {str(rule): words for rule, words in RULE_WORDS.items()}
    rule = str(history.plan.get("rule"))
    sentences = [
        f"{len(history.rounds)} rounds of {len({p.client for p in history.final})} clients "
        f"in {len(departments)} departments, by {words.get(rule, rule)}."
    ]
    if left_out := sum(history.left_out.values()):
        sentences.append(
            f"{left_out} dialogues of {', '.join(sorted(history.left_out))} are longer than a row "
            f"of {history.plan.get('row_length')} tokens and were left out."
        )
    if told:
        text = "answers" if history.examples == "dialogues" else "text"
        sentences.append(
            f"The shared adapter predicts the held-out {text} of {better} of {len(told)} "
            f"departments better than the graft alone (nats per token: {', '.join(told)})."
        )
    if kept := [done.number for done in history.rounds if done.kept]:
        sentences.append(
            f"In {len(kept)} of {len(history.rounds)} rounds an adapter stayed as it was, for the "
            "reasons below."
        )
    if history.excluded:
        names = ", ".join(history.excluded)
        sentences.append(f"{names} took no part, for the reasons below.")
    lost = sum(not part.counted for done in history.rounds for part in done.parts)
    of_others = " of the others" if history.excluded else ""
    sentences.append(
        f"{lost} answers did not count." if lost else f"Every answer{of_others} was taken."
    )
    if history.privacy:
        spent = history.privacy
        sentences.append(
            f"All rounds together spent epsilon {spent.rounded_up} at delta {spent.delta:g}."
        )
    return " ".join(sentences)
