"""Gradient matching: find the pictures whose gradient is the one that was uploaded.

An honest-but-curious server knows the model, its frozen parts, the labels and the batch size. From
random pictures it minimises the distance of their gradient g(x) to the observed one, g:

    1. Adam on  1 - cos(g(x), g),  pictures clipped to [0, 1]       (Geiping et al., 2003.14053)
    2. L-BFGS on  |g(x) - g|^2 / |g|^2,  x = sigmoid(u)             (Zhu et al., 1906.08935)

The cosine leads from far away, the distance to the last digit. Of several starts the one with the
least distance is the result: the server has no truth to choose by.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore.errors import FedcoreError

ADAM_RATE = 0.05
HISTORY = 50
_INSIDE = 0.02
"""Where the second half begins at the nearest to the ends of [0, 1], where a sigmoid is flat."""


class Reconstruction(NamedTuple):
    """What the attack found.

    Attributes:
        pictures: ``(size, pixels)`` in [0, 1], those of the best start.
        loss: its ``|g(x) - g|^2 / |g|^2``; 0 where the observed gradient is zero.
        losses: those of all starts.
    """

    pictures: Tensor
    loss: float
    losses: tuple[float, ...]


def match_gradient(
    gradient: Callable[[Tensor], Tensor],
    observed: Tensor,
    shape: tuple[int, int],
    seed: int,
    starts: int = 4,
    steps: int = 400,
    refinements: int = 400,
) -> Reconstruction:
    """Pictures whose gradient comes as near to the observed one as the attack can bring it.

    A gradient of zeros (LoRA's ``A`` or CE-LoRA's ``R`` while ``B`` is zero) is shown by nearly
    anything; the first random start is returned then, untouched.

    Args:
        gradient: ``(starts, size, pixels)`` to ``(starts, numbers)``, differentiable twice.
        observed: ``(numbers,)``.
        shape: ``(size, pixels)``.
        seed: of the starts, uniform on [0, 1].
        starts: how many; all are moved together.
        steps: of Adam.
        refinements: iterations of L-BFGS.

    Raises:
        FedcoreError: an observed gradient that is not finite or of another size, no starts, or a
            negative number of steps.

    Cost: about ``3 (steps + refinements)`` times the work of a gradient of ``starts x size``
    pictures.
    """
    if starts < 1:
        raise FedcoreError(f"starts is {starts}; pass at least 1")
    for name, count in (("steps", steps), ("refinements", refinements)):
        if count < 0:
            raise FedcoreError(f"{name} is {count}; pass 0 or more")
    if not torch.isfinite(observed).all():
        raise FedcoreError("observed holds values that are not finite")
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.rand(starts, *shape, generator=generator, dtype=torch.float64)
    seen = gradient(pictures[:1])
    if observed.shape != seen.shape[1:]:
        raise FedcoreError(
            f"observed has shape {tuple(observed.shape)}; this model's upload has "
            f"{tuple(seen.shape[1:])}"
        )
    energy = observed.square().sum()
    if not energy:
        return Reconstruction(pictures[0], 0.0, (0.0,) * starts)

    def angle(x: Tensor) -> Tensor:
        gradients = gradient(x)
        return 1 - (gradients @ observed) / (gradients.norm(dim=1) * energy.sqrt())

    def distance(x: Tensor) -> Tensor:
        return (gradient(x) - observed).square().sum(1) / energy

    refined = _refine(distance, _approach(angle, pictures, steps), refinements)
    losses = distance(refined).detach().nan_to_num(inf)
    best = int(losses.argmin())
    return Reconstruction(refined[best], float(losses[best]), tuple(losses.tolist()))


def _approach(angle: Callable[[Tensor], Tensor], pictures: Tensor, steps: int) -> Tensor:
    moved = pictures.clone().requires_grad_()
    adam = torch.optim.Adam([moved], ADAM_RATE)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, steps))
    for _ in range(steps):
        # Starts do not meet: each one's gradient is that of its own term.
        (moved.grad,) = torch.autograd.grad(angle(moved).sum(), moved)
        adam.step()
        slower.step()
        with torch.no_grad():
            moved.clamp_(0, 1)
    return moved.detach()


def _refine(distance: Callable[[Tensor], Tensor], pictures: Tensor, iterations: int) -> Tensor:
    if not iterations:
        return pictures
    free = torch.logit(pictures.clamp(_INSIDE, 1 - _INSIDE)).requires_grad_()
    search = torch.optim.LBFGS(
        [free],
        max_iter=iterations,
        history_size=HISTORY,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-15,
        tolerance_change=1e-18,
    )

    def closure() -> float:
        total = distance(torch.sigmoid(free)).sum()
        (free.grad,) = torch.autograd.grad(total, free)
        return float(total.detach())

    search.step(closure)
    return torch.sigmoid(free).detach()
