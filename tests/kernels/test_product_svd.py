from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedcore_kernels import KernelInputError, ProductSvd, backend, product_svd, rows
from tests.processes import ONE_THREAD
from tests.property.pairs import Pair, make_pair, pairs
from tests.reference.products import mean_product
from tests.reference.tolerance import assert_close, relative_error

# The module; the package exports a function of the same name.
BODY = import_module("fedcore_kernels.product_svd")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def product(found: ProductSvd) -> Tensor:
    return found.left.double().mT @ found.right.double()


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix.double())


@given(pairs(), st.integers(1, 8), st.sampled_from(["left", "balanced"]))
def test_equals_the_dense_decomposition(case: Pair, rank: int, split: str) -> None:
    arguments = case.left, case.right, case.weights, rank
    found = product_svd(*arguments, split=split)
    with backend("reference"):
        expected = product_svd(*arguments, split=split)
    largest = expected.values[:, :1]
    assert ((found.values - expected.values).abs() <= 1e-10 * largest).all()
    assert torch.equal(found.rank, expected.rank)
    assert found.left.shape == expected.left.shape
    assert found.right.shape == expected.right.shape
    assert ((found.tail - expected.tail).abs() <= 1e-10 * largest[:, 0]).all()
    # Where the cut separates equal values, any of their directions is right.
    unique = expected.gap > 1e-6
    error = norm(product(found) - product(expected)) * expected.gap
    assert (error <= 1e-11 * largest[:, 0])[unique].all()


@given(pairs(dtypes=DTYPES), st.integers(1, 8), st.sampled_from(["left", "balanced"]))
def test_the_error_is_that_of_eckart_and_young(case: Pair, rank: int, split: str) -> None:
    """And rows are orthogonal, zero beyond the rank, and of one sign."""
    found = product_svd(case.left, case.right, case.weights, rank, split=split)
    unit = torch.finfo(found.left.dtype).eps
    wide = 64 * unit * found.values[:, :1, None]
    mean = mean_product(case.left, case.right, case.shares)
    assert ((norm(mean - product(found)) - found.tail).abs() <= wide.flatten() * 4).all()
    rows_kept = torch.arange(found.left.shape[1]) < found.rank[:, None]
    kept = torch.where(rows_kept, found.values[:, : found.left.shape[1]], 0.0)
    size = kept if split == "balanced" else kept.square()
    left = found.left.double()
    assert ((left @ left.mT - torch.diag_embed(size)).abs() <= wide * (1 + kept[:, :1, None])).all()
    size = kept if split == "balanced" else rows_kept.double()
    right = found.right.double()
    assert ((right @ right.mT - torch.diag_embed(size)).abs() <= 64 * unit + wide).all()
    assert not left[~rows_kept].any()
    assert not right[~rows_kept].any()
    assert (left.gather(2, left.abs().argmax(2, keepdim=True)) >= 0).all()


@given(pairs())
def test_all_directions_are_exact(case: Pair) -> None:
    mean = mean_product(case.left, case.right, case.shares)
    for options in ({}, {"energy": 1.0}, {"split": "balanced"}):
        found = product_svd(case.left, case.right, case.weights, **options)
        assert (norm(mean - product(found)) <= 1e-11 * found.values[:, 0]).all()
        assert torch.equal(found.rank, torch.linalg.matrix_rank(mean, rtol=1e-12))


def test_the_gauge_of_each_client_has_no_effect() -> None:
    case = make_pair("random", 5, 3, 4, (31, 18), seed=0)
    turns = normal(1, 5, 3, 4, 4)
    left, right = turns.mT @ case.left, torch.linalg.inv(turns) @ case.right
    expected = product_svd(case.left, case.right, case.weights, 6)
    found = product_svd(left, right, case.weights, 6)
    assert relative_error(found.values, expected.values) < 1e-11
    for one, other in zip(found[:3], expected[:3], strict=True):
        assert relative_error(one, other) < 1e-9


@pytest.mark.parametrize("deviation", [1e-1, 1e-2, 1e-3, 1e-4])
def test_near_identical_clients_need_no_qr(
    deviation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their stacks have conditions up to 4e4, where the Gram of a stack has no Cholesky factor."""
    case = make_pair("random", 10, 2, 4, (256, 200), 0, deviation, torch.float32)
    arguments = case.left.double(), case.right.double(), case.weights, 16
    with backend("reference"):
        expected = product_svd(*arguments)
    monkeypatch.setattr(torch.linalg, "qr", None)
    found = product_svd(*arguments)
    eye = torch.eye(16, dtype=torch.float64).expand(2, 16, 16)
    assert norm(found.right @ found.right.mT - eye).max() < 1e-12
    assert ((found.values - expected.values).abs() <= 1e-13 * expected.values[:, :1]).all()
    assert abs(found.tail / expected.tail - 1).max() < 1e-13 / deviation**2


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8])
def test_ill_conditioned_factors_take_the_accurate_way(condition: float) -> None:
    """A Gram of condition 1e8 knows its smallest eigenvalue to 1e-8, one of 1e16 not at all."""
    case = make_pair("random", 3, 2, 4, (40, 50), seed=1, drift=1.0)
    scale = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), 4, dtype=torch.float64)
    mixing = torch.linalg.qr(normal(2, 3, 2, 4, 4)).Q
    # Long rows with a weak direction between them: no scaling of rows helps.
    left = mixing @ (scale[:, None] * torch.linalg.qr(case.left.mT).Q.mT)
    found = product_svd(left, case.right, case.weights)
    mean = mean_product(left, case.right, case.shares)
    assert (norm(mean - product(found)) <= 1e-13 * found.values[:, 0]).all()
    eye = torch.eye(12, dtype=torch.float64).expand(2, 12, 12)
    assert (found.rank == 12).all()
    outer = found.left / found.values[:, :, None]
    for basis in (outer, found.right):
        assert norm(basis @ basis.mT - eye).max() < 1e-12


def test_mixed_sides_of_the_core() -> None:
    """Stacks longer than one width, than both, and than neither."""
    for widths in ((9, 40), (40, 9), (9, 11), (40, 50), (24, 24)):
        case = make_pair("random", 6, 2, 4, widths, seed=3)
        found = product_svd(case.left, case.right, case.weights)
        assert found.values.shape == (2, min(24, *widths))
        mean = mean_product(case.left, case.right, case.shares)
        assert relative_error(product(found), mean) < 1e-13


def test_zero_modules_have_rank_zero_and_nothing_is_nan() -> None:
    case = make_pair("random", 3, 3, 2, (9, 12), seed=4)
    case.left[:, 1] = 0
    found = product_svd(case.left, case.right, case.weights, 4)
    assert found.rank.tolist() == [4, 0, 4]
    assert found.tail[1] == 0
    assert found.gap[1] == 1
    for field in found:
        assert not field[1].isnan().any()
    assert not found.left[1].any()
    assert not found.right[1].any()
    nothing = product_svd(0 * case.left, case.right, case.weights, energy=0.9)
    assert nothing.left.shape == (3, 0, 9)
    assert nothing.rank.tolist() == [0, 0, 0]
    assert not nothing.values.any()


@given(pairs(max_modules=2), st.floats(0.01, 1.0), st.floats(0.01, 1.0))
def test_the_energy_rule_is_minimal_and_monotone(case: Pair, one: float, other: float) -> None:
    low, high = sorted((one, other))
    few, many = (
        product_svd(case.left, case.right, case.weights, energy=energy) for energy in (low, high)
    )
    assert (few.rank <= many.rank).all()
    for energy, found in ((low, few), (high, many)):
        assert found.left.shape[1] == found.rank.max()
        for values, rank in zip(found.values, found.rank.tolist(), strict=True):
            energies = values.square()
            rest = (1 - energy) * energies.sum()
            assert energies[rank:].sum() <= rest + 1e-24 * energies.sum()
            if rank:
                assert energies[rank - 1 :].sum() > rest * (1 - 1e-12)
    capped = product_svd(case.left, case.right, case.weights, 2, energy=high)
    assert torch.equal(capped.rank, many.rank.clamp(max=2))


def test_energy_is_counted_without_rounding() -> None:
    eye = torch.eye(5, dtype=torch.float64)[None, None]
    # Four of five equal values hold 0.8 of the energy, though 0.8 is no binary number.
    assert product_svd(eye, eye, [1.0], energy=0.8).rank.tolist() == [4]
    assert product_svd(eye, eye, [1.0], energy=0.8 + 1e-9).rank.tolist() == [5]
    # A share below one unit in the last place is held by one direction, not by none.
    assert product_svd(eye, eye, [1.0], energy=1e-17).rank.tolist() == [1]


def test_energy_pads_to_the_module_of_the_largest_rank() -> None:
    left = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    left[0, 0] = torch.diag(torch.tensor([3.0, 1e-3, 1e-3]))
    left[0, 1] = torch.diag(torch.tensor([3.0, 2.0, 1e-3]))
    right = torch.eye(3, dtype=torch.float64).expand(1, 2, 3, 3)
    found = product_svd(left, right, [7], energy=0.9)
    assert found.rank.tolist() == [1, 2]
    expected = torch.tensor([[[3.0, 0, 0], [0, 0, 0]], [[3.0, 0, 0], [0, 2, 0]]]).double()
    assert torch.allclose(found.left, expected)
    assert torch.allclose(found.right, expected.sign())
    assert torch.allclose(found.tail, torch.tensor([2e-6, 1e-6]).double().sqrt())


def test_equal_singular_values_at_the_cut_are_reported() -> None:
    eye = torch.eye(4, dtype=torch.float64)[None, None]
    found = product_svd(eye, eye, [1], 2)
    assert found.gap.abs() < 1e-14
    assert abs(found.tail - 2**0.5) < 1e-14
    left = eye * torch.tensor([4.0, 3.0, 1.0, 0.0])
    assert torch.allclose(product_svd(left, eye, [1], 2).gap, torch.tensor(2 / 3).double())
    assert product_svd(left, eye, [1], 3).gap == 1


def test_one_client_returns_its_product_and_equal_clients_that_of_one() -> None:
    case = make_pair("random", 1, 2, 3, (20, 25), seed=5)
    expected = case.left[0].mT @ case.right[0]
    assert relative_error(product(product_svd(case.left, case.right, [0.3], 3)), expected) < 1e-14
    same = product_svd(
        case.left.expand(7, -1, -1, -1), case.right.expand(7, -1, -1, -1), range_of(7), 3
    )
    assert same.rank.tolist() == [3, 3]
    assert relative_error(product(same), expected) < 1e-14
    assert (same.tail < 1e-14 * same.values[:, 0]).all()


def range_of(count: int) -> list[float]:
    return [1.0 + n for n in range(count)]


def test_order_splitting_and_absence_of_clients_do_not_matter() -> None:
    case = make_pair("random", 4, 2, 3, (20, 25), seed=6)
    left, right, weights = case.left, case.right, case.weights
    expected = product(product_svd(left, right, weights, 5))
    order = torch.tensor([2, 0, 3, 1])
    halved = torch.cat([weights, weights[:1]])
    halved[[0, -1]] /= 2
    padded = torch.cat([weights, torch.zeros(1, dtype=torch.float64)])
    variants = [
        (left[order], right[order], weights[order]),
        (torch.cat([left, left[:1]]), torch.cat([right, right[:1]]), halved),
        (torch.cat([left, 1e6 * left[:1]]), torch.cat([right, right[:1]]), padded),
        (left, right, 1e9 * weights),
    ]
    for variant in variants:
        assert relative_error(product(product_svd(*variant, 5)), expected) < 1e-12
    lone = product_svd(left, right, [0, 0, 1, 0])
    assert relative_error(product(lone), left[2].mT @ right[2]) < 1e-13


@pytest.mark.parametrize("modules_a_copy", [1, 2, 3])
def test_results_do_not_depend_on_the_size_of_a_copy(
    modules_a_copy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_pair("random", 4, 7, 3, (20, 31), seed=7)
    calls: list[Callable[[], ProductSvd]] = [
        lambda: product_svd(case.left, case.right, case.weights, 5),
        lambda: product_svd(case.left, case.right, case.weights, energy=0.8),
    ]
    whole = [call() for call in calls]
    padding = 2 * rows._PADDING
    monkeypatch.setattr(rows, "CACHE_BYTES", modules_a_copy * 8 * 4 * 3 * (20 + 31 + padding))
    sizes = [part.stop - part.start for part, _ in rows.joint_copies(case.left, case.right)]
    assert max(sizes) == modules_a_copy
    for call, expected in zip(calls, whole, strict=True):
        for one, other in zip(call(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_single_precision_uploads_give_single_precision_factors() -> None:
    case = make_pair("random", 4, 2, 3, (40, 50), seed=8, dtype=torch.float32)
    found = product_svd(case.left, case.right, case.weights, 5)
    assert found.left.dtype == found.right.dtype == torch.float32
    assert found.values.dtype == found.tail.dtype == found.gap.dtype == torch.float64
    with backend("reference"):
        expected = product_svd(case.left, case.right, case.weights, 5)
    assert_close(product(found).float(), product(expected), 50)
    mixed = product_svd(case.left, case.right.double(), case.weights, 5)
    assert mixed.left.dtype == torch.float64


def test_arrays_are_accepted_and_left_as_they_were() -> None:
    left, right = np.ones((2, 1, 1, 3)), np.ones((2, 1, 1, 4))
    found = product_svd(left, right, [1, 1])
    assert abs(found.values[0, 0] - 12**0.5) < 1e-14
    assert (left == 1).all()
    case = make_pair("rank_deficient", 3, 2, 4, (40, 50), seed=9)
    root = case.shares.sqrt()
    copies = case.left.clone(), case.right.clone(), root.clone()
    BODY._torch_body(case.left, case.right, root, 4, None, False, 1e-12)
    for one, other in zip(copies, (case.left, case.right, root), strict=True):
        assert torch.equal(one, other)


MEMORY = """
import torch
from pathlib import Path
from fedcore_kernels import product_svd
import resource

def peak():
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

def data(modules, width):
    return [torch.empty(10, modules, 8, width).normal_() for _ in range(2)]

product_svd(*data(1, 256), torch.ones(10), {rank}, energy={energy})
left, right = data(8, 4096)
before = peak()
product_svd(left, right, torch.ones(10), {rank}, energy={energy})
print(peak() - before)
"""


@pytest.mark.parametrize(("rank", "energy"), [(8, None), (None, 0.1)])
def test_no_dense_product_is_ever_there(rank: int | None, energy: float | None) -> None:
    kernels = Path(__file__).parents[2] / "kernels"
    extra = subprocess.run(
        [sys.executable, "-c", MEMORY.format(rank=rank, energy=energy)],
        capture_output=True,
        text=True,
        check=True,
        # Freed blocks go back to the system, so that the peak is what was needed at once.
        env={
            "PYTHONPATH": str(kernels),
            **ONE_THREAD,
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
    ).stdout
    # One product takes 64 MiB in fp32 and 128 MiB in fp64; the uploads have 20 MiB.
    assert int(extra) < 32 << 20


PAIR = torch.ones(2, 3, 2, 8), torch.ones(2, 3, 2, 5)
BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: product_svd(PAIR[0][0], PAIR[1], [1, 1]), r"left has shape \(3, 2, 8\); pass \(N, L"),
    (lambda: product_svd(PAIR[0], PAIR[1][:1], [1, 1]), "right .*axis 0 must be 2, the clients of"),
    (lambda: product_svd(PAIR[0], PAIR[1][:, 1:], [1, 1]), "right .*axis 1 must be 3, the modules"),
    (lambda: product_svd(PAIR[0], PAIR[1][:, :, 1:], [1, 1]), "right .*axis 2 must be 2, the rank"),
    (lambda: product_svd(PAIR[0], PAIR[1].to("meta"), [1, 1]), "right is on meta and left on cpu"),
    (lambda: product_svd(PAIR[0].int(), PAIR[1], [1, 1]), "left has dtype torch.int32"),
    (lambda: product_svd(*PAIR, [1, 1], 0), "rank is 0; pass at least 1, or None"),
    (lambda: product_svd(*PAIR, [1, 1], energy=0.0), r"energy is 0.0; pass a share in \(0, 1\]"),
    (lambda: product_svd(*PAIR, [1, 1], energy=1.5), "energy is 1.5"),
    (lambda: product_svd(*PAIR, [1, 1], energy=float("nan")), "energy is nan"),
    (lambda: product_svd(*PAIR, [1, 1], split="right"), "split is 'right'; pass 'left' or"),  # type: ignore[arg-type]
    (lambda: product_svd(*PAIR, [1, 1], eps_rel=1.0), r"eps_rel is 1.0; pass a number in \[0, 1\)"),
    (lambda: product_svd(*PAIR, [1, -1]), r"weights\[1\] is -1.0"),
    (lambda: product_svd(*PAIR, [1]), r"weights has shape \(1,\); pass \(2,\)"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(KernelInputError, match=message):
        call()
