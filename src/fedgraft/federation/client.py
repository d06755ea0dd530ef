"""A client: private text, and the answers that it gives; nothing else leaves it.

    Question ──> Client.answer ──> Answer
                   │  text, model, own factors on its disk
                   └─ its log: the reason of each fault, which stays here

    sizes       the model and the tokenizer are compared by hash, then counts; dialogues that are
                longer than a row are left out from here on, and counted
    centroids   clusters its examples, keeps the clusters and tells their centroids; see `choice`
    adapter     scores what it got, trains it on its examples or those chosen of them, scores what
                it made; sends the factors asked for. With `own` it sends factors that it kept
    scores      scores what it got

A factor that a question lacks is the client's own of an earlier round (FedSA-LoRA's B, FFA-LoRA's
A). What it made it keeps, two rounds of it: that is its personal adapter. The same question gets
the same answer, also a second time: seeds come from the plan's, the client's name and the round,
and own factors are those of a round before the one that is asked. Each run has a folder of its own
in the client's: what is kept there counts for no other.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedgraft.errors import (
    CorpusError,
    EvaluationError,
    FederationError,
    FedgraftError,
    NonFiniteError,
)
from fedgraft.evaluation.perplexity import Perplexity
from fedgraft.federation.aggregate import Change
from fedgraft.federation.choice import FEATURES, Choice, Draw
from fedgraft.federation.ledger import Kind, allow
from fedgraft.federation.message import Answer, Fault, Question, Value, narrowed, widened
from fedgraft.federation.standing import Stored, changes_of, factors_of, save_tensors
from fedgraft.federation.task import Task
from fedgraft.federation.update import BOTH, Factor, Tensors
from fedgraft.federation.workplace import Workplace
from fedgraft.provenance import derive_seed
from fedgraft.selection.coreset import Selection
from fedgraft.text.dialogues import Template
from fedgraft.text.examples import (
    Examples,
    are_dialogues,
    examples_at,
    fitting,
    pack_examples,
    tokenizer_for,
)
from fedgraft.text.packing import Rows
from fedgraft.weights.arithmetic import Floats

Shapes = Mapping[str, tuple[int, ...]]
log = logging.getLogger(__name__)
NUM_KEPT = 2
"""Rounds whose factors a client keeps."""


class _RefusedError(FederationError):
    """A question that this client does not answer; `fault` is all that the server learns."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


@dataclass(kw_only=True, slots=True)
class _Held:
    """What a client holds for a run."""

    train: Examples
    """Those that fit a row."""
    held_out: Examples
    num_left_out: int
    """Dialogues that are longer."""
    choice: Choice
    rows: Rows | None = None
    """All that it trains on, once it was asked to."""


class Client:
    """One participant."""

    def __init__(
        self,
        name: str,
        workplace: Workplace,
        train: Examples,
        held_out: Examples,
        state: Path,
        *,
        encoder: str | Path | None = None,
        features: Path | None = None,
        shows_points: bool = False,
    ) -> None:
        """
        Args:
            train: What it trains on.
            held_out: What it scores adapters on; nothing of it is trained on. Without any it
                scores nothing.
            state: A folder of its own, in which each run has one: factors and clusters that it
                keeps, training that was interrupted.
            encoder: Another model that compares its examples, where a federation asks for one: a
                question names none of this machine's folders, but says which weights it means.
            features: Where features of its examples are kept, if not in that folder: clients of one
                study may share a place, since features are found by what they are of.
            shows_points: Let a point of each example leave, see `Selection.method`. For studies
                that compare it with centroids alone; a point is as good as its example's features.
        """
        self.name = name
        self._workplace = workplace
        self._train, self._held_out = train, held_out
        self._state, self._features = state, features or state / FEATURES
        self._shows_points, self._encoder = shows_points, encoder
        self._held: dict[tuple[str, int, Template], _Held] = {}

    def answer(self, question: Question) -> Answer:
        """Answer a question, or say in one word why not; the reason goes to the log alone."""
        try:
            payload, shapes = self._answered(question)
            allow(question.kind, payload, tensors=shapes)
        except FedgraftError as error:
            fault = _fault_of(error, question.kind)
            log.warning("%s, round %d: %s: %s", self.name, question.round, fault, error)
            return Answer(client=self.name, kind=question.kind, round=question.round, fault=fault)
        return Answer(client=self.name, kind=question.kind, round=question.round, payload=payload)

    def _answered(self, question: Question) -> tuple[dict[str, Value], Shapes]:
        task, number = Task.of(question.settings), question.round
        self._check_model(task)
        tensors = widened(question.tensors)
        match question.kind:
            case "sizes":
                return self._sizes(task), {}
            case "centroids":
                return self._centroids(task, tensors, number), {}
            case "adapter" if task.own:
                return self._own(task, number)
            case "adapter":
                return self._made(task, tensors, number)
            case "scores":
                return self._scores(task, tensors, number), {}

    def _check_model(self, task: Task) -> None:
        if task.model != (own := self._workplace.content_hash):
            raise _RefusedError(
                "other model",
                f"expected the model {task.model[:19]} of the federation, found {own[:19]} here; "
                "put the federation's model in its place",
            )
        if task.tokenizer != (own := self._workplace.tokenizer_hash):
            raise _RefusedError(
                "other tokenizer",
                f"expected the tokenizer {task.tokenizer[:19]} of the federation, found {own[:19]} "
                "here; copy its tokenizer beside the model",
            )

    def _fitting(self, task: Task) -> _Held:
        """Its examples, but for dialogues that are longer than a row; of the last run alone."""
        key = task.run, task.row_length, task.prompt
        if key not in self._held:
            kept, num_left_out = [], 0
            for examples in (self._train, self._held_out):
                own = tokenizer_for(self._workplace.tokenizer, examples, task.prompt)
                fit, num = fitting(own, examples, task.row_length)
                kept.append(fit)
                num_left_out += num
            if num_left_out:
                log.warning(
                    "%s: %d dialogues are longer than a row of %d tokens and are left out",
                    *(self.name, num_left_out, task.row_length),
                )
            train, held_out = kept
            choice = Choice(train, self._workplace, self._folder(task), self._features)
            self._held = {
                key: _Held(train=train, held_out=held_out, num_left_out=num_left_out, choice=choice)
            }
        return self._held[key]

    def _sizes(self, task: Task) -> dict[str, Value]:
        held = self._fitting(task)
        if not held.train:
            longer = f" that fit a row of {task.row_length} tokens" if self._train else ""
            raise _RefusedError(
                "no data", f"expected examples to train on{longer}, found none; add some"
            )
        num_held = len(held.train) + len(held.held_out)
        return {
            "num_examples": len(held.train),
            "num_documents": num_held,
            "num_dialogues": num_held if are_dialogues(held.train) else 0,
            "num_left_out": held.num_left_out,
        }

    def _centroids(self, task: Task, tensors: Tensors, number: int) -> dict[str, Value]:
        if task.selection is None:
            raise _RefusedError("refused", "expected settings of a selection, found none")
        if task.selection.method == "points" and not self._shows_points:
            raise _RefusedError(
                "refused",
                "expected to tell centroids, found a question for a point of every example; take "
                "the method federated",
            )
        selection = self._with_own_encoder(task.selection, task.encoder)
        choice = self._fitting(task).choice
        summary = choice.told(selection, tensors, self._draw(task, number))
        told = summary.counts[:, None] > 0
        return {
            "centroids": np.where(told, summary.centroids, np.float32(0)),
            "counts": summary.counts,
            "num_examples": summary.num_examples,
        }

    def _with_own_encoder(self, selection: Selection, content_hash: str) -> Selection:
        """The selection with the encoder of this machine, if it is the one that is meant."""
        if not content_hash:
            return selection
        if self._encoder is None:
            raise _RefusedError(
                "other model",
                f"expected the encoder {content_hash[:19]} of the federation, found none; name its "
                "folder as `encoder` of this client",
            )
        encoding = selection.encoding.model_copy(update={"encoder": str(self._encoder)})
        if content_hash != (own := self._workplace.reader.encoder_hash(encoding)):
            raise _RefusedError(
                "other model",
                f"expected the encoder {content_hash[:19]} of the federation, found {own[:19]} "
                "here; put the federation's encoder in its place",
            )
        return selection.model_copy(update={"encoding": encoding})

    def _draw(self, task: Task, number: int) -> Draw:
        return Draw(
            number=number,
            seed=derive_seed(task.seed, self.name, "choice", number),
            map_seed=task.seed,
            window=task.window,
            prompt=task.prompt,
            num_exchanges=task.num_exchanges,
        )

    def _taken(self, task: Task, number: int) -> Examples:
        """The examples to train on: those that were chosen, or all."""
        selection, held = task.selection, self._fitting(task)
        if selection is None or selection.method == "all":
            return held.train
        places = held.choice.taken(selection, task.counts, self._draw(task, task.choice))
        if not places:
            raise _RefusedError("nothing chosen", "expected examples that were chosen, found none")
        held.choice.keep(number, places)
        return examples_at(held.train, places)

    def _made(self, task: Task, tensors: Tensors, number: int) -> tuple[dict[str, Value], Shapes]:
        if task.training is None:
            raise _RefusedError("refused", "expected settings of training, found none")
        examples = self._taken(task, number)
        rows = self._packed(task, examples)
        num_tokens = task.training.num_tokens
        if task.passes is not None:
            num_tokens = max(1, min(num_tokens, round(task.passes * rows.num_tokens)))
        changes, start = changes_of(tensors), self._completed(task, factors_of(tensors), number)
        seed = derive_seed(task.seed, self.name, number)
        scores: dict[str, Value] = {}
        begun = time.monotonic()
        if task.scored and self._fitting(task).held_out:
            measured = self._scored(task, start, changes)
            scores[f"{task.scored}/nats_per_token"] = measured.nats_per_token
        scoring = time.monotonic() - begun
        made, outcome = self._workplace.train(
            task.size,
            start,
            changes,
            rows,
            task.training.model_copy(update={"seed": seed, "num_tokens": num_tokens}),
            self._folder(task) / f"training-{number:04d}",
            trained=task.factors_trained,
            proximal=task.proximal,
            label=f"{self.name}, round {number}",
        )
        begun = time.monotonic()
        if self._fitting(task).held_out:
            measured = self._scored(task, made, changes)
            scores["client/nats_per_token"] = measured.nats_per_token
            scores["num_scored"] = measured.num_tokens
        scoring += time.monotonic() - begun
        self._keep(task, made, number)
        sent = _factors_in(made, task.factors_sent)
        payload: dict[str, Value] = {
            **narrowed(sent, task.wire),
            **scores,
            "num_examples": len(examples),
            "num_tokens": outcome.num_tokens,
            "num_steps": outcome.num_steps,
            "loss": float(outcome.losses[-1][1]),
            "seconds": outcome.seconds,
            "seconds_scoring": scoring,
        }
        return payload, _shapes(sent)

    def _own(self, task: Task, number: int) -> tuple[dict[str, Value], Shapes]:
        """Factors of the last round before this one that it trained in."""
        sent = _factors_in(self._kept(task, number), task.factors_sent)
        return {
            **narrowed(sent, task.wire),
            "num_examples": len(self._fitting(task).train),
        }, _shapes(sent)

    def _scores(self, task: Task, tensors: Tensors, number: int) -> dict[str, Value]:
        if not task.scored:
            raise _RefusedError("refused", "expected the name of what is to be scored, found none")
        start = self._completed(task, factors_of(tensors), number)
        measured = self._scored(task, start, changes_of(tensors))
        return {
            f"{task.scored}/nats_per_token": measured.nats_per_token,
            f"{task.scored}/bits_per_byte": measured.bits_per_byte,
            "num_tokens": measured.num_tokens,
            "num_documents": len(self._fitting(task).held_out),
        }

    def _scored(self, task: Task, tensors: Tensors, changes: Mapping[str, Change]) -> Perplexity:
        return self._workplace.score(
            task.size,
            tensors,
            changes,
            self._fitting(task).held_out,
            window=task.window,
            prompt=task.prompt,
            label=f"{self.name}: held-out text",
        )

    def _packed(self, task: Task, examples: Examples) -> Rows:
        """Examples in rows; all of them are kept in rows, a choice is not."""
        held = self._fitting(task)
        if (whole := examples is held.train) and held.rows is not None:
            return held.rows
        rows = pack_examples(
            tokenizer_for(self._workplace.tokenizer, examples, task.prompt),
            examples,
            task.row_length,
            seed=derive_seed(task.seed, self.name),
            num_positions=self._workplace.num_positions,
        )
        if whole:
            held.rows = rows
        return rows

    def _completed(
        self, task: Task, tensors: Mapping[str, Floats], number: int
    ) -> Mapping[str, Floats]:
        """Factors, those that a question lacks taken from what the client kept."""
        named = {factor: _factors_in(tensors, (factor,)) for factor in BOTH}
        lacking = [factor for factor in BOTH if not named[factor]]
        if not lacking:
            return tensors
        return {**tensors, **_factors_in(self._kept(task, number), lacking)}

    def _folder(self, task: Task) -> Path:
        """Where it keeps what is of this run."""
        return self._state / task.run

    def _keep(self, task: Task, made: Mapping[str, Floats], number: int) -> None:
        folder = self._folder(task)
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / f"adapter-{number:04d}.safetensors", made)
        for old in sorted(folder.glob("adapter-*.safetensors"))[:-NUM_KEPT]:
            old.unlink()

    def _kept(self, task: Task, number: int) -> Mapping[str, Floats]:
        files = [
            file
            for file in sorted(self._folder(task).glob("adapter-*.safetensors"))
            if int(file.stem.rpartition("-")[2]) < number
        ]
        if not files:
            raise _RefusedError(
                "refused",
                f"expected factors of a round before {number} in {self._folder(task)}, found none; "
                "they were lost, so let the client begin anew under another name",
            )
        return dict(Stored(files[-1]))


def _fault_of(error: FedgraftError, kind: Kind) -> Fault:
    match error:
        case _RefusedError():
            return error.fault
        case NonFiniteError() if kind == "adapter":
            return "diverged"
        case CorpusError() | EvaluationError():
            return "no data"
    return "refused"


def _shapes(tensors: Tensors) -> Shapes:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _factors_in(tensors: Mapping[str, Floats], wanted: Sequence[Factor]) -> dict[str, Floats]:
    return {
        name: tensor
        for name, tensor in tensors.items()
        if any(name.endswith(f".lora_{factor}.weight") for factor in wanted)
    }
