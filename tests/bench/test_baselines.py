"""What we are measured against computes the same as our operations."""

from __future__ import annotations

import pytest
import torch

from bench.baselines.batched_florg import batched_sketched, batched_truncated
from bench.baselines.batched_procrustes import batched_polar, batched_procrustes
from bench.baselines.batched_stacks import batched_apply_cores, batched_cross_gram, batched_gram
from bench.baselines.dense_svd import dense_svd
from bench.baselines.eager_align import eager_align
from bench.baselines.eager_fedavg import eager_fedavg
from bench.baselines.eager_florg import eager_sketched, eager_truncated
from bench.baselines.eager_stacks import eager_apply_cores, eager_cross_gram, eager_gram
from bench.baselines.looped_transport import looped_transport
from bench.baselines.peft_weighted_adapter import peft_model, peft_weighted_adapter
from bench.baselines.published_florg import published_florg
from bench.baselines.scipy_procrustes import scipy_polar, scipy_procrustes
from bench.ops.products import client_factors
from bench.workloads import Workload, state_dicts
from fedcore.methods.tri.ce_lora.class_mixtures import read_class_mixtures
from fedcore.methods.tri.ce_lora.similarity import client_distances
from fedcore_kernels import (
    align_and_average,
    apply_cores,
    cross_gram,
    gram,
    nystrom_step,
    polar,
    procrustes,
    product_svd,
    truncated_step,
    weighted_mean,
)
from tests.property.mixtures import random_statistics
from tests.reference.tolerance import assert_close

CPU = torch.device("cpu")
WORKLOAD = Workload("tiny", modules=3, width=48, rank=2, clients=5)


@pytest.fixture(scope="module")
def operands():
    stack, weights, previous = WORKLOAD.stacks(CPU)
    return stack, weights, previous, weights / weights.sum()


@pytest.fixture(scope="module")
def dictionaries():
    updates, weights, row = WORKLOAD.uploads(CPU)
    (group,) = WORKLOAD.layout.groups
    return state_dicts(updates, group), weights.tolist(), state_dicts(row[None], group)[0]


def test_state_dicts_hold_the_uploads(operands, dictionaries):
    stack, _, previous, _ = operands
    states, _, before = dictionaries
    found = torch.stack([torch.stack(list(state.values())) for state in states])
    assert torch.equal(found, stack)
    assert torch.equal(torch.stack(list(before.values())), previous)


def test_eager_fedavg(operands, dictionaries):
    stack, weights, _, _ = operands
    states, counts, _ = dictionaries
    found = torch.stack(list(eager_fedavg(states, counts).values()))
    expected = weighted_mean(stack.double().flatten(1), weights).reshape(found.shape)
    assert_close(found, expected, len(states))


@pytest.mark.parametrize("baseline", [eager_gram, batched_gram])
def test_gram(baseline, operands):
    stack, weights, _, shares = operands
    assert_close(baseline(stack, shares), gram(stack.double(), weights), WORKLOAD.width)


@pytest.mark.parametrize("baseline", [eager_cross_gram, batched_cross_gram])
def test_cross_gram(baseline, operands):
    stack, _, previous, _ = operands
    assert_close(baseline(stack, previous), cross_gram(stack, previous), WORKLOAD.width)


@pytest.mark.parametrize("baseline", [eager_apply_cores, batched_apply_cores])
def test_apply_cores(baseline, operands):
    stack, _, previous, _ = operands
    cores = cross_gram(stack, previous).float()
    expected = apply_cores(cores.double(), stack.double())
    assert_close(baseline(cores, stack), expected, WORKLOAD.clients * WORKLOAD.rank)


def steps(operands):
    stack, weights, previous, _ = operands
    wide = stack.double(), weights, previous.double()
    sketched = nystrom_step(*wide).factor
    return sketched, truncated_step(*wide, WORKLOAD.rank).factor


def test_published_florg(operands):
    stack, _, previous, shares = operands
    found = [published_florg(stack[:, i], shares, previous[i]) for i in range(len(previous))]
    assert_close(torch.stack(found), steps(operands)[0], WORKLOAD.width)


def test_batched_florg(operands):
    stack, _, previous, shares = operands
    sketched, truncated = steps(operands)
    for found, expected in (
        (batched_sketched(stack, shares, previous), sketched),
        (batched_truncated(stack, shares, previous), truncated),
    ):
        assert_close(found, expected, WORKLOAD.width)


def test_eager_florg(operands, dictionaries):
    for baseline, expected in zip((eager_sketched, eager_truncated), steps(operands), strict=True):
        found = torch.stack(list(baseline(*dictionaries).values()))
        assert_close(found, expected, WORKLOAD.width)


def test_the_two_steps_differ_by_more_than_is_allowed(operands):
    sketched, truncated = steps(operands)
    with pytest.raises(AssertionError):
        assert_close(sketched.float(), truncated, WORKLOAD.width)


def test_eager_align(operands):
    stack, weights, previous, shares = operands
    # Turned and reflected, so that a rotation has something to do.
    turned = stack.clone()
    turned[0], turned[1] = stack[0].flip(1), -stack[1]
    expected = align_and_average([turned.double()], [previous.double()], weights).factors[0]
    assert (expected - turned.double().mean(0)).norm() > 0.1 * expected.norm()
    assert_close(eager_align(turned, previous, shares), expected, WORKLOAD.width, condition=10.0)


@pytest.fixture(scope="module")
def squares():
    random = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, 5, 5, generator=random, dtype=torch.float64)


def test_polar_baselines(squares):
    matrices = squares[0]
    expected = polar(matrices).factor
    assert_close(torch.from_numpy(scipy_polar(matrices.numpy())), expected, 5, condition=10.0)
    assert_close(batched_polar(matrices), expected, 5, condition=10.0)


def test_procrustes_baselines(squares):
    sources, targets = squares
    expected = procrustes(sources, targets)
    found = scipy_procrustes(sources.numpy(), targets.numpy())
    assert_close(torch.from_numpy(found), expected, 5, condition=10.0)
    assert_close(batched_procrustes(sources, targets), expected, 5, condition=10.0)


def test_dense_and_peft_merges():
    rank, width = 3, 24
    left, right, weights = client_factors(4, 2, rank, width, CPU)
    found = product_svd(left.double(), right.double(), weights, rank)
    expected = found.left.mT @ found.right
    outer, inner = dense_svd(left, right, weights / weights.sum(), rank)
    assert_close(outer.mT @ inner, expected, width, condition=10.0)
    model = peft_model(left[:, 1], right[:, 1])
    for _ in range(2):
        b, a = peft_weighted_adapter(model, weights.tolist(), rank)
        assert_close(b.T @ a, expected[1], width, condition=10.0)


def test_looped_transport():
    told = [random_statistics(n, classes=2 + n, components=1 + n % 3) for n in range(4)]
    clients = [read_class_mixtures(one, f"c{n}") for n, one in enumerate(told)]
    expected = torch.from_numpy(client_distances(clients))
    assert_close(torch.from_numpy(looped_transport(clients)), expected, 5)
    # Row by row of the upper half: the first pairs are those of the first client.
    part = torch.from_numpy(looped_transport(clients, 2))
    assert_close(part[0, :3], expected[0, :3], 5)
    assert not part[1:, 1:].any()
    assert part[0, 3] == 0
