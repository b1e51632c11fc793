"""Nodes of a grid that are clients of a recipe."""

from __future__ import annotations

from flwr.app import Context, Message

from fedcore.experiments.setup import Experiment
from fedcore.transports.flower.client import introduce, train
from tests.transports.flower.grid import Handler


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
