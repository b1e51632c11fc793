"""A stack larger than one working copy gives what one copy of everything would."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

import fedcore_kernels as ops
from fedcore_kernels import rows, weighted_mean

# The module; the package exports a function of the same name.
MEAN = import_module("fedcore_kernels.weighted_mean")

CALLS = {
    "gram": lambda stack, weights, previous: (ops.gram(stack, weights),),
    "cross_gram": lambda stack, weights, previous: (ops.cross_gram(stack, previous),),
    "sketched": lambda stack, weights, previous: ops.nystrom_step(stack, weights, previous),
    "truncated": lambda stack, weights, previous: ops.truncated_step(stack, weights, previous, 3),
}


@pytest.mark.parametrize("modules_a_copy", [1, 2, 3])
@pytest.mark.parametrize("name", CALLS)
def test_results_do_not_depend_on_the_size_of_a_copy(name, modules_a_copy, monkeypatch):
    random = torch.Generator().manual_seed(0)
    clients, modules, rank, width = 4, 7, 3, 20
    previous = torch.randn(modules, rank, width, generator=random, dtype=torch.float64)
    drift = torch.randn(clients, modules, rank, width, generator=random, dtype=torch.float64)
    stack, weights = previous + 0.3 * drift, torch.tensor([1.0, 2.0, 3.0, 1.0])
    whole = CALLS[name](stack, weights, previous)
    module_bytes = 8 * clients * rank * (width + rows._PADDING)
    monkeypatch.setattr(rows, "CACHE_BYTES", modules_a_copy * module_bytes)
    sizes = [part.stop - part.start for part, _ in rows.working_copies(stack)]
    assert max(sizes) == modules_a_copy
    assert sum(sizes) == modules
    for one, other in zip(whole, CALLS[name](stack, weights, previous), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_does_not_depend_on_the_size_of_a_block(dtype, monkeypatch):
    random = torch.Generator().manual_seed(0)
    updates = torch.randn(37, 101, generator=random).to(dtype)
    weights = torch.rand(37, generator=random)
    whole = weighted_mean(updates, weights)
    monkeypatch.setattr(MEAN, "_COLUMNS", 8)
    monkeypatch.setattr(MEAN, "_CONVERTED_COLUMNS", 8)
    monkeypatch.setattr(MEAN, "_CONVERTED_ROWS", 5)
    assert torch.equal(weighted_mean(updates, weights), whole)
