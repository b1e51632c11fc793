"""The best low-rank approximation of a mean of products, without the products.

For factors ``left_n`` (r x p, that is ``B_n^T``) and ``right_n`` (r x q, that is ``A_n``)

    M = sum_n w_n left_n^T right_n = F^T G,    F = [sqrt(w_n) left_n],  G = [sqrt(w_n) right_n]

With ``F^T = Q_F R_F`` and ``G^T = Q_G R_G`` the singular values of M are those of the small core
``R_F R_G^T = U S V^T``, and its singular vectors are ``Q_F U`` and ``Q_G V``.

The stacks of clients that started from one state are ill-conditioned (4e4 for a deviation of 1e-4),
and Gram matrices square that. An orthogonal mixing of the clients whose first row is ``sqrt(w)``
leaves M unchanged and maps the stack to the mean and deviations from it; with rows scaled to
length 1 its condition is close to 1, and Cholesky factors of the Grams are accurate. Modules for
which that is not proven take Householder's QR.

Reference: FlexLoRA, arXiv 2402.11505, and FLoRIST, arXiv 2506.09199, for the energy rule; the
forms used here are our own algebra.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.capture import reads_values
from fedcore_kernels.client_weights import client_weights
from fedcore_kernels.dispatch import register
from fedcore_kernels.errors import KernelInputError
from fedcore_kernels.library.operation import call
from fedcore_kernels.rows import joint_copies
from fedcore_kernels.spectra import column_signs
from fedcore_kernels.stacks import check_pair
from fedcore_kernels.steps import EPS_REL

Split = Literal["left", "balanced"]
"""Whether the left factor takes all singular values, or both take their roots."""

# Largest trace of the inverse of a Gram with unit diagonal. Its smallest eigenvalue is then at
# least 1e-4 and the basis from its Cholesky factor orthonormal to about 1e-12.
_GRAM_LIMIT = 1e4


class ProductSvd(NamedTuple):
    """``left^T right`` is the best approximation of M among matrices of rank ``rank``.

    Attributes:
        left: (L, s, p) orthogonal rows; the entry of largest modulus of each is positive.
        values: (L, min(N r, p, q)) fp64, all singular values of M, descending.
        right: (L, s, q) orthogonal rows. Rows of both factors beyond ``rank`` are zero.
        rank: (L,) int64, directions kept, at most s.
        tail: (L,) fp64, ``||M - left^T right||_F = (sum_{i>rank} sigma_i^2)^(1/2)``.
        gap: (L,) fp64, ``1 - sigma_{rank+1} / sigma_rank``; 0 says that the best subspace is not
            unique. 1 where nothing was kept or nothing was left over.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    rank: Tensor
    tail: Tensor
    gap: Tensor


class _Thin(NamedTuple):
    """``rows^T = Q core`` with orthonormal columns ``Q^T = mixing basis``; no basis for Q = I."""

    core: Tensor
    mixing: Tensor | None
    basis: Tensor

    def directions(self, coefficients: Tensor) -> Tensor:
        """``coefficients Q^T`` for ``coefficients (l, s, m)``."""
        return coefficients if self.mixing is None else coefficients @ self.mixing @ self.basis


def _split_mean(rows: Tensor, root: Tensor) -> Tensor:
    """``(H x I) rows`` with the reflection ``H = I - 2 u u^T / u^T u``, ``u = root - e_1``.

    Works in place on the weighted ``rows (l, m, k)`` of a working copy.
    """
    normal = root.clone()
    normal[0] -= 1
    length = normal.square().sum()
    factor = torch.where(length > 0, -2 / length, 0.0)
    clients = rows.unflatten(1, (len(root), -1))
    along = (normal * factor) @ clients.transpose(1, 2)
    return clients.addcmul_(normal[:, None, None], along[:, None]).flatten(1, 2)


def _thin(rows: Tensor) -> _Thin:
    """The QR decomposition of ``rows^T`` for ``rows (l, m, k)``, which it may overwrite."""
    if rows.shape[1] >= rows.shape[2]:
        return _Thin(rows.mT, None, rows)
    lengths = torch.linalg.vector_norm(rows, dim=-1)
    # Zero rows (a lower rank, a weight of zero) count as directions of their own of length 0.
    inverse_lengths = torch.where(lengths > 0, lengths.reciprocal(), 0.0)
    gram = rows @ rows.mT * (inverse_lengths[:, :, None] * inverse_lengths[:, None, :])
    gram.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    lower, _ = torch.linalg.cholesky_ex(gram)
    eye = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    # Written so that a NaN of a failed factorisation counts as unsafe.
    unsafe = (~(inverse.square().sum((-2, -1)) <= _GRAM_LIMIT)).nonzero()[:, 0]
    core, mixing = lower.mT * lengths[:, None, :], inverse * inverse_lengths[:, None, :]
    if len(unsafe):
        basis, core[unsafe] = torch.linalg.qr(rows[unsafe].mT)
        rows[unsafe], mixing[unsafe] = basis.mT, eye
    return _Thin(core, mixing, rows)


def kept_directions(values: Tensor, limit: int, energy: float | None, eps_rel: float) -> Tensor:
    """How many of the descending ``values (l, s)`` are kept, (l,)."""
    count = ((values > eps_rel * values[:, :1]) & (values > 0)).sum(-1)
    if energy is not None:
        count = torch.minimum(count, energy_rank(values, energy))
    return count.clamp(max=limit)


def energy_rank(values: Tensor, energy: float) -> Tensor:
    """The fewest leading of the descending ``values (L, s)`` whose squares hold ``energy`` of all.

    What is left over is summed from the small end, so that ``energy = 1`` drops nothing but
    rounding: values not above 1e-12 of the largest. It may exceed ``1 - energy`` by 1e-12 of that,
    so that 4 of 5 equal values hold 0.8. Rows of zeros have rank 0, all others at least 1.

    Returns:
        ``(L,)`` int64.

    Example:
        >>> energy_rank(torch.tensor([[3.0, 1.0, 0.1]]), 0.9).tolist()
        [2]
    """
    largest = values[:, :1]
    relative = torch.where(values > EPS_REL * largest, values / largest, 0.0)
    rest = relative.square().flip(-1).cumsum(-1).flip(-1)
    wanted = (rest > (1 - energy) * (1 + EPS_REL) * rest[:, :1]).sum(-1)
    return torch.maximum(wanted, (largest[:, 0] > 0).to(wanted.dtype))


def tail_and_gap(values: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Tail and gap (l,) of the descending ``values (l, s)`` truncated after ``count``.

    Example:
        >>> tail, gap = tail_and_gap(torch.tensor([[4.0, 2.0, 0.0]]), torch.tensor([1]))
        >>> tail.tolist(), gap.tolist()
        ([2.0], [0.5])
    """
    order = torch.arange(values.shape[1], device=values.device)
    tail = torch.linalg.vector_norm(torch.where(order < count[:, None], 0.0, values), dim=-1)
    last = values.gather(1, (count - 1).clamp(min=0)[:, None])[:, 0]
    after = torch.nn.functional.pad(values, (0, 1)).gather(1, count[:, None])[:, 0]
    return tail, torch.where(count > 0, 1 - after / last, 1.0)


def _assemble(pieces: list[Tensor], size: int, dtype: torch.dtype) -> Tensor:
    """The groups' rows ``(l, s_g, k)`` under each other, padded to ``size`` rows per module."""
    padded = [torch.nn.functional.pad(piece, (0, 0, 0, size - piece.shape[1])) for piece in pieces]
    return torch.cat(padded).to(dtype)


def _torch_body(
    left: Tensor,
    right: Tensor,
    root: Tensor,
    rank: int,
    energy: float | None,
    balanced: bool,
    eps_rel: float,
) -> ProductSvd:
    dtype = checks.accumulator(torch.promote_types(left.dtype, right.dtype))
    scale = root.repeat_interleave(left.shape[2])[:, None]
    limit = min(rank, left.shape[0] * left.shape[2], left.shape[3], right.shape[3])
    outer, inner, reports = [], [], []
    for _, rows in joint_copies(left, right):
        first, second = (_thin(_split_mean(side.mul_(scale), root)) for side in rows)
        u, values, v = torch.linalg.svd(first.core @ second.core.mT, full_matrices=False)
        count = kept_directions(values, limit, energy, eps_rel)
        size = limit if energy is None else int(count.max())
        leading = torch.arange(size, device=values.device) < count[:, None]
        weight = torch.where(leading, values[:, :size], 0.0)[:, :, None]
        share = weight.sqrt() if balanced else leading[:, :, None].to(weight.dtype)
        one = first.directions(u[:, :, :size].mT) * (share if balanced else weight)
        signs = column_signs(one.mT).mT
        outer.append((one * signs).to(dtype))
        inner.append((second.directions(v[:, :size]) * (share * signs)).to(dtype))
        reports.append((values, count, *tail_and_gap(values, count)))
    values, count, tail, gap = (torch.cat(field) for field in zip(*reports, strict=True))
    size = max(piece.shape[1] for piece in outer)
    return ProductSvd(
        _assemble(outer, size, dtype), values, _assemble(inner, size, dtype), count, tail, gap
    )


register("product_svd", "torch", _torch_body, reads_values)


def product_svd(
    left: checks.ArrayLike,
    right: checks.ArrayLike,
    weights: checks.ArrayLike,
    rank: int | None = None,
    *,
    energy: float | None = None,
    split: Split = "left",
    eps_rel: float = EPS_REL,
) -> ProductSvd:
    """The best approximation of ``M = sum_n w_n left_n^T right_n`` for every module.

    Args:
        left: (N, L, r, p) floating point, any strides: the clients' ``B^T``, scales absorbed.
            Clients of lower rank have zero rows.
        right: (N, L, r, q) the clients' ``A``.
        weights: (N,) real numbers, normalised in fp64.
        rank: directions to keep at most; all by default.
        energy: keep the fewest directions that hold this share of ``||M||_F^2``, module by module,
            in (0, 1]; up to ``rank`` if both are set.
        split: where the singular values go: ``"left"``, so that the rows of ``right`` are
            orthonormal, or ``"balanced"``, their roots to both.
        eps_rel: singular values not above this share of the largest count as zero and are dropped.

    Returns:
        :class:`ProductSvd`, the factors in fp32 unless an argument is fp64. They have
        ``s = min(rank, N r, p, q)`` rows, and with ``energy`` as many as the module of the largest
        rank; a zero M has rank 0.

    Raises:
        KernelInputError: a wrong shape, dtype, device or option, or unusable weights.

    Cost: reads N L r (p + q) numbers once; L (2 m^2 (p + q) + 24 m^3 + 2 s m (p + q)) flops with
    m = N r. Memory of the result and a working copy of a few modules, never p x q.

    Example:
        >>> result = product_svd([[[[0.0, 3.0]]], [[[1.0, 0.0]]]], [[[[2.0]]], [[[0.0]]]], [1, 1])
        >>> result.left, result.right, result.values
        (tensor([[[0., 3.]]]), tensor([[[1.]]]), tensor([[3.]], dtype=torch.float64))
    """
    first, second = check_pair(left, right)
    if rank is not None and rank < 1:
        raise KernelInputError(f"rank is {rank}; pass at least 1, or None to keep all directions")
    if energy is not None and not 0 < energy <= 1:
        raise KernelInputError(f"energy is {energy}; pass a share in (0, 1]")
    if split not in ("left", "balanced"):
        raise KernelInputError(f"split is {split!r}; pass 'left' or 'balanced'")
    cutoff = checks.fraction("eps_rel", eps_rel)
    counts = client_weights(weights, first.shape[0])
    limit = min(first.shape[0] * first.shape[2], first.shape[3], second.shape[3])
    rank_limit = limit if rank is None else min(rank, limit)
    balanced = split == "balanced"
    return ProductSvd(
        *call("product_svd", first, second, counts, rank_limit, energy, balanced, cutoff)
    )
