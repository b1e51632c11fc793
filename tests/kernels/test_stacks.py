from __future__ import annotations

import torch
from hypothesis import given

from fedcore_kernels import apply_cores, backend, cross_gram, gram
from fedcore_kernels.stacks import _gram_body
from tests.property.stacks import Round, make_round, rounds
from tests.reference.tolerance import assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@given(rounds(dtypes=DTYPES))
def test_gram_is_the_dual_gram_in_double_precision(case: Round) -> None:
    for weights in (case.weights, None):
        found = gram(case.stack, weights)
        with backend("reference"):
            expected = gram(case.stack, weights)
        assert found.dtype == torch.float64
        assert_close(found, expected, case.stack.shape[-1])
        assert torch.allclose(found, found.mT, rtol=0, atol=1e-12 * found.abs().max().item())


@given(rounds(dtypes=DTYPES))
def test_cross_gram_is_reference_times_each_client(case: Round) -> None:
    with backend("reference"):
        expected = cross_gram(case.stack, case.previous)
    found = cross_gram(case.stack, case.previous)
    assert found.dtype == torch.float64
    assert_close(found, expected, case.stack.shape[-1])


@given(rounds(dtypes=DTYPES))
def test_apply_cores_is_the_sum_over_clients(case: Round) -> None:
    clients, modules, rank, _ = case.stack.shape
    cores = torch.randn(modules, 3, clients, rank, generator=torch.Generator().manual_seed(1))
    with backend("reference"):
        expected = apply_cores(cores, case.stack)
    assert_close(apply_cores(cores, case.stack), expected, clients * rank)


def test_modules_of_several_working_copies_come_out_in_order() -> None:
    case = make_round("strided", 9, 40, 4, 513, seed=2, dtype=torch.float32)
    with backend("reference"):
        expected = gram(case.stack), cross_gram(case.stack, case.previous)
        cores = torch.randn(40, 4, 9, 4)
        applied = apply_cores(cores, case.stack)
    assert_close(gram(case.stack), expected[0], 513)
    assert_close(cross_gram(case.stack, case.previous), expected[1], 513)
    assert_close(apply_cores(cores, case.stack), applied, 36)


def test_hundreds_of_clients() -> None:
    case = make_round("random", 300, 1, 1, 17, seed=0)
    with backend("reference"):
        expected = gram(case.stack, case.weights)
    assert_close(gram(case.stack, case.weights), expected, 17)


def test_fp32_uploads_lose_nothing_to_squaring() -> None:
    """Client differences of 1e-4: fp32 Grams read their distance as zero."""
    random = torch.Generator().manual_seed(0)
    one = torch.randn(1, 1, 1, 1024, generator=random)
    two = one + 1e-4 * torch.randn(1, 1, 1, 1024, generator=random)
    g = gram(torch.cat([one, two]))[0]
    distance = g[0, 0] - 2 * g[0, 1] + g[1, 1]
    assert abs(distance / (one - two).double().square().sum() - 1) < 1e-6


def test_no_setting_of_matrix_products_changes_the_bits() -> None:
    case = make_round("random", 5, 2, 3, 65, seed=4, dtype=torch.float32)
    before = gram(case.stack, case.weights), cross_gram(case.stack, case.previous)
    allowed = torch.backends.cuda.matmul.allow_tf32
    precision = torch.get_float32_matmul_precision()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            after = gram(case.stack, case.weights), cross_gram(case.stack, case.previous)
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.matmul.allow_tf32 = allowed
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_the_body_does_not_touch_its_arguments() -> None:
    case = make_round("random", 3, 2, 2, 9, seed=1)
    root = case.shares.sqrt()
    copies = case.stack.clone(), root.clone()
    _gram_body(case.stack, root)
    assert torch.equal(case.stack, copies[0])
    assert torch.equal(root, copies[1])
