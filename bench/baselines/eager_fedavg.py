"""FedAvg over state dictionaries: a loop over clients and, inside it, over tensors.

This is how training scripts average adapters: ``mean[key] += share * upload[key]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def eager_fedavg(
    uploads: Sequence[dict[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """The weighted mean of every tensor, accumulated in fp32."""
    total = sum(weights)
    first = uploads[0]
    mean = {key: torch.zeros_like(value, dtype=torch.float32) for key, value in first.items()}
    for upload, weight in zip(uploads, weights, strict=True):
        for key, value in upload.items():
            mean[key] += (weight / total) * value
    return mean
