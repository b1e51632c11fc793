"""``weighted_mean`` in the dtypes in which uploads travel."""

from __future__ import annotations

from functools import partial

import torch

from bench.case import Case, Plan, one_operation
from bench.limits import plain_read
from bench.timing import Call
from bench.workloads import Setting, Workload
from fedcore_kernels import weighted_mean

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plans(setting: Setting) -> list[Plan]:
    """The largest round's uploads; 16-bit uploads are measured against fp32 ones as well."""
    workload = setting.rounds[-1]
    return [
        Plan(f"weighted_mean {str(dtype)[6:]}", partial(_case, workload, setting, dtype))
        for dtype in DTYPES
    ]


def _case(workload: Workload, setting: Setting, dtype: torch.dtype) -> Case:
    updates, weights, _ = workload.uploads(setting.device, dtype)
    shares = (weights / weights.sum()).to(updates)
    others: dict[str, Call] = {
        "weights @ updates": lambda: shares @ updates,
        "plain read": lambda: plain_read(updates),
    }
    if dtype != torch.float32:
        wide = updates.float()
        others["weighted_mean float32"] = lambda: weighted_mean(wide, weights)
    return one_operation(
        "weighted_mean",
        workload.shape,
        updates,
        lambda: weighted_mean(updates, weights),
        others,
        written=4 * updates.shape[1],
        flops=3 * updates.numel(),
    )
