"""Departments that train together in one process: from their text to clients, rounds and adapters.

    departments' text -- split, shared out --> clients -- run_rounds --> history, adapters, ledger
                                    |                                        |
                                    train    they train on                   scored, department by
                                    validation   they score adapters on      department, on `test`

So what a study reports of an adapter comes from text that no client has trained on or chosen by.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedgraft.evaluation.scorecard import FOLLOWED, RIGHT_AND_FOLLOWED, evaluate
from fedgraft.federation.asking import Answered, Event, Watch
from fedgraft.federation.client import Client
from fedgraft.federation.history import History, Kind
from fedgraft.federation.in_process import InProcess
from fedgraft.federation.ledger import Ledger
from fedgraft.federation.partition import Partition, summarise
from fedgraft.federation.plan import ORGANISATION, Plan
from fedgraft.federation.rounds import ADAPTERS, HISTORY, LEDGER, run_name, run_rounds
from fedgraft.federation.standing import Stored
from fedgraft.federation.workplace import Workplace
from fedgraft.models import open_model
from fedgraft.progress import progress
from fedgraft.provenance import Record, derive_seed, hash_json
from fedgraft.study.cost import training_flops
from fedgraft.study.material import Clients, Owners, first_by_hash, hash_documents, label_of
from fedgraft.study.result import NATS, Carried, Holding, Holdings, Scored, ScoredModel, Together
from fedgraft.study.run import Run
from fedgraft.study.stage import run_stage
from fedgraft.text.examples import are_dialogues
from fedgraft.training.adapter import merge_adapter, open_adapted, write_adapter

STATES = "clients"
"""Below the output of a federation: a folder for what each client keeps."""
SCORED = "scored.json"
WEIGHTS = "adapter_model.safetensors"
"""Of a PEFT directory."""


def train_together(
    model: Path,
    clients: Owners,
    plan: Plan,
    out: Path,
    *,
    max_documents: int | None,
    watch: Watch = lambda _: None,
) -> History:
    """Run a federation of clients that live in this process; see `federation.rounds`.

    Args:
        clients: They train on `train` and score adapters on `validation`; `test` is not touched.
        out: Of `run_rounds`; what clients keep is in `clients` below it.
        max_documents: Held-out documents, or dialogues, that a client scores on at most.

    Raises as `run_rounds` does.
    """
    workplace = Workplace(model)
    members = [
        Client(
            name,
            workplace,
            splits.train,
            first_by_hash(splits.validation, max_documents),
            out / STATES / name,
            encoder=plan.selection.encoding.encoder if plan.selection else None,
        )
        for ours in clients.values()
        for name, splits in ours.items()
    ]
    return run_rounds(InProcess(members), plan, model, out, watch=watch)


def traffic(ledger: Path) -> dict[str, Carried]:
    """What a ledger says was carried, by kind of message."""
    return {
        str(kind): Carried(
            num_messages=total.num_messages,
            bytes_up=total.bytes_up,
            bytes_down=total.bytes_down,
        )
        for kind, total in Ledger(ledger).totals("kind").items()
    }


def holdings(clients: Owners, partition: Partition, *, num_duplicates: int = 0) -> Holdings:
    """Count the documents, or dialogues, of every client by what the partition looks at.

    Args:
        num_duplicates: How many were dropped before, since others say the same.
    """
    examples = {
        name: [*splits.train, *splits.validation, *splits.test]
        for ours in clients.values()
        for name, splits in ours.items()
    }
    owners = {name: department for department, ours in clients.items() for name in ours}
    field = partition.label_field or "department"
    labels = {
        name: [owners[name] if field == "department" else label_of(one, field) for one in ours]
        for name, ours in examples.items()
    }
    sizes = {
        name: (len(split.train), len(split.validation))
        for ours in clients.values()
        for name, split in ours.items()
    }
    dialogues = any(are_dialogues(ours) for ours in examples.values())
    words = _in_words(partition, "dialogues" if dialogues else "documents")
    found = counted(words, labels, owners, sizes)
    return found.model_copy(update={"num_duplicates": num_duplicates})


def counted(
    words: str,
    labels: Mapping[str, Sequence[str | None]],
    owners: Mapping[str, str],
    sizes: Mapping[str, tuple[int, int]],
) -> Holdings:
    """Count what every client has, label by label.

    Args:
        words: Who gets what, in words.
        labels: Client -> the label of each of its examples.
        owners: Client -> its department.
        sizes: Client -> how many it trains on, and how many it holds out.
    """
    places: dict[str, range] = {}
    everything: list[str | None] = []
    for name, ours in labels.items():
        places[name] = range(len(everything), len(everything) + len(ours))
        everything += ours
    found = summarise(places, everything)  # type: ignore[arg-type]
    return Holdings(
        words=words,
        labels=found.labels,
        clients=tuple(
            Holding(
                client=name,
                department=owners[name],
                counts=counts,
                num_train=sizes[name][0],
                num_held_out=sizes[name][1],
            )
            for name, counts in zip(found.clients, found.counts, strict=True)
        ),
        skew=found.skew,
    )


def _in_words(partition: Partition, noun: Kind) -> str:
    match partition.name:
        case "departments" | "iid":
            return f"each department's {noun}, cut at random into clients of equal size"
        case "tasks":
            return f"a client for each {partition.label_field} of a department"
        case "quantity":
            return (
                f"each department's {noun}, cut at random; client k has a share in proportion "
                f"to k^-{partition.exponent:g}"
            )
        case "dirichlet":
            return (
                f"each {partition.field} of a department's {noun}, shared out by a draw from "
                f"Dirichlet({partition.alpha:g})"
            )


class Federating(Run):
    """A run of a study in which adapters are trained together."""

    def plan(self, clients: Clients, seed: int, **changes: Any) -> Plan:
        """The study's plan for some clients and a seed, with changes."""
        study, part = self.study, self.study.federation
        assert part
        return part.plan(
            study.name,
            clients,
            seed=derive_seed(seed, "federation"),
            row_length=study.row_length,
            window=study.evaluation.window,
            **changes,
        )

    def federate(
        self,
        model: Path,
        clients: Clients,
        plan: Plan,
        place: Path,
        *,
        arm: str,
        seed: int,
        title: str,
        personal: bool = False,
    ) -> tuple[list[Scored], Together]:
        """Train a plan's adapters together and score them, department by department.

        Args:
            place: Of the stage, below the output of the study.
            personal: Score each client's own adapter: the A that its group shares, and its B.
        """
        limit = self.study.evaluation.max_documents
        texts = [split for ours in clients.values() for split in ours.values()]
        inputs = {
            "model": self.hash_of(model),
            "text": hash_documents(*(split.train for split in texts)),
            "held out": hash_documents(*(split.validation for split in texts)),
            "test": self.material.test_hash,
        }
        settings = {
            "plan": plan.model_dump(mode="json"),
            "evaluation": self.study.evaluation.model_dump(mode="json"),
            "arm": arm,
            "personal": personal,
        }
        budget = num_tokens(plan)

        def make(folder: Path) -> Mapping[str, Any]:
            # of this plan alone: rounds of another one that was interrupted are none of its own
            work = folder / f".federation-{hash_json([inputs, settings])[-12:]}"
            asked = plan.num_rounds * len(plan.clients)
            with progress(title, asked, "answers") as advance:

                def watch(event: Event) -> None:
                    if isinstance(event, Answered) and event.phase == "train":
                        loss = event.part.loss
                        advance(1, "" if loss is None else f"loss {loss:.3f}")

                most = None if limit is None else max(1, limit * len(clients) // len(texts))
                train_together(model, clients, plan, work, max_documents=most, watch=watch)
            for name in (ADAPTERS, HISTORY, LEDGER):
                (work / name).rename(folder / name)
            found = list(
                self._personal(model, folder, work, clients, plan, arm, seed)
                if personal
                else self._shared(model, folder / ADAPTERS, clients, arm, seed)
            )
            write_scored(folder, found)
            return {
                "num_tokens": budget,
                "flops": training_flops(self.family.num_parameters, budget),
            }

        record = run_stage(
            self.out / place, title=title, inputs=inputs, settings=settings, make=make, say=self.say
        )
        self.cost(place.as_posix(), record)
        folder = self.out / place
        history = History.model_validate_json((folder / HISTORY).read_bytes())
        return read_scored(folder), Together(
            rule=plan.rule,
            seed=seed,
            shared=plan.share == "organisation",
            history=history,
            traffic=traffic(folder / LEDGER),
        )

    def _shared(
        self, model: Path, adapters: Path, clients: Clients, arm: str, seed: int
    ) -> Iterator[Scored]:
        """Score the adapters that groups share."""
        if (adapters / ORGANISATION).exists():
            yield from self.scored(
                model, adapters / ORGANISATION, list(clients), arm=arm, seed=seed, kind="global"
            )
            return
        for department in clients:
            yield from self.scored(
                model, adapters / department, [department], arm=arm, seed=seed, kind="department"
            )

    def _personal(
        self,
        model: Path,
        folder: Path,
        work: Path,
        clients: Clients,
        plan: Plan,
        arm: str,
        seed: int,
    ) -> Iterator[Scored]:
        """Score the personal adapters of clients, and keep them beside the shared ones."""
        for department, ours in clients.items():
            shared = Stored(folder / ADAPTERS / department / WEIGHTS)
            for client, splits in ours.items():
                kept = sorted(
                    (work / STATES / client / run_name(work)).glob("adapter-*.safetensors")
                )
                if not kept:  # it never answered
                    continue
                own = Stored(kept[-1])
                tensors = {name: (own if ".lora_B." in name else shared)[name] for name in shared}
                place = folder / ADAPTERS / client
                record = Record.read(folder / ADAPTERS / department)
                assert record
                write_adapter(place, tensors, plan.size_of(client).scale, record)
                yield from self.scored(
                    model,
                    place,
                    [department],
                    arm=arm,
                    seed=seed,
                    kind="client",
                    client=client,
                    num_documents=len(splits.train),
                )

    def scored(
        self,
        model: Path,
        adapter: Path | None,
        departments: Sequence[str],
        *,
        arm: str,
        seed: int,
        kind: ScoredModel,
        client: str | None = None,
        num_documents: int = 0,
    ) -> Iterator[Scored]:
        """Score the model, with an adapter if one is given, on the test material of departments."""
        settings = self.study.evaluation
        held_out = self.material.held_out(settings.max_documents)
        dialogues = [d for d in self.material.test_dialogues if d.department in departments]
        card = evaluate(
            merge_adapter(open_adapted(model, adapter)) if adapter else open_model(model),
            self.tokenizer,
            arm=f"{client or arm}, seed {seed}",
            seed=seed,
            documents={name: held_out[name] for name in departments},
            dialogues=dialogues,
            window=settings.window,
            max_new_tokens=settings.max_new_tokens,
            num_examples=0,
        )
        for department in departments:
            names = {NATS: f"perplexity/{department}/{NATS}"}
            names |= {name: f"{name}/{department}" for name in (FOLLOWED, RIGHT_AND_FOLLOWED)}
            scores = {name: card.value(full) for name, full in names.items()}
            yield Scored(
                arm=arm,
                department=department,
                seed=seed,
                model=kind,
                client=client,
                num_documents=num_documents,
                scores={name: value for name, value in scores.items() if value is not None},
            )


def num_tokens(plan: Plan) -> int:
    """Tokens that all clients of a plan train on in all rounds: rounded to steps in each."""
    asked = sum(max(1, round(plan.sampled * len(names))) for names in plan.departments.values())
    return plan.num_rounds * asked * plan.training.num_tokens


def write_scored(folder: Path, scored: Iterable[Scored]) -> None:
    lines = [one.model_dump_json() + "\n" for one in scored]
    (folder / SCORED).write_text("".join(lines), encoding="utf-8")


def read_scored(folder: Path) -> list[Scored]:
    text = (folder / SCORED).read_text(encoding="utf-8")
    return [Scored.model_validate_json(line) for line in text.splitlines()]
