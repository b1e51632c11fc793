"""Triton body of the weighted mean."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.cuda.configurations import configuration
from fedcore_kernels.cuda.tasks import power_of_two_in
from fedcore_kernels.jit.weighted_mean import weighted_mean_kernel


def weighted_mean(updates: Tensor, shares: Tensor) -> Tensor:
    """The running mean of the rows of ``updates`` (N, P), each read once."""
    clients, columns = updates.shape
    dtype = checks.accumulator(updates.dtype)
    # Share of each client in the mean of those up to it: 1 for the first that counts, 0 for absent.
    steps = torch.where(shares > 0, shares / shares.cumsum(0), 0.0)
    mean = torch.empty(columns, dtype=dtype, device=updates.device)
    size = configuration("weighted_mean", updates.device, updates.dtype.itemsize * 8)
    weighted_mean_kernel[(-(-columns // size["block"]),)](
        updates,
        steps.to(updates.device, dtype),
        mean,
        updates.stride(0),
        clients,
        columns,
        BLOCK=size["block"],
        UNROLL=size["unroll"],
        WIDE=dtype == torch.float64,
        ALIGNMENT=power_of_two_in(updates.stride(0), columns),
        num_warps=size["warps"],
    )
    return mean
