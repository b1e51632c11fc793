"""``gram``, ``cross_gram`` and ``apply_cores``: one pass over the uploads each."""

from __future__ import annotations

from functools import partial

from bench.baselines.batched_stacks import batched_apply_cores, batched_cross_gram, batched_gram
from bench.baselines.eager_stacks import eager_apply_cores, eager_cross_gram, eager_gram
from bench.case import Case, Plan, one_operation
from bench.workloads import Setting, Workload
from fedcore_kernels import apply_cores, cross_gram, gram

LOOP, BATCHED = "loop over clients, modules", "batched torch"
DOUBLE = "batched torch in fp64, as ours"


def plans(setting: Setting) -> list[Plan]:
    """Each operation on the largest round's uploads in fp32."""
    workload = setting.rounds[-1]
    builders = {"gram": _gram, "cross_gram": _cross_gram, "apply_cores": _apply_cores}
    return [Plan(op, partial(build, workload, setting)) for op, build in builders.items()]


def _gram(workload: Workload, setting: Setting) -> Case:
    stack, weights, _ = workload.stacks(setting.device)
    shares = (weights / weights.sum()).to(setting.device)
    rows = workload.clients * workload.rank
    return one_operation(
        "gram",
        workload.shape,
        stack,
        lambda: gram(stack, weights),
        {
            LOOP: lambda: eager_gram(stack, shares),
            BATCHED: lambda: batched_gram(stack, shares),
            DOUBLE: lambda: batched_gram(stack.double(), shares.double()),
        },
        written=8 * workload.modules * rows**2,
        flops=2 * rows * stack.numel(),
    )


def _cross_gram(workload: Workload, setting: Setting) -> Case:
    stack, _, previous = workload.stacks(setting.device)
    return one_operation(
        "cross_gram",
        workload.shape,
        stack,
        lambda: cross_gram(stack, previous),
        {
            LOOP: lambda: eager_cross_gram(stack, previous),
            BATCHED: lambda: batched_cross_gram(stack, previous),
            DOUBLE: lambda: batched_cross_gram(stack.double(), previous.double()),
        },
        written=8 * workload.modules * workload.clients * workload.rank**2,
        flops=2 * workload.rank * stack.numel(),
    )


def _apply_cores(workload: Workload, setting: Setting) -> Case:
    stack, _, previous = workload.stacks(setting.device)
    cores = batched_cross_gram(stack, previous)
    return one_operation(
        "apply_cores",
        workload.shape,
        stack,
        lambda: apply_cores(cores, stack),
        {
            LOOP: lambda: eager_apply_cores(cores, stack),
            BATCHED: lambda: batched_apply_cores(cores, stack),
            DOUBLE: lambda: batched_apply_cores(cores.double(), stack.double()),
        },
        written=4 * previous.numel(),
        flops=2 * workload.rank * stack.numel(),
    )
