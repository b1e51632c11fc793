"""The Gaussian mechanism on clients: clip each client's update, add up, add noise."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from fedcore.errors import FedcoreError
from fedcore.privacy.keyed_stream import KeyedStream
from fedcore_kernels.layout import FactorLayout


def noisy_mean(
    updates: Tensor,
    reference: Tensor,
    layout: FactorLayout,
    *,
    max_norm: float,
    noise_multiplier: float,
    expected: float,
    stream: KeyedStream,
) -> Tensor:
    """The mean of the clients' rows such that no single client decides much of it, fp64 ``(P,)``.

        c + (sum_n (x_n - c) min(1, S / ||x_n - c||) + N(0, (noise_multiplier S)^2)) / expected

    with the public reference c and S = ``max_norm``. One client more or less moves the sum by at
    most S, whatever it sent; clients count alike (arXiv:1710.06963). The denominator is the number
    of clients that is expected, not the one that came, which would say who came. Places of the row
    between tensors get no noise.

    Args:
        updates: ``(N, P)`` finite rows in ``layout``; N may be 0, which is noise alone.
        reference: ``(P,)`` what all clients started from.
        stream: what the noise is drawn from, tensor by tensor in the layout's order.

    Raises:
        FedcoreError: ``max_norm``, ``noise_multiplier`` or ``expected`` is not positive and finite.
    """
    for name, value in (
        ("max_norm", max_norm),
        ("noise_multiplier", noise_multiplier),
        ("expected", expected),
    ):
        if not (isfinite(value) and value > 0):
            raise FedcoreError(f"{name} is {value}; pass a finite number above 0")
    center = reference.double()
    moves = updates.double() - center
    factors = max_norm / moves.norm(dim=1).clamp(min=max_norm)
    total = factors @ moves
    noise = torch.zeros(layout.size, dtype=torch.float64)
    for slot in layout:
        view = layout.view(noise, slot)
        view.copy_(stream.normal(view.shape))
    deviation = noise_multiplier * max_norm
    return center + (total + deviation * noise.to(total.device)) / expected
