"""Flower in this process: a grid whose nodes are functions, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from types import SimpleNamespace

from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedcore.experiments.setup import Experiment
from fedcore.transports.flower.client import introduce, train

Handler = Callable[[Message, Context], Message]


class FakeGrid:
    """Every message is answered at once; a handler's exception becomes an error reply, as Flower
    makes it one. ``sent`` and ``contexts`` are there to be looked at.
    """

    def __init__(self, handlers: Mapping[int, Handler]) -> None:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self.run = SimpleNamespace(run_id=1)
        self.handlers = dict(handlers)
        self.sent: list[Message] = []
        self.contexts = {
            node: Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
            for node in handlers
        }

    def get_node_ids(self) -> list[int]:
        return list(self.handlers)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        replies = []
        for message in messages:
            self.sent.append(message)
            node = message.metadata.dst_node_id
            try:
                # Nothing is shared with whoever is at the other end of a wire.
                reply = self.handlers[node](deepcopy(message), self.contexts[node])
            except TimeoutError:
                continue
            except Exception as error:
                reply = Message(Error(code=2, reason=str(error)), reply_to=message)
            replies.append(reply)
        # They come in any order.
        return replies[::-1]


def recipe_nodes(experiment: Experiment) -> dict[int, Handler]:
    """A node a client of the recipe, with ids that sort otherwise than the clients' names."""
    return {
        1000 - 7 * i: recipe_handler(experiment, client)
        for i, client in enumerate(experiment.trainers)
    }


def recipe_handler(experiment: Experiment, client: str) -> Handler:
    def handle(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "query":
            return introduce(message, client)
        return train(message, context, experiment, client)

    return handle
