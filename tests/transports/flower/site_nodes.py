"""Nodes that own their data, in this process: Flower's real app, contexts and parser."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import Context, RecordDict
from flwr.common.config import parse_config_args

from fedcore.recipes import Recipe, to_toml
from fedcore.transports.flower.apps import client_app
from tests.transports.flower.grid import FakeGrid


def node_context(node: int, config: str) -> Context:
    """The context of a SuperNode that was started with ``--node-config config``."""
    return Context(
        run_id=1,
        node_id=node,
        node_config=parse_config_args([config]),
        state=RecordDict(),
        run_config={},
    )


def site_grid(recipe: Recipe, configs: Mapping[int, str]) -> FakeGrid:
    """A grid of nodes, each with what stands after its ``--node-config``."""
    text = to_toml(recipe)
    app = client_app(lambda context: text)
    grid = FakeGrid(dict.fromkeys(configs, app))
    grid.contexts = {node: node_context(node, config) for node, config in configs.items()}
    return grid


def join(grid: FakeGrid, node: int, config: str) -> None:
    """One more node, or the same one with another configuration."""
    grid.handlers[node] = next(iter(grid.handlers.values()))
    grid.contexts[node] = node_context(node, config)
