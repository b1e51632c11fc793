"""Which nodes take part in a round."""

from __future__ import annotations

from time import sleep

import torch
from flwr.serverapp import Grid

from fedcore.data.seeding import derive_seed


def wait_for_nodes(grid: Grid, wanted: int, poll: float = 1.0) -> list[int]:
    """All connected nodes in ascending order, once there are ``wanted`` of them."""
    while len(found := sorted(grid.get_node_ids())) < wanted:
        sleep(poll)
    return found


def sample_nodes(grid: Grid, fraction: float, least: int, available: int, seed: int) -> list[int]:
    """FedAvg's sample, ``max(int(fraction n), least)`` of n connected nodes, drawn by ``seed``."""
    wanted = max(int(len(list(grid.get_node_ids())) * fraction), least)
    nodes = wait_for_nodes(grid, max(available, wanted))
    generator = torch.Generator().manual_seed(derive_seed(seed, "sample"))
    chosen = torch.randperm(len(nodes), generator=generator)[:wanted]
    return sorted(nodes[i] for i in chosen.tolist())
