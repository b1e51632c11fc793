"""FedRot-LoRA's aggregation as a loop: rotate each client's factor to the reference, then average.

Written from the description in arXiv 2602.23638, for one factor of every module, rotations in
SO(r), in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def eager_align(stack: Tensor, reference: Tensor, shares: Tensor) -> Tensor:
    """``sum_n w_n O_n^T A_n`` (L, r, k) of stack (N, L, r, k), one module and client at a time."""
    means = []
    for module, before in enumerate(reference):
        mean = torch.zeros_like(before)
        for share, factor in zip(shares, stack[:, module], strict=True):
            left, _, right = torch.linalg.svd(factor @ before.T)
            if torch.linalg.det(left @ right) < 0:
                left[:, -1] *= -1
            mean += share * ((left @ right).T @ factor)
        means.append(mean)
    return torch.stack(means)
