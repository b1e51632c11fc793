"""The Gaussian mechanism on per-sample gradients: clip each example's, add up, add noise."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import torch
from torch import Tensor

from fedcore.errors import FedcoreError
from fedcore.privacy.keyed_stream import KeyedStream


def sample_norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """``(n,)`` the norm of each example's gradient over all tensors together.

    Args:
        gradients: name to ``(n, *shape)``; at least one.
    """
    squares = [g.flatten(1).double().square().sum(1) for g in gradients.values()]
    return torch.stack(squares).sum(0).sqrt()


def clipped_sum(gradients: Mapping[str, Tensor], max_norm: float) -> dict[str, Tensor]:
    """Name to ``sum_i g_i min(1, max_norm / ||g_i||)``, the norm being that over all names.

    One example more or less moves the result by at most ``max_norm``.

    Raises:
        FedcoreError: ``max_norm`` is not positive and finite, or a gradient is not finite, which
            no factor would bound.
    """
    if not (isfinite(max_norm) and max_norm > 0):
        raise FedcoreError(f"max_norm is {max_norm}; pass a finite number above 0")
    norms = sample_norms(gradients)
    if not bool(torch.isfinite(norms).all()):
        place = int((~torch.isfinite(norms)).nonzero()[0])
        raise FedcoreError(
            f"the gradient of example {place} of the batch is NaN or infinite; it cannot be clipped"
        )
    factors = max_norm / norms.clamp(min=max_norm)
    return {
        name: torch.einsum("n,n...->...", factors.to(g.dtype), g) for name, g in gradients.items()
    }


def with_noise(
    sums: Mapping[str, Tensor], deviation: float, stream: KeyedStream
) -> dict[str, Tensor]:
    """Every number of ``sums`` with independent ``N(0, deviation^2)`` added, in sorted name order.

    Drawn on the CPU in fp64, so that the same stream gives the same noise on every device.
    """
    noisy = {}
    for name in sorted(sums):
        total = sums[name]
        noise = deviation * stream.normal(total.shape)
        noisy[name] = total + noise.to(total.device, total.dtype)
    return noisy
