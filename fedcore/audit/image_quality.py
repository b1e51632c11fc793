"""How near reconstructed pictures are to the true ones, whatever their order in the batch."""

from __future__ import annotations

from math import inf, log10
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore.errors import FedcoreError, missing_extra

PSNR_CEILING = 60.0
"""dB; a picture nearer than that counts as this near, so that one exact hit cannot carry a mean."""


class Quality(NamedTuple):
    """Means over the pictures of a batch, and the batch in the order of the true one.

    Attributes:
        mse: mean squared error of pixels in [0, 1].
        psnr: ``-10 log10 mse`` of each picture, at most 60 dB, averaged.
        ssim: structural similarity over the whole picture, averaged; 1 is identity.
        exact: the share of pictures in which every pixel rounds to its true grey level.
        pictures: ``(size, pixels)``, reordered.
    """

    mse: float
    psnr: float
    ssim: float
    exact: float
    pictures: Tensor


def compare_pictures(truth: Tensor, found: Tensor, levels: int) -> Quality:
    """Bring ``found`` into the order with the least total squared error and measure.

    Args:
        truth: ``(size, pixels)`` in [0, 1].
        found: ``(size, pixels)``.
        levels: steps of grey between 0 and 1.

    Raises:
        FedcoreError: the shapes differ.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise missing_extra("scipy", "run") from error

    if truth.shape != found.shape or truth.ndim != 2:
        raise FedcoreError(
            f"truth has shape {tuple(truth.shape)} and found {tuple(found.shape)}; pass two "
            "batches (size, pixels)"
        )
    costs = (truth[:, None] - found[None]).square().mean(-1)
    _, order = linear_sum_assignment(costs.numpy())
    ordered = found[torch.from_numpy(order)]
    errors = (truth - ordered).square().mean(1)
    nearest = (ordered * levels).round() == (truth * levels).round()
    return Quality(
        mse=float(errors.mean()),
        psnr=sum(_psnr(error) for error in errors.tolist()) / len(errors),
        ssim=float(_similarity(truth, ordered).mean()),
        exact=float(nearest.all(1).double().mean()),
        pictures=ordered,
    )


def _psnr(error: float) -> float:
    return min(PSNR_CEILING, -10 * log10(error) if error else inf)


def _similarity(x: Tensor, y: Tensor) -> Tensor:
    """SSIM with one window, the picture, and the usual constants ``0.01^2``, ``0.03^2``."""
    one, two = 1e-4, 9e-4
    mx, my = x.mean(1), y.mean(1)
    vx, vy = x.var(1, correction=0), y.var(1, correction=0)
    both = ((x - mx[:, None]) * (y - my[:, None])).mean(1)
    light = (2 * mx * my + one) / (mx.square() + my.square() + one)
    return light * (2 * both + two) / (vx + vy + two)
