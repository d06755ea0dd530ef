"""All clients in one process, one after the other: the embedded way, without sockets or Ray.

Questions and answers become bytes and are read again, as on a network, so that what is counted is
what would travel and nothing but a message can pass.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from fedgraft.errors import FederationError
from fedgraft.federation.client import Client
from fedgraft.federation.message import (
    Answer,
    Question,
    answer_bytes,
    answer_from,
    question_bytes,
    question_from,
)
from fedgraft.progress import silenced

log = logging.getLogger(__name__)


class InProcess:
    """An Exchange over clients at hand. A time-out cannot interrupt them: each is waited for."""

    transport = "in process"

    def __init__(self, clients: Sequence[Client]) -> None:
        """Raises FederationError for two clients of one name."""
        self._clients = {client.name: client for client in clients}
        if len(self._clients) < len(clients):
            names = [client.name for client in clients]
            twice = next(name for name in names if names.count(name) > 1)
            raise FederationError(
                f"expected clients of different names, found {twice!r} twice; rename one"
            )

    @property
    def clients(self) -> tuple[str, ...]:
        return tuple(sorted(self._clients))

    def ask(self, questions: Mapping[str, Question], timeout: float) -> Iterator[Answer]:  # noqa: ARG002
        for name, question in sorted(questions.items()):
            if name not in self._clients:
                yield Answer(client=name, kind=question.kind, round=question.round, fault="lost")
                continue
            started = time.monotonic()
            asked = question_bytes(question)
            with silenced():
                answered = answer_bytes(self._clients[name].answer(question_from(asked)))
            try:
                answer = answer_from(answered)
            except FederationError as error:
                log.warning("%s, round %d: %s", name, question.round, error)
                kind, number = question.kind, question.round
                answer = Answer(client=name, kind=kind, round=number, fault="failed")
            yield replace(
                answer,
                client=name,  # whatever it calls itself
                bytes_down=len(asked),
                bytes_up=len(answered),
                seconds=time.monotonic() - started,
            )
