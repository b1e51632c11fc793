"""FLoRA-NA's two combinations under HiRA: nearest where the base weights are large.

HiRA multiplies the adapter by the base weight, ``W = W0 + W0 o (B A)`` entry by entry, so the error
of an aggregate is ``||W0 o (M - B^ A^)||_F``. With ``E = W0 o W0`` the objective of
:mod:`fedcore.methods.lora.flora_na.solver` becomes

    f(p, q) = sum_oc E_oc (M - B^ A^)_oc^2 = ||W0 o M||^2 - 2 p^T H q + p^T R(q) p
    H_ij = <E o M, B_i A_j>,   R_ij(q) = <E o (B_i A^), B_j A^>,   T_ij(p) = <E o (B^ A_i), B^ A_j>

which the Gram blocks of the factors no longer hold: every half-step reads W0 once. R needs the
r x r matrices ``A^ diag(E_o) A^^T`` of the rows o of W0, T those of its columns, and both are
products of blocks of rows of E with the ``r (r + 1) / 2`` products of two rows of a factor.

Nothing calls it yet: it waits until HiRA adapters can be trained.

Source: the problem is FLoRA-NA's, arXiv 2509.26399; the weighted form and its solver are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore.checks import count, number
from fedcore.errors import FedcoreError
from fedcore.methods.lora.flora_na.objective import PairObjective
from fedcore.methods.lora.flora_na.solver import alternate, nearest_combination
from fedcore_kernels import block_grams

# What fp64 sums of squares cannot tell from zero, relative to the terms that were summed.
_ROUNDING = 1e-14


class HadamardCombination(NamedTuple):
    """Coefficients of one module, fp64.

    Attributes:
        p, q: ``(N,)`` of the clients' ``B`` and ``A``.
        objective: ``()`` ``||W0 o (M - B^ A^)||_F^2``, summed over the entries themselves.
        target: ``()`` ``||W0 o M||_F^2``.
        sweeps: made from the start that ended best.
        converged: whether the last sweep gained no more than the tolerance; otherwise these are the
            best so far.
    """

    p: Tensor
    q: Tensor
    objective: Tensor
    target: Tensor
    sweeps: int
    converged: bool


@dataclass(frozen=True)
class HadamardObjective(PairObjective):
    """``f`` of one module (L = 1); ``cross`` and ``gram`` are inner products weighted by E.

    Attributes:
        outer, inner: ``(N, r, d_out)`` and ``(N, r, d_in)`` fp64, ``B^T`` and ``A``.
        base: ``(d_out, d_in)`` ``W0``, of any dtype.
        rows: rows of W0 that are held in fp64 at a time.
    """

    outer: Tensor
    inner: Tensor
    base: Tensor
    rows: int

    @classmethod
    def weighted(cls, plain: PairObjective, *parts: Tensor, rows: int) -> HadamardObjective:
        """From the unweighted objective of the same module and ``outer``, ``inner``, ``base``."""
        outer, inner, base = parts
        clients = len(outer)
        cross = torch.zeros(clients, clients, dtype=outer.dtype, device=outer.device)
        gram = torch.zeros_like(cross)
        # All clients' products of these rows together take as much as a block of other passes.
        for where, energy in _blocks(base, max(1, rows // clients)):
            part = outer[:, :, where]
            products = part.mT @ inner
            gram += (products * energy).flatten(1) @ products.flatten(1).mT
            weighted = energy * torch.einsum("n,noc->oc", plain.shares, products)
            cross += part.mT.flatten(1) @ (weighted @ inner.mT).flatten(1).mT
        return cls(
            plain.left, plain.right, plain.shares, cross[None], gram[None], outer, inner, base, rows
        )

    def select(self, modules: Tensor) -> HadamardObjective:
        """The objective itself: it has one module."""
        return self

    def left_curvature(self, q: Tensor) -> Tensor:
        """``R(q)`` for ``q (1, S, N)``: (1, S, N, N)."""
        pairs = _row_pairs(torch.einsum("sn,nrc->src", q[0], self.inner))
        curvature = torch.zeros(*q.shape, q.shape[-1], dtype=q.dtype, device=q.device)
        for where, energy in _blocks(self.base, self.rows):
            curvature += _quadratic(self.outer[:, :, where], pairs @ energy.mT)
        return curvature

    def right_curvature(self, p: Tensor) -> Tensor:
        """``T(p)`` for ``p (1, S, N)``: (1, S, N, N)."""
        pairs = _row_pairs(torch.einsum("sn,nro->sro", p[0], self.outer))
        columns = torch.zeros(*pairs.shape[:2], self.base.shape[1], dtype=p.dtype, device=p.device)
        for where, energy in _blocks(self.base, self.rows):
            columns += pairs[..., where] @ energy
        parts = zip(self.inner.split(self.rows, -1), columns.split(self.rows, -1), strict=True)
        curvature = torch.zeros(*p.shape, p.shape[-1], dtype=p.dtype, device=p.device)
        for part, packed in parts:
            curvature += _quadratic(part, packed)
        return curvature

    def error(self, p: Tensor, q: Tensor) -> Tensor:
        """``f`` for ``p, q (N,)`` from the entries, without the cancellation of its Gram form."""
        left = self.shares[:, None, None] * self.outer
        left = left - q[:, None, None] * torch.einsum("n,nro->ro", p, self.outer)
        left, right = left.flatten(0, 1), self.inner.flatten(0, 1)
        error = torch.zeros((), dtype=left.dtype, device=left.device)
        for where, energy in _blocks(self.base, self.rows):
            error += (energy * (left[:, where].mT @ right).square()).sum()
        return error


def hadamard_combination(
    left: Tensor,
    right: Tensor,
    shares: Tensor,
    base: Tensor,
    *,
    sweeps: int = 50,
    tolerance: float = 1e-10,
    rows: int = 256,
) -> HadamardCombination:
    """``p, q`` of least ``||W0 o (M - B^ A^)||_F^2`` found by alternating least squares.

    ``M = sum w_n B_n A_n``, ``B^ = sum p_n B_n``, ``A^ = sum q_n A_n``. Descends from the
    unweighted combination and from the means ``(w, w)`` and keeps the better end, so that it is
    never above either; where W0 is constant the former is the answer. The gauge is that of
    :func:`~fedcore.methods.lora.flora_na.solver.nearest_combination`.

    Waits for HiRA: no adapter of that kind can be trained here yet, and no server step calls it. It
    is for whoever holds the base weights, which it reads twice per sweep. Exact methods need no
    weighting, for an ``M`` met exactly is met in every norm.

    Args:
        left: ``(N, r, d_out)`` ``B_n^T`` with its scale, floating point.
        right: ``(N, r, d_in)`` ``A_n``.
        shares: ``(N,)`` positive, summing to 1.
        base: ``(d_out, d_in)`` ``W0``, in the layout of ``nn.Linear``, floating point.
        sweeps: at most so many from each start.
        tolerance: stop at a gain of this share of ``||W0 o M||^2``.
        rows: rows of W0 held in fp64 at a time; the result depends on it by rounding alone.

    Raises:
        FedcoreError: a shape that does not fit, tensors on two devices, not floating point or not
            finite, shares that are not positive or do not sum to 1, ``sweeps`` or ``rows`` below 1,
            ``tolerance`` outside [0, 1).

    Cost: ``2 r (r + 1) d_out d_in`` flops per sweep and start, about ``2 d_out d_in (3 m + N^2)``
    once, with ``m = N r``; of memory ``rows d_in`` and ``r (r + 1) (d_out + d_in)`` numbers in fp64
    and a few copies of the stacks.

    Example:
        >>> left, right = torch.ones(2, 1, 3), torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
        >>> shares = torch.tensor([0.5, 0.5])
        >>> fit = hadamard_combination(left, right, shares, torch.eye(3, 2))
        >>> fit.converged, float(fit.objective) < 1e-28 * float(fit.target)
        (True, True)
    """
    _check(left, right, shares, base)
    _check_options(sweeps, tolerance, rows)
    outer, inner, shares = left.double(), right.double(), shares.double()
    blocks = block_grams(outer[:, None]), block_grams(inner[:, None])
    plain = PairObjective.build(*blocks, shares)
    near = nearest_combination(plain, sweeps=sweeps, tolerance=tolerance)
    objective = HadamardObjective.weighted(plain, outer, inner, base, rows=rows)
    means = shares[None]
    fit = alternate(
        objective,
        torch.stack([near.p, means], 1),
        torch.stack([near.q, means], 1),
        sweeps=sweeps,
        tolerance=tolerance,
    )
    first, second = fit.value[0].tolist()
    best = int(second < first - _ROUNDING * float(objective.scale))
    p, q = _in_gauge_of(near.q[0], fit.p[0, best], fit.q[0, best], plain)
    return HadamardCombination(
        p,
        q,
        objective.error(p, q),
        objective.target[0],
        int(fit.sweeps[0, best]),
        bool(fit.converged[0, best]),
    )


def _blocks(base: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of ``W0 o W0`` in fp64, and where they stand."""
    for start in range(0, len(base), rows):
        where = slice(start, start + rows)
        yield where, base[where].double().square()


def _row_pairs(factor: Tensor) -> Tensor:
    """Products of two rows a <= b of ``factor (S, r, k)``: (S, r (r + 1) / 2, k)."""
    a, b = torch.triu_indices(factor.shape[1], factor.shape[1], device=factor.device)
    return factor[:, a] * factor[:, b]


def _quadratic(stack: Tensor, packed: Tensor) -> Tensor:
    """``sum_k stack_i[:, k]^T G_k stack_j[:, k]`` for ``G`` as upper triangles: (S, N, N).

    Args:
        stack: ``(N, r, k)``.
        packed: ``(S, r (r + 1) / 2, k)``, in the order of :func:`_row_pairs`.
    """
    rank = stack.shape[1]
    a, b = torch.triu_indices(rank, rank, device=stack.device)
    place = torch.empty(rank, rank, dtype=torch.int64, device=stack.device)
    place[a, b] = place[b, a] = torch.arange(len(a), device=stack.device)
    moved = torch.einsum("sabk,nbk->snak", packed[:, place], stack)
    return moved.flatten(2) @ stack.flatten(1).mT


def _in_gauge_of(
    reference: Tensor, p: Tensor, q: Tensor, plain: PairObjective
) -> tuple[Tensor, Tensor]:
    """``(c p, q / c)`` with ``||A^||`` that of the coefficients ``reference``, ``p^T w >= 0``."""
    sizes = plain.traces[1][0]
    wanted, current = reference @ sizes @ reference, q @ sizes @ q
    sign = -1.0 if float(p @ plain.shares) < 0 else 1.0
    # A zero factor has no scale to fix.
    usable = bool(wanted > 0) and bool(current > 0)
    scale = sign * (current / wanted).sqrt() if usable else torch.full_like(current, sign)
    return p * scale, q / scale


def _check(left: Tensor, right: Tensor, shares: Tensor, base: Tensor) -> None:
    expected = {
        "left": (left, ("N", "r", "d_out")),
        "right": (right, ("N", "r", "d_in")),
        "shares": (shares, ("N",)),
        "base": (base, ("d_out", "d_in")),
    }
    sizes: dict[str, int] = {}
    for name, (tensor, axes) in expected.items():
        shape = tuple(tensor.shape)
        if len(shape) != len(axes) or any(
            size < 1 or sizes.setdefault(axis, size) != size
            for axis, size in zip(axes, shape, strict=True)
        ):
            known = ", ".join(f"{axis} = {size}" for axis, size in sizes.items())
            raise FedcoreError(f"{name} is {shape}; pass ({', '.join(axes)}) with {known}")
        if tensor.device != left.device:
            raise FedcoreError(
                f"{name} is on {tensor.device}, left on {left.device}; pass one device"
            )
        if not tensor.is_floating_point():
            raise FedcoreError(f"{name} is {tensor.dtype}; pass floating point")
        if not bool(torch.isfinite(tensor).all()):
            raise FedcoreError(f"{name} holds NaN or infinite values")
    total = float(shares.double().sum())
    if not bool((shares > 0).all()) or abs(total - 1) > 1e-6:
        raise FedcoreError(f"shares are {shares.tolist()}; pass positive ones that sum to 1")


def _check_options(sweeps: int, tolerance: float, rows: int) -> None:
    for name, value in (("sweeps", sweeps), ("rows", rows)):
        count("", name, value, least=1)
    number("", "tolerance", tolerance, least=0, below=1)
