"""``align_and_average``: each client's factor rotated towards the last broadcast, then averaged."""

from __future__ import annotations

from functools import partial

from bench.baselines.eager_align import eager_align
from bench.case import Case, Plan, one_operation
from bench.workloads import Setting, Workload
from fedcore_kernels import align_and_average

# Nominal: SVD of an r x r matrix, its polar factor and the determinant of that.
_ROTATION_FLOPS = 24


def plans(setting: Setting) -> list[Plan]:
    """One factor of the largest round's uploads."""
    return [Plan("align_and_average", partial(_case, setting.rounds[-1], setting))]


def _case(workload: Workload, setting: Setting) -> Case:
    stack, weights, previous = workload.stacks(setting.device)
    shares = (weights / weights.sum()).to(setting.device)
    problems = workload.clients * workload.modules * workload.rank**3
    return one_operation(
        "align_and_average",
        workload.shape,
        stack,
        lambda: align_and_average([stack], [previous], weights),
        {"loop over clients, modules": lambda: eager_align(stack, previous, shares)},
        body="apply_cores",
        written=4 * previous.numel(),
        flops=4 * workload.rank * stack.numel() + _ROTATION_FLOPS * problems,
    )
