"""Two combinations of the clients' factors whose product is nearest to the mean product.

Minimises :class:`.PairObjective`, ``f(p, q) = ||M - (sum_n p_n
left_n)^T (sum_n q_n right_n)||_F^2``, over p and q in R^N. For a fixed ``q`` it is a linear
least-squares problem in ``p`` and the other way round, so the two are solved in turn. There are
local minima; the best of three starts is kept.

Source: the problem is FLoRA-NA's, arXiv 2509.26399, which does not say how it is solved; this
solver is our own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedcore.methods.lora.flora_na.objective import PairObjective, apply

CUTOFF = 1e-10
"""Curvatures not above this share of the largest count as flat and are not stepped along."""

# Below this bound on its condition a curvature has no flat direction and is solved by Cholesky,
# 20 times as fast as by eigenvectors at N = 10; the share of rounding in a step stays under 1e-8.
_REGULAR = 1e8

# What fp64 Grams cannot tell from zero, relative to the terms that were summed.
_ROUNDING = 1e-14

# A squared mean not above this share of the mean square has cancelled.
_CANCELLED = 1e-12


class Descent(NamedTuple):
    """Where alternating least squares ended from every start.

    Attributes:
        p, q: ``(L, S, N)``.
        value: ``(L, S)`` ``f(p, q)``, never above the start's.
        sweeps: ``(L, S)`` int64, sweeps made.
        converged: ``(L, S)`` bool, whether the last sweep gained no more than the tolerance.
    """

    p: Tensor
    q: Tensor
    value: Tensor
    sweeps: Tensor
    converged: Tensor


class Combination(NamedTuple):
    """The best of all starts, and the start that was best before any sweep.

    Attributes:
        p, q: ``(L, N)`` coefficients, in the gauge of :func:`nearest_combination`.
        value: ``(L,)`` ``f(p, q)``.
        start_p, start_q, start_value: the same for the best start.
        sweeps: ``(L,)`` int64.
        converged: ``(L,)`` bool; coefficients that did not converge are the best so far.
    """

    p: Tensor
    q: Tensor
    value: Tensor
    start_p: Tensor
    start_q: Tensor
    start_value: Tensor
    sweeps: Tensor
    converged: Tensor


def starts(objective: PairObjective) -> tuple[Tensor, Tensor]:
    """Three starts ``p, q (L, 3, N)``: the means, the isotropic fit, the best single client.

    The isotropic fit replaces every block by its trace. With ``g^l_ij = tr S^l_ij`` it is the
    leading singular triplet ``(x, s, y)`` of ``g_l^(1/2) diag(w) g_r^(1/2)``, and exact for rank 1;
    a single client is scaled to its projection of M. One that does not exist is the means instead.
    """
    shares = objective.shares
    means = shares.expand(len(objective.cross), -1)
    left, right = (_root(trace) for trace in objective.traces)
    outer, values, inner = torch.linalg.svd(left * shares @ right)
    # g_l^(-1/2) x s^(1/2) = w g_r^(1/2) y s^(-1/2) needs no inverse root of a singular matrix.
    scale = values[:, :1].rsqrt()
    p = shares * apply(right, inner[:, 0]) * scale
    q = shares * apply(left, outer[:, :, 0]) * scale
    usable = values[:, :1] > 0
    p, q = torch.where(usable, p, means), torch.where(usable, q, means)

    energy = objective.gram.diagonal(dim1=-2, dim2=-1)
    size = torch.stack([t.diagonal(dim1=-2, dim2=-1) for t in objective.traces]).prod(0)
    exists = energy > _ROUNDING * size
    hit = objective.cross.diagonal(dim1=-2, dim2=-1)
    gain = torch.where(exists, hit * (hit / energy), -1.0)
    best = gain.argmax(-1, keepdim=True)
    single = torch.zeros_like(p).scatter(-1, best, 1.0)
    usable = exists.any(-1, keepdim=True)
    alone = torch.where(usable, single * (hit / energy).gather(-1, best), means)
    single = torch.where(usable, single, means)
    return torch.stack([means, p, alone], 1), torch.stack([means, q, single], 1)


def alternate(
    objective: PairObjective,
    p: Tensor,
    q: Tensor,
    *,
    sweeps: int,
    tolerance: float,
    affine: bool = False,
) -> Descent:
    """Solve for ``p`` and ``q`` in turn from every start ``p, q (L, S, N)``.

    Each half-step adds ``R^+ (H q - R p)`` to ``p`` and likewise for ``q``: directions in which
    nothing changes, as when all clients share a factor, keep their start. A start is left alone
    once a sweep gains at most ``tolerance ||M||^2``, or what rounding may feign, and before one
    that would lose. With ``affine`` the steps keep the sums of ``p`` and of ``q``.
    """
    p, q, value = p.clone(), q.clone(), objective.value(p, q)
    slack = torch.maximum(tolerance * objective.target, _ROUNDING * objective.scale)[:, None]
    made = torch.zeros_like(value, dtype=torch.int64)
    converged = torch.zeros_like(value, dtype=torch.bool)
    moving = ~converged
    active, part = torch.arange(len(p), device=p.device), objective
    for _ in range(sweeps):
        left_over = moving.any(-1).nonzero()[:, 0]
        if not len(left_over):
            break
        # Half as many modules or fewer: copying their blocks costs less than sweeping the rest.
        if 2 * len(left_over) <= len(active):
            active, part = left_over, objective.select(left_over)
        new_p, new_q, new_value = _sweep(part, p[active], q[active], affine)
        going, gain = moving[active], value[active] - new_value
        better = going & (gain >= 0)
        p[active] = torch.where(better[..., None], new_p, p[active])
        q[active] = torch.where(better[..., None], new_q, q[active])
        value[active] = torch.where(better, new_value, value[active])
        made[active] += going
        converged[active] |= going & (gain.abs() <= slack[active])
        moving[active] = going & (gain > slack[active])
    return Descent(p, q, value, made, converged)


def nearest_combination(
    objective: PairObjective, *, sweeps: int = 500, tolerance: float = 1e-10, affine: bool = False
) -> Combination:
    """The best end point of :func:`alternate` over the three :func:`starts`.

    ``(c p, q / c)`` is the same product. Returned are ``sum p_n w_n >= 0`` and
    ``||sum q_n right_n|| = ||sum w_n right_n||``, or equal norms of both factors where the latter
    mean is zero. With ``affine`` both coefficients sum to 1 and the gauge is fixed by that.

    Where M is zero up to rounding ``p = q = w``; should the means have a product although M has
    none, ``p = 0``, which is then the minimum (not with ``affine``).
    """
    p, q = starts(objective)
    if affine:
        p, q = (_summing_to_one(c, objective.shares) for c in (p, q))
    before = objective.value(p, q)
    fit = alternate(objective, p, q, sweeps=sweeps, tolerance=tolerance, affine=affine)
    size = objective.scale
    first, last = _first_best(before, size), _first_best(fit.value, size)
    best = Combination(
        *(_pick(c, last) for c in (fit.p, fit.q, fit.value)),
        *(_pick(c, first) for c in (p, q, before)),
        *(_pick(c, last) for c in (fit.sweeps, fit.converged)),
    )
    best = _without_target(objective, best, before[:, 0], affine)
    if affine:
        return best
    p, q = _fix_gauge(objective, best.p, best.q)
    return best._replace(p=p, q=q)


def _sweep(
    objective: PairObjective, p: Tensor, q: Tensor, affine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The best ``p`` for ``q``, then the best ``q`` for that ``p``, and ``f`` there."""
    curvature = objective.left_curvature(q)
    p = p + _least_squares(curvature, q @ objective.cross.mT - apply(curvature, p), affine)
    curvature = objective.right_curvature(p)
    q = q + _least_squares(curvature, p @ objective.cross - apply(curvature, q), affine)
    return p, q, objective.value_at(p, q, curvature)


def _least_squares(curvature: Tensor, residual: Tensor, affine: bool) -> Tensor:
    """``curvature^+ residual``; with ``affine`` the same among vectors that sum to zero."""
    if affine:
        largest = torch.linalg.matrix_norm(curvature)[..., None]
        # What equal clients leave after centring is rounding, which only the whole shows.
        centred = _centred(_centred(curvature).mT)
        # Rounding in the eigenvectors would let the sums drift over many sweeps.
        return _centred(_curved_part(centred, _centred(residual), largest))
    factor, failed = torch.linalg.cholesky_ex(curvature)
    factored = failed == 0
    # What is left of a failed factor has no inverse.
    one = torch.eye(curvature.shape[-1], dtype=curvature.dtype, device=curvature.device)
    inverse = torch.cholesky_inverse(torch.where(factored[..., None, None], factor, one))
    condition = torch.linalg.matrix_norm(curvature) * torch.linalg.matrix_norm(inverse)
    regular = factored & (condition < _REGULAR)
    step = apply(inverse, residual)
    if not bool(regular.all()):
        step[~regular] = _curved_part(curvature[~regular], residual[~regular])
    return step


def _curved_part(curvature: Tensor, residual: Tensor, largest: Tensor | None = None) -> Tensor:
    """``curvature^+ residual`` by eigenvectors, flat ones left out; ``largest (..., 1)`` is by
    default the largest value of ``curvature``.
    """
    values, vectors = torch.linalg.eigh(curvature)
    largest = values[..., -1:] if largest is None else largest
    curved = (values > CUTOFF * largest) & (values > 0)
    inverse = torch.where(curved, 1 / values, 0.0)
    return apply(vectors, inverse * apply(vectors.mT, residual))


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(-1, keepdim=True)


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    # Rounding leaves eigenvalues of a singular matrix on either side of zero.
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT


def _summing_to_one(coefficients: Tensor, shares: Tensor) -> Tensor:
    """``coefficients`` over their sum, or ``shares`` where they nearly cancel."""
    total = coefficients.sum(-1, keepdim=True)
    usable = total.abs() > 1e-3 * coefficients.abs().sum(-1, keepdim=True)
    return torch.where(usable, coefficients / total, shares)


def _first_best(values: Tensor, size: Tensor) -> Tensor:
    """The first start of each module that no other beats by more than rounding, (L,)."""
    lowest = values.min(-1, keepdim=True).values
    return (values <= lowest + _ROUNDING * size[:, None]).int().argmax(-1)


def _pick(found: Tensor, start: Tensor) -> Tensor:
    """``found (L, S, ...)`` at each module's ``start``."""
    return found[torch.arange(len(found), device=found.device), start]


def _without_target(
    objective: PairObjective, found: Combination, means_value: Tensor, affine: bool
) -> Combination:
    """``found`` with the rule for modules whose M is zero up to rounding."""
    noise = _ROUNDING * objective.scale
    zero = objective.target <= noise
    if not bool(zero.any()):
        return found
    w = objective.shares.expand_as(found.p)
    # The means have a product although M has none: the minimum is the zero product.
    spurious = zero & (means_value > noise) & (not affine)
    p = torch.where(spurious[:, None], 0.0, w)
    value = torch.where(spurious, objective.target, means_value)
    best = Combination(
        p, w, value, p, w, value, torch.zeros_like(found.sweeps), torch.ones_like(zero)
    )
    return Combination(
        *(
            torch.where(zero.view(-1, *[1] * (old.dim() - 1)), new, old)
            for new, old in zip(best, found, strict=True)
        )
    )


def _fix_gauge(objective: PairObjective, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    shares = objective.shares
    sign = torch.where((p * shares).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    left, right = objective.traces
    b, a = (p * apply(left, p)).sum(-1), (q * apply(right, q)).sum(-1)
    mean = right @ shares @ shares
    clients = right.diagonal(dim1=-2, dim2=-1) @ shares
    wanted = torch.where(mean > _CANCELLED * clients, mean, (a * b).clamp(min=0).sqrt())
    # A zero product has no scale to fix.
    usable = (a > 0) & (b > 0) & (wanted > 0)
    scale = torch.where(usable, (wanted / a).sqrt(), 1.0)[:, None]
    return sign * p / scale, sign * q * scale
