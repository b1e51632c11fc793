"""The Jacobi kernels: orthogonality, residuals, order and agreement of values with fp64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fedcore_kernels import BackendError, backend, chosen_backend, eigh_small, svd_small
from fedcore_kernels.cuda import spectra
from fedcore_kernels.jit.jacobi import symmetric_jacobi
from tests.reference.tolerance import assert_close, tolerance

# Branches that a card computes and masks, NumPy warns about in the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SPECTRA = ("random", "1e3", "1e6", "deficient", "repeated", "clustered", "zero", "ones")


def values_of(kind: str, size: int) -> Tensor:
    index = torch.arange(size, dtype=torch.float64)
    return {
        "random": torch.rand(size, generator=torch.Generator().manual_seed(size)).double() + 0.1,
        "1e3": torch.logspace(0, -3, size, dtype=torch.float64),
        "1e6": torch.logspace(0, -6, size, dtype=torch.float64),
        "deficient": (index < (size + 1) // 2).double(),
        "repeated": 1 + index % 2,
        "clustered": 1 + 1e-5 * index,
        "zero": 0 * index,
        "ones": index == 0,
    }[kind].double()


def orthonormal(seed: int, rows: int, columns: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=random, dtype=torch.float64)).Q


def rectangular(p: int, q: int) -> Tensor:
    """One matrix (p, q) of every spectrum."""
    size = min(p, q)
    return torch.stack(
        [
            orthonormal(i, p, size) * values_of(kind, size) @ orthonormal(i + 50, q, size).mT
            for i, kind in enumerate(SPECTRA)
        ]
    )


def symmetric(n: int) -> Tensor:
    """One matrix (n, n) of every spectrum and its negative: all positive, all negative, mixed."""
    found = []
    for i, kind in enumerate(SPECTRA):
        basis, values = orthonormal(i, n, n), values_of(kind, n)
        mixed = torch.where(torch.arange(n) % 3 == 1, -values, values)
        found += [basis * signed @ basis.mT for signed in (values, -values, mixed)]
    return torch.stack(found)


def each_close(actual: Tensor, expected: Tensor, length: int) -> None:
    """A zero matrix of the batch is not excused by its neighbours."""
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other.to(one.device), length)


def eye_like(matrix: Tensor, size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64).expand(len(matrix), size, size)


def signed_and_sorted(values: Tensor, vectors: Tensor) -> None:
    assert (values.diff(dim=-1) <= 0).all()
    assert (vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)) > 0).all()


def check_eigh(matrix: Tensor) -> None:
    with backend("triton"):
        values, vectors = eigh_small(matrix)
    n = matrix.shape[-1]
    wide = (matrix.double() + matrix.double().mT).cpu() / 2
    assert values.dtype == (torch.float64 if matrix.dtype == torch.float64 else torch.float32)
    each_close(values, torch.linalg.eigvalsh(wide).flip(-1), n)
    each_close(vectors.mT @ vectors, eye_like(matrix, n), n)
    each_close((vectors * values[..., None, :]) @ vectors.mT, wide, n)
    signed_and_sorted(values, vectors)


def check_svd(matrix: Tensor) -> None:
    with backend("triton"):
        left, values, right = svd_small(matrix)
    size, longest = min(matrix.shape[-2:]), max(matrix.shape[-2:])
    wide = matrix.double().cpu()
    assert values.dtype == (torch.float64 if matrix.dtype == torch.float64 else torch.float32)
    each_close(values, torch.linalg.svdvals(wide), longest)
    each_close(left.mT @ left, eye_like(matrix, size), longest)
    each_close(right @ right.mT, eye_like(matrix, size), longest)
    each_close((left * values[..., None, :]) @ right, wide, longest)
    signed_and_sorted(values, left)
    assert (values >= 0).all()


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("n", [1, 3, 8, 12])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_eigh_of_every_spectrum(dtype: torch.dtype, n: int, device: torch.device) -> None:
    check_eigh(symmetric(n).to(device, dtype))


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("p", "q"), [(1, 1), (3, 3), (8, 8), (12, 12), (12, 5), (3, 16), (1, 7)])
def test_svd_of_every_spectrum(dtype: torch.dtype, p: int, q: int, device: torch.device) -> None:
    check_svd(rectangular(p, q).to(device, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_full_tile_of_16_in_every_dtype(dtype: torch.dtype, device: torch.device) -> None:
    check_eigh(symmetric(16)[5:7].to(device, dtype))
    check_svd(rectangular(16, 16)[2:4].to(device, dtype))


@pytest.mark.parametrize("n", [32, 64])
def test_large_matrices_near_the_diagonal(n: int, device: torch.device) -> None:
    """Few sweeps, so that they can be interpreted."""
    random = torch.Generator().manual_seed(n)
    noise = 1e-4 * torch.randn(1, n, n, generator=random)
    check_eigh((noise + torch.diag(torch.arange(n // 2, -n // 2, -1).float())).to(device))
    check_svd((noise + torch.diag(torch.arange(n, 0, -1).float())).to(device))


def test_columns_below_round_off_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """Small integers cancel to nothing: their columns would shrink with every rotation."""
    monkeypatch.setattr(spectra, "SWEEPS", 12)
    random = torch.Generator().manual_seed(0)
    first = torch.randint(-2, 3, (8, 8, 3), generator=random).double()
    second = torch.randint(-2, 3, (8, 3, 8), generator=random).double()
    for dtype in DTYPES[:2]:
        check_svd((first @ second).to(device, dtype))


def test_batches_of_any_size_and_stride(device: torch.device) -> None:
    random = torch.Generator().manual_seed(3)
    stored = torch.randn(3, 74, 3, generator=random).to(device)
    strided = stored.transpose(0, 1)[::2]
    assert not strided.is_contiguous()
    assert len(strided) == 37
    check_eigh(strided)
    check_svd(strided)
    with backend("triton"):
        single, folded = svd_small(strided[4]), svd_small(strided[:36].unflatten(0, (2, 3, 6)))
        many = svd_small(strided)
        empty = eigh_small(strided[:0])
    for one, four, all_ in zip(single, folded, many, strict=True):
        assert torch.equal(one, all_[4])
        assert torch.equal(four.flatten(0, 2), all_[:36])
    assert [tuple(part.shape) for part in empty] == [(0, 3), (0, 3, 3)]


@pytest.mark.parametrize("power", [2.0**-100, 2.0**100])
def test_scale_by_a_power_of_two_changes_no_digit(power: float, device: torch.device) -> None:
    """Squares of these entries are no fp32 numbers."""
    matrix = symmetric(5)[:3].to(device, torch.float32)
    with backend("triton"):
        for op in (eigh_small, svd_small):
            plain, scaled = op(matrix), op(matrix * power)
            for one, other in zip(plain, scaled, strict=True):
                factor = power if one.dim() == 2 else 1.0
                assert torch.equal(one * factor, other)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_columns_of_any_length_keep_all_their_digits(
    dtype: torch.dtype, device: torch.device
) -> None:
    """Every value is right relative to itself, not to the largest: only Jacobi gives that."""
    lengths = torch.logspace(0, -6 if dtype == torch.float32 else -14, 6, dtype=torch.float64)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    matrix = (orthonormal(0, 9, 6) * lengths[order]).to(device, dtype)
    with backend("triton"):
        found = svd_small(matrix)
    assert ((found.values.cpu() - lengths) / lengths).abs().max() < tolerance(dtype, 9)
    assert_close(found.left.mT @ found.left, torch.eye(6).to(device), 9)


def test_the_definition_of_a_simple_spectrum(device: torch.device) -> None:
    matrix = symmetric(6)[0].to(device)
    for op in (eigh_small, svd_small):
        with backend("reference"):
            expected = op(matrix.cpu())
        with backend("triton"):
            found = op(matrix)
        for one, other in zip(found, expected, strict=True):
            assert_close(one.cpu(), other, 6, condition=100)


def test_what_is_not_finite_stays_in_its_matrix(device: torch.device) -> None:
    matrix = symmetric(4)[:5].to(device, torch.float32)
    broken = matrix.clone()
    broken[1, 2, 0] = float("nan")
    broken[3, 0, 0] = float("inf")
    whole = torch.tensor([0, 2, 4])
    with backend("triton"):
        for op in (eigh_small, svd_small):
            for good, bad in zip(op(matrix), op(broken), strict=True):
                assert torch.equal(good[whole], bad[whole])
                assert bad[[1, 3]].isnan().all()


def test_too_few_sweeps_give_nan_and_not_a_guess(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(spectra, "SWEEPS", 1)
    settled = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    both = torch.stack([symmetric(3)[0].float(), settled]).to(device)
    with backend("triton"):
        values, vectors = eigh_small(both)
        left = svd_small(both).left
    assert values[0].isnan().all()
    assert vectors[0].isnan().all()
    assert left[0].isnan().all()
    assert_close(values[1].cpu(), settled.diagonal(), 3)
    assert torch.equal(left[1].cpu(), torch.eye(3))


@triton.jit
def tile_kernel(matrix, values, vectors, n, N: tl.constexpr, SWEEPS: tl.constexpr):
    """What a larger kernel does with a tile of its own."""
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    inside = (row < n) & (column < n)
    tile = tl.load(matrix + row * n + column, mask=inside, other=0.0)
    found, basis = symmetric_jacobi(tile, n, SWEEPS)
    tl.store(values + tl.arange(0, N), found)
    tl.store(vectors + row * N + column, basis)


def test_a_tile_in_a_larger_kernel_has_zeros_in_its_padding(device: torch.device) -> None:
    matrix = symmetric(5)[2].contiguous().to(device)
    values = torch.empty(8, dtype=torch.float64, device=device)
    vectors = torch.empty(8, 8, dtype=torch.float64, device=device)
    tile_kernel[(1,)](matrix, values, vectors, 5, N=8, SWEEPS=spectra.SWEEPS)
    assert_close(values[:5].cpu(), torch.linalg.eigvalsh(matrix.cpu()).flip(0), 5)
    assert_close((vectors * values) @ vectors.mT, torch.nn.functional.pad(matrix, (0, 3, 0, 3)), 5)
    assert not values[5:].any()
    assert not vectors[5:].any()
    assert not vectors[:, 5:].any()


def test_larger_matrices_are_left_to_torch(device: torch.device) -> None:
    matrix = torch.zeros(65, 65, device=device)
    assert chosen_backend("svd_small", matrix) == "torch"
    assert chosen_backend("eigh_small", matrix[:64, :64]) == "triton"
    with backend("triton"), pytest.raises(BackendError, match="a side of the matrix is 65, more"):
        eigh_small(matrix)
