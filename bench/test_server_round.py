"""``pytest bench --benchmark-only``: a server round and what it is measured against."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.baselines.published_florg import published_florg
from bench.workloads import LLAMA_2_7B, ROBERTA_LARGE, Workload
from fedcore_kernels import florg_round, nystrom_step, weighted_mean

WORKLOADS = pytest.mark.parametrize("workload", [ROBERTA_LARGE, LLAMA_2_7B], ids=lambda w: w.name)


@WORKLOADS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weighted_mean(benchmark: Any, workload: Workload, dtype: torch.dtype) -> None:
    updates, weights, _ = workload.data()
    updates = updates.to(dtype)
    benchmark.extra_info["bytes"] = updates.nbytes
    assert benchmark(weighted_mean, updates, weights).isfinite().all()


@WORKLOADS
def test_matrix_product(benchmark: Any, workload: Workload) -> None:
    updates, weights, _ = workload.data()
    shares = weights / weights.sum()
    benchmark.extra_info["bytes"] = updates.nbytes
    found = benchmark(torch.matmul, shares, updates)
    assert torch.allclose(found, weighted_mean(updates, weights), atol=1e-7)


@WORKLOADS
@pytest.mark.parametrize("variant", ["sketched", "truncated"])
def test_florg_round(benchmark: Any, workload: Workload, variant: str) -> None:
    updates, weights, previous = workload.data()
    benchmark.extra_info["bytes"] = updates.nbytes
    call = (florg_round, (updates, weights, previous, workload.layout, variant))
    found = benchmark.pedantic(*call, rounds=5, warmup_rounds=1)
    assert found.row.isfinite().all()


def test_published_step_of_one_module(benchmark: Any) -> None:
    workload = ROBERTA_LARGE
    updates, weights, previous = workload.data()
    (group,) = workload.layout.groups
    stack, before = group.view(updates), group.view(previous)
    found = benchmark.pedantic(published_florg, (stack[:, 0], weights, before[0]), rounds=3)
    ours = nystrom_step(stack[:, :1], weights, before[:1]).factor[0]
    assert (found - ours).norm() < 1e-4 * ours.norm()
