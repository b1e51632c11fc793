"""A whole round of one workload, ours and as others compute it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from bench.baselines.batched_florg import batched_sketched, batched_truncated
from bench.baselines.eager_fedavg import eager_fedavg
from bench.baselines.eager_florg import SVD_MODULES, eager_sketched, eager_truncated
from bench.baselines.peft_weighted_adapter import peft_model, peft_weighted_adapter
from bench.baselines.published_florg import published_florg
from bench.case import Case, Other, Ours, few_modules
from bench.ops.products import client_factors, product_flops
from bench.workloads import Workload, state_dicts
from fedcore_kernels import chosen_backend, florg_round, product_svd, weighted_mean

MEAN, SKETCHED, TRUNCATED = "weighted_mean", "florg_round sketched", "florg_round truncated"


@dataclass(frozen=True)
class Operands:
    """A round's uploads and what its baselines need of them."""

    workload: Workload
    updates: Tensor
    weights: Tensor
    row: Tensor

    @property
    def stack(self) -> Tensor:
        """(N, L, r, k), a view of the updates."""
        return self.workload.layout.groups[0].view(self.updates)

    @property
    def previous(self) -> Tensor:
        """(L, r, k), a view of the row."""
        return self.workload.layout.groups[0].view(self.row)

    @property
    def shares(self) -> Tensor:
        """(N,) fp32 on the device of the updates."""
        return (self.weights / self.weights.sum()).to(self.updates.device)


Others = dict[str, tuple[str, Other]]
"""By operation of ours: the name of the other and what it runs."""


def _mean(operands: Operands) -> Others:
    mean = Other(partial(weighted_mean, operands.updates, operands.weights))
    return dict.fromkeys((SKETCHED, TRUNCATED), (MEAN, mean))


def _batched(operands: Operands) -> Others:
    shares, updates = operands.shares.to(operands.updates.dtype), operands.updates
    stack = operands.stack, operands.shares, operands.previous
    return {
        MEAN: ("batched torch, weights @ updates", Other(lambda: shares @ updates)),
        SKETCHED: ("batched torch, sketched", Other(partial(batched_sketched, *stack))),
        TRUNCATED: ("batched torch, truncated", Other(partial(batched_truncated, *stack))),
    }


def _eager(operands: Operands) -> Others:
    group, counts = operands.workload.layout.groups[0], operands.weights.tolist()
    uploads = state_dicts(operands.updates, group)
    (before,) = state_dicts(operands.row[None], group)
    few, said = few_modules(len(before), SVD_MODULES)
    part = dict(islice(before.items(), few))
    return {
        MEAN: ("eager loop, FedAvg", Other(lambda: eager_fedavg(uploads, counts))),
        SKETCHED: (
            "eager loop, sketched",
            Other(lambda: eager_sketched(uploads, counts, before)),
        ),
        TRUNCATED: (
            f"eager loop, truncated{said}",
            Other(lambda: eager_truncated(uploads, counts, part), few / len(before)),
        ),
    }


def _published(operands: Operands) -> Others:
    if operands.updates.dtype != torch.float32:
        # It decomposes in the dtype of the uploads, and torch decomposes no 16-bit matrices.
        return {}
    modules = operands.workload.modules
    few, said = few_modules(modules, 3 if operands.workload.width <= 1024 else 1)
    stack, shares, previous = operands.stack, operands.shares, operands.previous

    def step() -> list[Tensor]:
        return [published_florg(stack[:, i], shares, previous[i]) for i in range(few)]

    other = Other(step, few / modules)
    return dict.fromkeys((SKETCHED, TRUNCATED), (f"published step{said}", other))


OTHERS: dict[str, Callable[[Operands], Others]] = {
    "published": _published,
    "eager": _eager,
    "batched": _batched,
    "mean": _mean,
}


def our_rounds(operands: Operands) -> dict[str, Ours]:
    """FedAvg and both FLoRG rounds, compared with nothing yet."""
    workload, stack = operands.workload, operands.stack
    updates, weights, row = operands.updates, operands.weights, operands.row
    layout, rows = workload.layout, workload.clients * workload.rank
    moved = updates.nbytes + row.nbytes
    return {
        MEAN: Ours(
            lambda: weighted_mean(updates, weights),
            bytes=moved,
            flops=3 * stack.numel(),
            against=(),
            backend=chosen_backend("weighted_mean", updates),
        ),
        SKETCHED: Ours(
            lambda: florg_round(updates, weights, row, layout, "sketched"),
            bytes=moved + row.nbytes,
            flops=4 * workload.rank * stack.numel(),
            against=(),
            backend=chosen_backend("nystrom_step", stack),
        ),
        TRUNCATED: Ours(
            lambda: florg_round(updates, weights, row, layout, "truncated"),
            bytes=moved + row.nbytes,
            flops=2 * rows * stack.numel() + 9 * workload.modules * rows**3,
            against=(),
            backend=chosen_backend("truncated_step", stack),
        ),
    }


def florg_case(
    workload: Workload, device: torch.device, dtype: torch.dtype, against: Sequence[str]
) -> Case:
    """FedAvg and both FLoRG rounds against what is named; one without an other is left out.

    ``against`` holds keys of :data:`OTHERS`.
    """
    operands = Operands(workload, *workload.uploads(device, dtype))
    baselines = [OTHERS[name](operands) for name in against]
    compared: dict[str, Ours] = {}
    others: dict[str, Other] = {}
    for op, ours in our_rounds(operands).items():
        named = dict(other[op] for other in baselines if op in other)
        if named:
            compared[op] = replace(ours, against=tuple(named))
            others |= named
    # The mean is timed once, be it one of ours, an other, or both.
    others = {name: other for name, other in others.items() if name not in compared}
    return Case(workload.shape, dtype, compared, others)


def product_case(workload: Workload, device: torch.device) -> Case:
    """The best rank-r adapters of all modules, A and B, against PEFT's merge of one module."""
    sizes = (workload.clients, workload.modules, workload.rank, workload.width)
    left, right, weights = client_factors(*sizes, device)
    model, counts = peft_model(left[:, 0], right[:, 0]), weights.tolist()
    name = f"PEFT add_weighted_adapter svd{few_modules(workload.modules, 1)[1]}"
    ours = Ours(
        lambda: product_svd(left, right, weights, workload.rank),
        bytes=left.nbytes + right.nbytes + 2 * left[0].nbytes,
        flops=product_flops(*sizes),
        against=(name,),
        backend=chosen_backend("product_svd", left, right),
    )
    other = Other(lambda: peft_weighted_adapter(model, counts, workload.rank), 1 / workload.modules)
    return Case(f"{workload.shape}, A and B", left.dtype, {"product_svd": ours}, {name: other})
