"""Polar factors and Procrustes problems: by products where that is proven, by Jacobi elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fedcore_kernels import backend, chosen_backend, procrustes
from fedcore_kernels import polar as polar_op
from fedcore_kernels.cuda import polar as launchers
from fedcore_kernels.cuda.spectra import SWEEPS
from fedcore_kernels.jit.jacobi import identity
from fedcore_kernels.jit.polar import determinant_sign, polar_by_svd
from fedcore_kernels.quintics import quintics, value
from tests.reference.tolerance import assert_close, tolerance

# Branches that a card computes and masks, NumPy warns about in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = (torch.float32, torch.float64)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(seed: int, rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(normal(seed, rows, columns)).Q


def with_values(seed: int, p: int, q: int, values: Tensor) -> Tensor:
    size = min(p, q)
    return (orthonormal(seed, p, size) * values.double()) @ orthonormal(seed + 50, q, size).mT


def thin_gram(factor: Tensor) -> Tensor:
    wide = factor.double()
    return wide.mT @ wide if factor.shape[-2] >= factor.shape[-1] else wide @ wide.mT


class Unlaunched:
    """Stands for a kernel that is never reached."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: None


@pytest.fixture
def products_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices that the first launch does not settle keep the rank -1."""
    monkeypatch.setattr(launchers, "polar_jacobi_kernel", Unlaunched())


@pytest.mark.parametrize(("lower", "steps"), [(1e-2, 6), (1e-4, 9), (2.0**-4, 4), (2.0**-1, 3)])
@pytest.mark.parametrize("eps", [2.0**-23, 2.0**-52])
def test_quintics_carry_an_interval_to_one_and_nothing_from_far_below(
    lower: float, steps: int, eps: float
) -> None:
    found = quintics(lower, 4 * eps)
    inside, below = np.geomspace(lower, 1.0, 20_001), np.linspace(0, lower / 4, 2_001)
    noisy = inside.copy()
    for quintic in found:
        inside, below = value(quintic, inside), value(quintic, below)
        noisy = value(quintic, noisy * (1 + 1e-6 * np.sign(noisy - 1)))
    assert np.abs(1 - inside).max() <= 6 * eps
    assert np.abs(1 - noisy).max() <= 2e-6
    assert below.max() < 1 - 3e-3
    assert (np.diff(below) > 0).all()
    assert len(found) <= steps + (eps < 1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "q"), [(1, 1), (3, 3), (8, 8), (16, 16), (12, 5), (3, 16), (32, 32)])
def test_regular_matrices_are_settled_by_products(
    products_only: None, dtype: torch.dtype, p: int, q: int, device: torch.device
) -> None:
    """As accurate as a decomposition at every condition, above all for a small one."""
    size = min(p, q)
    spectra = [torch.logspace(0, -k, size) for k in ((0, 1, 2, 3) if size < 32 else (1,))]
    matrix = torch.stack([with_values(i, p, q, s) for i, s in enumerate(spectra)])
    given = matrix.to(device, dtype)
    with backend("triton"):
        factor, rank = polar_op(given)
    assert factor.dtype == dtype
    assert rank.tolist() == [size] * len(spectra)
    eye = torch.eye(size, dtype=torch.float64, device=device)
    stretch = factor.mT @ given if p >= q else given @ factor.mT
    left, _, right = torch.linalg.svd(given.double(), full_matrices=False)
    for i in range(len(spectra)):
        condition = float(spectra[i][0] / spectra[i][-1])
        assert_close(thin_gram(factor)[i].to(dtype), eye, max(p, q))
        assert_close(stretch[i], stretch[i].mT, max(p, q), condition=condition)
        assert torch.linalg.eigvalsh(stretch[i].double() + stretch[i].double().mT).min() > -1e-5
        assert_close(factor[i], left[i] @ right[i], 1, condition=condition)


def test_what_is_not_provably_regular_is_left_to_the_second_launch(
    products_only: None, device: torch.device
) -> None:
    """Below the bound, at the cut-off, not finite; and a cut-off too high for any proof."""
    values = torch.ones(5, 3)
    values[1, 2], values[2, 2] = 1e-3, 1e-6
    matrix = torch.stack([with_values(i, 4, 3, v) for i, v in enumerate(values)])
    matrix[3] = 0
    matrix[4, 1, 1] = float("nan")
    given = matrix.to(device, torch.float32)
    with backend("triton"):
        assert polar_op(given).rank.tolist() == [3, 3, -1, -1, -1]
        assert polar_op(given, cutoff=2e-3).rank.tolist() == [3, -1, -1, -1, -1]
        assert polar_op(given, cutoff=0.3).rank.tolist() == [-1] * 5


@pytest.mark.parametrize("cutoff", [0.0, 2e-3, 1e-2, 0.05, 0.2, 0.6])
def test_the_cutoff_is_sharp_on_either_way(cutoff: float, device: torch.device) -> None:
    near = max(cutoff, 1e-3)
    values = torch.stack([torch.tensor([1.0, 1.0, near * s]) for s in (0.99, 1.01, 1.5, 8.0)])
    values = values.clamp(max=1.0)
    matrix = torch.stack([with_values(i, 3, 3, v) for i, v in enumerate(values)])
    with backend("triton"):
        factor, rank = polar_op(matrix.to(device), cutoff)
    kept = values.double() > cutoff
    assert rank.tolist() == kept.sum(1).tolist()
    for i, keep in enumerate(kept):
        expected = with_values(i, 3, 3, keep)
        assert_close(factor[i].cpu(), expected, 3, condition=1 / near)


@pytest.mark.parametrize("dtype", DTYPES)
def test_null_directions_are_zero_and_missing_from_the_rank(
    dtype: torch.dtype, device: torch.device
) -> None:
    values = torch.tensor(
        [[3.0, 1.0, 0, 0, 0], [1, 1, 1, 1, 1e-9], [0, 0, 0, 0, 0], [2, 0, 0, 0, 0]]
    )
    for p, q in ((5, 5), (9, 5), (5, 12)):
        matrix = torch.stack([with_values(i, p, q, v) for i, v in enumerate(values)])
        kept = values > (0 if dtype == torch.float64 else 1e-7)
        with backend("triton"):
            factor, rank = polar_op(matrix.to(device, dtype), cutoff=1e-12)
        assert factor.dtype == dtype
        assert rank.tolist() == kept.sum(1).tolist()
        for i, keep in enumerate(kept):
            expected = with_values(i, p, q, keep.double())
            # A direction at round-off of fp32 is counted out; in fp64 it is known to 1e-7.
            condition = 1e9 if dtype == torch.float64 and i == 1 else 5
            assert_close(factor[i].cpu(), expected, max(p, q), condition=condition)


def test_batches_with_both_kinds_of_matrices_agree_with_the_definition(
    device: torch.device,
) -> None:
    """37 strided matrices, some of a program settled by products and some not."""
    matrix = normal(0, 3, 74, 3).transpose(0, 1)[::2].clone()
    matrix[5::7, :, 2] = matrix[5::7, :, 0]
    matrix[9] *= 1e-30
    given = matrix.float().to(device).mT
    assert not given.is_contiguous()
    with backend("triton"):
        factor, rank = polar_op(given)
        folded = polar_op(given[:36].unflatten(0, (3, 12)))
    with backend("reference"):
        expected = polar_op(given.cpu())
    assert rank.tolist() == expected.rank.tolist()
    assert set(rank.tolist()) == {2, 3}
    for i, one in enumerate(factor.cpu()):
        kept = torch.linalg.svdvals(given[i].double())[: rank[i]]
        assert_close(one, expected.factor[i], 3, condition=float(kept[0] / kept[-1]))
    assert torch.equal(folded.factor.flatten(0, 1), factor[:36])
    assert folded.rank.shape == (3, 12)


def test_no_matrix_feels_its_neighbours(device: torch.device) -> None:
    """Two a program: one settled by the first attempt beside one by the second, or by neither."""
    spectra = torch.tensor(
        [[1.0, 0.6, 0.4, 0.3], [1, 0.5, 0.1, 1e-3], [1, 0.6, 0.5, 0.3], [1, 1, 0, 0]]
    )
    matrix = torch.stack([with_values(i, 4, 4, v) for i, v in enumerate(spectra)]).to(device)
    for dtype in DTYPES:
        given = matrix.to(dtype)
        with backend("triton"):
            together = polar_op(given).factor
            turned = procrustes(given.mT, torch.eye(4, device=device, dtype=dtype), True)
            for i, one in enumerate(given):
                assert torch.equal(together[i], polar_op(one).factor)
                alone = procrustes(one.mT, torch.eye(4, device=device, dtype=dtype), True)
                assert torch.equal(turned[i], alone)


def test_half_precision_is_computed_in_fp32_with_its_own_cutoff(device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        given = normal(1, 4, 6, 6).to(device, dtype)
        with backend("triton"):
            factor, rank = polar_op(given)
        with backend("reference"):
            expected = polar_op(given.cpu())
        assert factor.dtype == torch.float32
        assert rank.tolist() == expected.rank.tolist()
        assert_close(factor.cpu(), expected.factor, 6, condition=1 / torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_regularisation_is_a_share_of_the_norm(dtype: torch.dtype, device: torch.device) -> None:
    """Not a power of two, so that a share rounded to fp32 would show in fp64."""
    given = normal(3, 3, 4, 4).to(device, dtype)
    given[2] = torch.diag(torch.tensor([2.0, 0, 0, 0]))
    with backend("triton"):
        factor, rank = polar_op(given, regularisation=0.1)
    with backend("reference"):
        expected = polar_op(given.cpu(), regularisation=0.1)
    assert rank.tolist() == [4, 4, 4]
    shifts = 0.1 * torch.linalg.matrix_norm(given.double(), keepdim=True)
    condition = torch.linalg.cond(given.double() + shifts * torch.eye(4, device=device)).max()
    assert_close(factor.cpu(), expected.factor, 1, condition=float(condition))
    assert_close(factor[2].cpu(), torch.eye(4), 4)


def gain(isometry: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The inner product that the isometry maximises."""
    return ((isometry.double() @ source.double()) * target.double()).sum((-2, -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("p", "q", "rotation"), [(4, 4, False), (4, 4, True), (3, 5, False), (5, 3, False)]
)
def test_procrustes_agrees_with_the_definition(
    dtype: torch.dtype, p: int, q: int, rotation: bool, device: torch.device
) -> None:
    source, target = normal(4, 6, p, 9).to(device, dtype), normal(5, 6, q, 9).to(device, dtype)
    with backend("triton"):
        found = procrustes(source, target, rotation)
    with backend("reference"):
        expected = procrustes(source.cpu(), target.cpu(), rotation)
    assert found.dtype == dtype
    condition = torch.linalg.cond(target.double() @ source.double().mT).max()
    # Rounding to fp32 is all that an fp32 result loses.
    lost = float(condition) if dtype == torch.float64 else 1.0
    assert_close(found.cpu(), expected, 9, condition=lost)
    assert_close(
        thin_gram(found).to(dtype), torch.eye(min(p, q), device=device).expand(6, -1, -1), p
    )
    if p == q:
        signs = torch.linalg.det(found.double()).sign()
        assert (signs == 1).all() == rotation


@pytest.mark.parametrize("rotation", [False, True])
def test_procrustes_completes_null_directions_to_an_isometry(
    rotation: bool, device: torch.device
) -> None:
    source, target = normal(6, 5, 4, 9), normal(7, 5, 4, 9)
    source[0, 3], source[1, 2:], source[2] = 0, 0, 0
    target[3, 1] = target[3, 0]
    given = source.to(device), target.to(device)
    with backend("triton"):
        found = procrustes(*given, rotation)
        wide = procrustes(given[0], given[1][:, :3])
    with backend("reference"):
        best = gain(procrustes(source, target, rotation), source, target)
    for isometry in (found, wide):
        eye = torch.eye(min(isometry.shape[-2:]), dtype=torch.float64, device=device)
        assert_close(thin_gram(isometry), eye.expand(5, -1, -1), 4)
    assert_close(gain(found.cpu(), source, target), best, 9)
    if rotation:
        assert_close(torch.linalg.det(found).cpu(), torch.ones(5, dtype=torch.float64), 4)


@pytest.mark.parametrize("size", [3, 4, 5])
def test_a_direction_of_almost_nothing_does_not_change_the_determinant(
    size: int, device: torch.device
) -> None:
    """Round-off once sent such columns among the padding, from where they came back mirrored."""
    source, target = normal(6, 64, size, 9), normal(7, 64, size, 9)
    target[:, 1] = target[:, 0]
    target[32:, 2] = -target[32:, 0]
    with backend("triton"):
        found = procrustes(source.to(device), target.to(device), rotation_only=True)
    assert_close(torch.linalg.det(found).cpu(), torch.ones(64, dtype=torch.float64), size)


def test_procrustes_recovers_a_rotation_from_long_broadcast_rows(device: torch.device) -> None:
    """Several slabs of columns, the last of them short; nothing is contiguous."""
    turns = torch.stack([orthonormal(i, 3, 3) for i in range(4)])
    turns *= torch.linalg.det(turns)[:, None, None]
    source = normal(8, 2, 1, 1100, 3).mT
    target = turns @ source
    with backend("triton"):
        found = procrustes(source.to(device), target.to(device), rotation_only=True)
    assert found.shape == (2, 4, 3, 3)
    assert_close(found.cpu(), turns.expand(2, 4, 3, 3), 1100)
    with backend("triton"):
        mixed = procrustes(source.to(device, torch.bfloat16), target.to(device), True)
    with backend("reference"):
        expected = procrustes(source.bfloat16(), target, True)
    assert_close(mixed.cpu(), expected, 1100)
    assert mixed.dtype == torch.float64


def test_procrustes_of_fp32_is_computed_in_fp64(device: torch.device) -> None:
    """At condition 1e4 of both factors, 1e8 of their product, fp32 would find nothing."""
    values = torch.logspace(0, -4, 4)
    turn = orthonormal(9, 4, 4)
    source = with_values(10, 4, 30, values).float()
    target = (turn @ source.double()).float()
    with backend("triton"):
        found = procrustes(source.to(device), target.to(device))
    with backend("reference"):
        expected = procrustes(source, target)
    assert_close(found.cpu(), expected, 4)


@triton.jit
def tile_kernel(matrix, factor, rank, n, cutoff, N: tl.constexpr, SWEEPS: tl.constexpr):
    """What a larger kernel does with a tile of its own."""
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    inside = (row < n) & (column < n)
    tile = tl.load(matrix + row * n + column, mask=inside, other=0.0)
    found, kept = polar_by_svd(tile, cutoff, SWEEPS, "fp64")
    tl.store(factor + row * N + column, found)
    tl.store(rank, kept)


def test_a_tile_in_a_larger_kernel(device: torch.device) -> None:
    values = torch.tensor([[1.0, 0.5, 0.1, 0.1, 1e-4], [1, 0.5, 0.1, 1e-6, 1e-7]])
    for i, kept in enumerate((values > 1e-5).double()):
        matrix = with_values(i, 5, 5, values[i]).to(device)
        factor = torch.empty(16, 16, dtype=torch.float64, device=device)
        rank = torch.empty(1, dtype=torch.int32, device=device)
        tile_kernel[(1,)](matrix, factor, rank, 5, 1e-5, N=16, SWEEPS=SWEEPS)
        assert rank.item() == kept.sum()
        expected = torch.nn.functional.pad(with_values(i, 5, 5, kept), (0, 11, 0, 11))
        assert_close(factor.cpu(), expected, 5, condition=1e5)


@triton.jit
def sign_kernel(matrix, signs, count, n, N: tl.constexpr, COUNT: tl.constexpr):
    """The determinant's sign of every matrix, as the kernels find it."""
    row, column = tl.arange(0, N)[:, None, None], tl.arange(0, N)[None, None, :]
    member = tl.arange(0, COUNT)
    inside = (row < n) & (column < n) & (member < count)[None, :, None]
    place = matrix + member[None, :, None] * n * n + row * n + column
    eye = identity(N, COUNT, N, tl.float64)
    found = determinant_sign(tl.load(place, mask=inside, other=0.0) + 0 * eye, n)
    tl.store(signs + member, found, mask=member < count)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_determinant_signs_of_permutations_and_rotations(n: int, device: torch.device) -> None:
    """Permutations have a zero wherever elimination without pivoting would divide."""
    order = [torch.randperm(n, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    permutations = torch.stack([torch.eye(n, dtype=torch.float64)[turn] for turn in order])
    turns = torch.stack([orthonormal(i, n, n) * (1 if i % 2 else -1) for i in range(8)])
    matrix = torch.cat([permutations, -permutations, turns]).to(device)
    signs = torch.empty(24, dtype=torch.float64, device=device)
    sign_kernel[(1,)](matrix, signs, 24, n, N=8, COUNT=32)
    assert torch.equal(signs.cpu(), torch.linalg.det(matrix.cpu()).sign())


def test_what_has_more_rows_is_left_to_torch(device: torch.device) -> None:
    assert chosen_backend("polar", torch.zeros(3, 65, device=device)) == "torch"
    assert chosen_backend("polar", torch.zeros(64, 3, device=device)) == "triton"
    pair: tuple[Any, ...] = torch.zeros(65, 9, device=device), torch.zeros(3, 9, device=device)
    assert chosen_backend("procrustes", *pair) == "torch"
    assert chosen_backend("procrustes", pair[1], pair[1]) == "triton"


def test_errors_of_fp32_factors_are_those_of_a_decomposition(device: torch.device) -> None:
    """Matrices of condition 3: one set of quintics for all would lose a digit and a half."""
    values = 1 / 3 + 2 / 3 * torch.rand(40, 8, generator=torch.Generator().manual_seed(0))
    matrix = torch.stack([with_values(i, 8, 8, v) for i, v in enumerate(values)]).float()
    with backend("triton"):
        found = polar_op(matrix.to(device)).factor.cpu()
    with backend("reference"):
        expected = polar_op(matrix).factor
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    plain = torch.linalg.matrix_norm((left @ right).double() - expected).max()
    error = torch.linalg.matrix_norm(found.double() - expected).max()
    assert error < max(2 * plain, tolerance(torch.float32) * 8**0.5)
