"""A Grid without sockets whose messages become Flower's bytes all the same, and nodes of all sorts.

Flower's classes ask for the identity of a task, which a SuperLink gives; here it is made up.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import cast

from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedgraft.federation.flower import client_app

Node = Callable[[Message], Iterable[Message]]
"""A question -> the replies that come back for it, in order; none for a node that is silent."""


class LocalGrid(Grid):
    """Nodes by name, asked at once; their replies become visible when the test says so.

    Every reply to a question lies under that question's id, as at a SuperLink, whatever the reply
    itself says that it answers.
    """

    def __init__(self, nodes: Mapping[str, Node]) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.nodes = dict(nodes)
        self.names = {100 + i: name for i, name in enumerate(nodes)}
        self.order: Callable[[list[str]], list[str]] = list
        """Names of those whose replies are there -> those of them that a look finds."""
        self.num_bytes: dict[str, int] = {}
        """Question id, and the id with `reply` behind it -> bytes that travelled."""
        self._asked: dict[str, str] = {}
        self._replies: dict[str, list[Message]] = {}

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(self, *_: object, **__: object) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.names)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, name=name) for node, name in self.names.items()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            contents, number = contents_of(message)
            self.num_bytes[number] = sum(map(len, contents.values()))
            name = self.names[message.metadata.dst_node_id]
            self._asked[number] = name
            replies = []
            for reply in self.nodes[name](inflated(contents, number)):
                contents, own = contents_of(reply)
                self.num_bytes[f"{number} reply"] = sum(map(len, contents.values()))
                replies.append(inflated(contents, own))
            self._replies[number] = replies
            ids.append(number)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        waiting = [self._asked[number] for number, replies in self._replies.items() if replies]
        seen = self.order(waiting)
        found = []
        for number in message_ids:
            if self._asked[number] in seen:
                found += self._replies[number]
                self._replies[number] = []
        return found

    def send_and_receive(self, *_: object, **__: object) -> Iterable[Message]:
        raise NotImplementedError


def contents_of(message: Message) -> tuple[dict[str, bytes], str]:
    """Every object of a message as bytes, and the id of the message itself."""
    objects = get_all_nested_objects(message)
    return {key: part.deflate() for key, part in objects.items()}, message.object_id


def inflated(contents: Mapping[str, bytes], number: str) -> Message:
    """The message of these bytes, as the other side gets it."""
    message = cast("Message", inflate_object_from_contents(number, dict(contents)))
    message.metadata.__dict__["_message_id"] = number
    return message


def node_of(socket: str) -> Node:
    """A node with our ClientApp, whose resident is at `socket`."""

    def replies(message: Message) -> list[Message]:
        context = Context(
            run_id=1,
            node_id=message.metadata.dst_node_id,
            node_config={"socket": socket},
            state=RecordDict(),
            run_config={},
        )
        return [client_app(message, context)]

    return replies
