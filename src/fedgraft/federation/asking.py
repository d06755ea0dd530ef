"""The server's side of a question: sent, the answer passed through the gate and written down.

question ──> exchange ──> answer ──> gate ──> ledger ──> part in the round
                                       └── refused, with the reason
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fedgraft.errors import FederationError
from fedgraft.federation.history import Part, Round
from fedgraft.federation.ledger import Entry, Item, Ledger, Phase, allow
from fedgraft.federation.message import Answer, Exchange, Question
from fedgraft.federation.plan import Plan
from fedgraft.federation.task import Task
from fedgraft.federation.workplace import Workplace


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """Questions went out."""

    round: int
    phase: Phase
    clients: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """A client's part in a round, as soon as it is known."""

    round: int
    phase: Phase
    part: Part


Event = Asked | Answered | Round
Watch = Callable[[Event], None]
"""Told what happens, for a live table."""


class Asking:
    """Asks the clients of a plan; all that they answer passes here."""

    def __init__(
        self,
        exchange: Exchange,
        plan: Plan,
        workplace: Workplace,
        ledger: Ledger,
        run: str,
        watch: Watch,
    ) -> None:
        """
        Args:
            run: Its name, see `Task.run`.
        """
        self.ledger, self.watch, self._run = ledger, watch, run
        self._exchange, self._plan, self._workplace = exchange, plan, workplace

    def task(self, name: str, **fields: object) -> dict[str, str | int | float | bool]:
        """The settings of a question to a client: those of the plan, and the fields given."""
        plan, size = self._plan, self._plan.size_of(name)
        settings = {
            "run": self._run,
            "model": self._workplace.content_hash,
            "tokenizer": self._workplace.tokenizer_hash,
            "seed": plan.seed,
            "row_length": plan.row_length,
            "window": plan.window,
            "rank": size.rank,
            "alpha": size.alpha,
            "wire": plan.wire,
            "prompt": plan.prompt,
            "sent": "".join(plan.sent),
        }
        return Task.model_validate(settings | fields).settings()

    def ask(self, questions: Mapping[str, Question]) -> Iterable[Answer]:
        """Send a question to each client; answers as they come, within the plan's time."""
        if not questions:
            return ()
        first = next(iter(questions.values()))
        names = tuple(sorted(questions))
        self.watch(Asked(round=first.round, phase=first.phase, clients=names))
        return self._exchange.ask(questions, self._plan.timeout)

    def logged(
        self, answer: Answer, phase: Phase, tensors: Mapping[str, tuple[int, ...]]
    ) -> str | None:
        """Put an answer into the ledger; why it is none that may leave a client, if it is not."""
        refused: str | None = None
        items: tuple[Item, ...] = ()
        try:
            if not answer.fault:
                items = allow(answer.kind, dict(answer.payload), tensors=tensors)
        except FederationError as error:
            refused = f"client {answer.client!r}: {error}"
        self.ledger.append(
            Entry(
                round=max(0, answer.round),
                phase=phase,
                client=answer.client,
                kind=answer.kind,
                items=items,
                bytes_up=answer.bytes_up,
                bytes_down=answer.bytes_down,
                seconds=answer.seconds,
            )
        )
        return refused

    def part(self, answer: Answer, refused: str | None) -> Part:
        """A client's part in a round; of an answer that is refused, the reason alone."""
        given: Mapping[str, object] = {} if refused else answer.payload
        scores = {
            name.removesuffix("/nats_per_token"): float(value)
            for name, value in given.items()
            if name.endswith("/nats_per_token") and isinstance(value, float)
        }
        return Part(
            client=answer.client,
            department=self._plan.department_of(answer.client),
            fault=answer.fault,
            refused=refused,
            num_examples=count(given, "num_examples"),
            num_left_out=count(given, "num_left_out"),
            num_scored=count(given, "num_scored" if answer.kind == "adapter" else "num_tokens"),
            scores=scores if answer.kind != "sizes" else {},
            loss=_number(given, "loss"),
            seconds_training=_number(given, "seconds") or 0.0,
            seconds_scoring=_number(given, "seconds_scoring") or 0.0,
            seconds=answer.seconds,
            bytes_up=answer.bytes_up,
            bytes_down=answer.bytes_down,
        )


def count(given: Mapping[str, object], key: str) -> int:
    """A count that a client tells; 0 where it tells none."""
    value = given.get(key)
    return value if type(value) is int else 0


def _number(given: Mapping[str, object], key: str) -> float | None:
    value = given.get(key)
    return value if type(value) is float else None
