"""FLoRA-NA's coefficients by Adam: what one writes from the objective alone.

arXiv 2509.26399 does not say how the two vectors are found. Here autograd differentiates the
objective through the combined factors, with no Gram blocks kept and no weight-sized matrix formed,
for all modules at once; both vectors start at the shares.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore.methods.lora.flora_na.objective import PairObjective

RATES = (1e-3, 1e-2, 1e-1)
"""Learning rates of which the one that arrives first is measured."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Objectives ``(L,)`` of coefficients ``p, q (L, N)``."""


class Search(NamedTuple):
    """What the best learning rate did.

    Attributes:
        rate: the learning rate that brought most modules to the target, and soonest.
        steps: after which all of them were there; as many as were made where some never were.
        arrived: ``(L,)`` bool, modules that reached the target.
        value: ``(L,)`` fp64, the objective after ``steps`` steps at this rate.
        lowest: ``(L,)`` fp64, the lowest objective met on the way at any rate.
    """

    rate: float
    steps: int
    arrived: Tensor
    value: Tensor
    lowest: Tensor


def factor_loss(left: Tensor, right: Tensor, shares: Tensor) -> Loss:
    """``||M - B^ A^||^2 / ||M||^2`` through the factors, in their dtype.

    Args:
        left: ``(N, L, r, d_out)``.
        right: ``(N, L, r, d_in)``.
        shares: ``(N,)`` on their device.
    """
    shares = shares.to(left)
    stacks = left.transpose(0, 1).contiguous(), right.transpose(0, 1).contiguous()
    outer, inner = (side.flatten(1, 2) for side in stacks)
    weighted = (stacks[0] * shares[:, None, None]).flatten(1, 2)
    # ||M||^2. But for its epsilon Adam does not see the scale of a loss.
    both = shares.repeat_interleave(left.shape[2])
    target = ((weighted @ outer.mT) * (inner @ inner.mT) * both).sum((1, 2))

    def loss(p: Tensor, q: Tensor) -> Tensor:
        b, a = (
            (c[:, None] @ side.flatten(2)).view(side[:, 0].shape)
            for c, side in zip((p, q), stacks, strict=True)
        )
        cross = ((weighted @ b.mT) * (inner @ a.mT)).sum((1, 2))
        square = ((b @ b.mT) * (a @ a.mT)).sum((1, 2))
        return 1 + (square - 2 * cross) / target

    return loss


def gram_loss(objective: PairObjective, p: Tensor, q: Tensor) -> Tensor:
    """The same from Gram blocks that are there already."""
    return objective.value(p[:, None], q[:, None])[:, 0] / objective.target


def adam_combination(
    loss: Loss,
    start: Tensor,
    rate: float,
    steps: int,
    enough: Callable[[Tensor], bool] = lambda values: False,
) -> tuple[Tensor, Tensor]:
    """``p, q (L, N)`` after ``steps`` steps from ``p = q = start (L, N)``.

    It ends sooner where ``enough``, called with the loss before every step, returns true.
    """
    p, q = (start.clone().requires_grad_() for _ in range(2))
    adam = torch.optim.Adam([p, q], lr=rate)
    for _ in range(steps):
        values = loss(p, q)
        if enough(values.detach()):
            break
        adam.zero_grad()
        values.sum().backward()
        adam.step()
    return p.detach(), q.detach()


def best_rate(objective: PairObjective, target: Tensor, cap: int) -> Search:
    """The rate of :data:`RATES` with which most modules come down to ``target (L,)`` soonest.

    Found on the Gram form of the objective in fp64, where a step is cheap; none of it is measured.
    At each rate Adam continues until every module has been there, or for ``cap`` steps.
    """
    searches = [_descent(objective, target, rate, cap) for rate in RATES]
    best = max(searches, key=partial(_rank_of, objective.target))
    return best._replace(lowest=torch.stack([search.lowest for search in searches]).amin(0))


def _rank_of(size: Tensor, search: Search) -> tuple[int, int, float]:
    """Modules at the target, then steps, then the objective."""
    return int(search.arrived.sum()), -search.steps, -float((search.value / size).mean())


def _descent(objective: PairObjective, target: Tensor, rate: float, cap: int) -> Search:
    size, values = objective.target, list[Tensor]()
    relative = partial(gram_loss, objective)

    def enough(value: Tensor) -> bool:
        values.append(size * value)
        return bool(_arrived(values, target).all())

    start = objective.shares.expand(len(size), -1)
    end = adam_combination(relative, start, rate, cap, enough)
    if len(values) == cap:
        enough(relative(*end))
    history = torch.stack(values)
    # What was there from the start still takes a step to be seen.
    steps = max(1, len(values) - 1)
    return Search(rate, steps, _arrived(values, target), history[-1], history.amin(0))


def _arrived(values: list[Tensor], target: Tensor) -> Tensor:
    """Modules whose objective has been at the target or below, (L,)."""
    return (torch.stack(values) <= target).any(0)
