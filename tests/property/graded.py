"""Clients whose factors have a spectrum of known condition."""

from __future__ import annotations

import torch
from torch import Tensor


def graded_clients(kappa: float, noise: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clients (5, 4, 20), weights, and a previous factor of condition ``kappa``, gauge random.

    Clients differ from it by ``noise`` times its weakest singular value.
    """
    random = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(4, 4, generator=random, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(20, 4, generator=random, dtype=torch.float64)).Q
    values = torch.logspace(0, -torch.tensor(kappa).log10().item(), 4, dtype=torch.float64)
    previous = left * values @ right.mT
    drift = torch.randn(5, 4, 20, generator=random, dtype=torch.float64) / 20**0.5
    weights = torch.rand(5, generator=random, dtype=torch.float64) + 0.1
    return previous + noise * values[-1] * drift, weights, previous
