"""Client factor pairs in the ways in which clients of one round differ from each other."""

from __future__ import annotations

import torch
from torch import Tensor

FAMILIES = ("consensus", "round1", "corr", "indep", "scalar", "rot")
"""Around a common pair; B from zero; along one direction; unrelated; in other scales and signs; in
other rotations."""


def make_family(
    name: str,
    clients: int,
    rank: int,
    widths: tuple[int, int],
    seed: int,
    level: float = 0.3,
    modules: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Left ``(N, L, r, p)``, right ``(N, L, r, q)`` and shares ``(N,)``, all fp64."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    sides = []
    along = normal(clients, modules, 1, 1)
    for i, width in enumerate(widths):
        own = normal(clients, modules, rank, width)
        common, direction = normal(modules, rank, width), normal(modules, rank, width)
        if name == "indep" or (name == "round1" and i == 0):
            side = own
        elif name == "corr":
            side = common + along * direction + 0.1 * own
        else:
            side = common + level * own
        sides.append(side / width**0.5)
    left, right = sides
    if name == "scalar":
        scale = normal(clients, modules, 1, 1).exp() * normal(clients, modules, 1, 1).sign()
        left, right = left * scale, right / scale
    elif name == "rot":
        turn = torch.linalg.qr(normal(clients, modules, rank, rank)).Q
        left, right = turn.mT @ left, turn.mT @ right
    shares = torch.rand(clients, generator=random, dtype=torch.float64) + 0.1
    return left, right, shares / shares.sum()
