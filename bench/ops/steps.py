"""``nystrom_step`` and ``truncated_step``, FLoRG's two server steps, on the factors."""

from __future__ import annotations

from functools import partial
from itertools import islice

import torch

from bench.baselines.batched_florg import batched_sketched, batched_truncated
from bench.baselines.eager_florg import SVD_MODULES, eager_sketched, eager_truncated
from bench.case import Case, Other, Ours, Plan, few_modules
from bench.workloads import Setting, Workload, state_dicts
from fedcore_kernels import chosen_backend, nystrom_step, truncated_step

DTYPES = (torch.float32, torch.bfloat16)


def plans(setting: Setting) -> list[Plan]:
    """Both steps on the largest round's uploads, in fp32 and bf16."""
    workload = setting.rounds[-1]
    return [
        Plan(f"FLoRG steps {str(dtype)[6:]}", partial(_case, workload, setting, dtype))
        for dtype in DTYPES
    ]


def _case(workload: Workload, setting: Setting, dtype: torch.dtype) -> Case:
    updates, weights, row = workload.uploads(setting.device, dtype)
    (group,) = workload.layout.groups
    stack, previous = group.view(updates), group.view(row)
    states, (before,) = state_dicts(updates, group), state_dicts(row[None], group)
    counts, shares = weights.tolist(), (weights / weights.sum()).to(setting.device)
    rows = workload.clients * workload.rank
    few, said = few_modules(workload.modules, SVD_MODULES)
    part, share = dict(islice(before.items(), few)), few / workload.modules
    others = {
        "loop, sketched": Other(lambda: eager_sketched(states, counts, before)),
        "batched torch, sketched": Other(lambda: batched_sketched(stack, shares, previous)),
        f"loop, truncated{said}": Other(lambda: eager_truncated(states, counts, part), share),
        "batched torch, truncated": Other(lambda: batched_truncated(stack, shares, previous)),
    }
    names = tuple(others)
    moved = updates.nbytes + 2 * row.nbytes
    ours = {
        "nystrom_step": Ours(
            lambda: nystrom_step(stack, weights, previous),
            bytes=moved,
            flops=4 * workload.rank * stack.numel(),
            against=names[:2],
            backend=chosen_backend("nystrom_step", stack, previous),
        ),
        "truncated_step": Ours(
            lambda: truncated_step(stack, weights, previous, workload.rank),
            bytes=moved,
            flops=2 * rows * stack.numel() + 9 * workload.modules * rows**3,
            against=names[2:],
            backend=chosen_backend("truncated_step", stack, previous),
        ),
    }
    return Case(workload.shape, dtype, ours, others)
