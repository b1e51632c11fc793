"""Clients' statements about their data: random mixtures of Gaussians for random classes."""

from __future__ import annotations

import torch
from torch import Tensor


def random_statistics(
    seed: int,
    *,
    classes: int = 4,
    components: int = 3,
    features: int = 5,
    counts: bool = True,
    shift: float = 0.0,
) -> dict[str, Tensor]:
    """Statistics in fp64 as a client tells them."""
    random = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random, dtype=torch.float64)

    total = classes * components
    weights = uniform(classes, components) + 0.1
    told = {
        "weights": (weights / weights.sum(1, keepdim=True)).flatten(),
        "means": 4 * uniform(total, features) + shift,
        "variances": uniform(total, features) + 0.05,
        "classes": torch.arange(classes).repeat_interleave(components),
    }
    if counts:
        told["counts"] = torch.randint(1, 50, (classes,), generator=random)
    return told


def reordered(told: dict[str, Tensor], classes: list[int], components: list[int]) -> dict:
    """The same statement with its classes, and the components of each, in another order."""
    size = len(components)
    order = torch.tensor([size * c + g for c in classes for g in components])
    found = {name: told[name][order] for name in ("weights", "means", "variances")}
    found["classes"] = told["classes"].clone()
    if "counts" in told:
        found["counts"] = told["counts"][torch.tensor(classes)]
    return found
