"""Rounds of clients whose factors differ in one way each: drift, scale, gauge, or altogether.

Left blocks are Gaussian with entries of variance ``1 / d_out``, right blocks ``1 / d_in``, so that
every block's singular values are near 1 and products of a common start weigh about ``sqrt(r)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fedcore_theory.models.factors import ClientFactors
from fedcore_theory.rounds import Array

Random = np.random.Generator


class Shape(NamedTuple):
    """Sizes of a round: N clients, a weight of ``d_out x d_in``, the adapters' rank."""

    clients: int
    d_out: int
    d_in: int
    rank: int


def consensus(random: Random, shape: Shape, drift: float = 0.3) -> ClientFactors:
    """A common start and private deviations of both factors."""
    B, A = _start(random, shape)
    E, E_right = _private(random, shape)
    return _equal(B + drift * E, A + drift * E_right)


def round1(random: Random, shape: Shape, drift: float = 0.3) -> ClientFactors:
    """The first round: B was zero and is private, A was common and drifted."""
    _, A = _start(random, shape)
    E, E_right = _private(random, shape)
    return _equal(E, A + drift * E_right)


def corr(random: Random, shape: Shape) -> ClientFactors:
    """Clients that went different lengths ``t_n ~ N(0, 1)`` in one direction of both factors."""
    B, A = _start(random, shape)
    E, E_right = _start(random, shape)
    lengths = random.standard_normal((shape.clients, 1, 1))
    private, private_right = _private(random, shape)
    return _equal(B + lengths * E + 0.1 * private, A + lengths * E_right + 0.1 * private_right)


def indep(random: Random, shape: Shape) -> ClientFactors:
    """Nothing in common."""
    return _equal(*_private(random, shape))


def scalar(random: Random, shape: Shape, drift: float = 0.3) -> ClientFactors:
    """``consensus`` with one scale and one sign per client, which no product shows."""
    near = consensus(random, shape, drift)
    signs = random.choice([-1.0, 1.0], size=shape.clients)
    scales = (signs * np.exp(random.standard_normal(shape.clients)))[:, None, None]
    return _equal(near.B * scales, near.A / scales)


def rot(random: Random, shape: Shape, drift: float = 0.3) -> ClientFactors:
    """``consensus`` with one rotation per client, which no product shows."""
    near = consensus(random, shape, drift)
    turns = haar(random, shape.clients, shape.rank)
    return _equal(near.B @ turns, turns.transpose(0, 2, 1) @ near.A)


FAMILIES: Mapping[str, Callable[[Random, Shape], ClientFactors]] = {
    "consensus": consensus,
    "round1": round1,
    "corr": corr,
    "indep": indep,
    "scalar": scalar,
    "rot": rot,
}
"""All of them, at a drift of 0.3 where there is one."""


def weighted(random: Random, factors: ClientFactors, concentration: float = 1.0) -> ClientFactors:
    """The same factors with Dirichlet weights."""
    weights = random.dirichlet(np.full(len(factors.A), concentration))
    return replace(factors, weights=weights)


def haar(random: Random, count: int, rank: int) -> Array:
    """``(count, rank, rank)`` orthogonal matrices of Haar's distribution, reflections included."""
    Q, R = np.linalg.qr(random.standard_normal((count, rank, rank)))
    return np.asarray(Q * np.sign(np.einsum("nii->ni", R))[:, None, :])


def _start(random: Random, shape: Shape) -> tuple[Array, Array]:
    """``(d_out, r)`` and ``(r, d_in)``."""
    return (
        random.standard_normal((shape.d_out, shape.rank)) / np.sqrt(shape.d_out),
        random.standard_normal((shape.rank, shape.d_in)) / np.sqrt(shape.d_in),
    )


def _private(random: Random, shape: Shape) -> tuple[Array, Array]:
    """``(N, d_out, r)`` and ``(N, r, d_in)``."""
    N, d_out, d_in, r = shape
    return (
        random.standard_normal((N, d_out, r)) / np.sqrt(d_out),
        random.standard_normal((N, r, d_in)) / np.sqrt(d_in),
    )


def _equal(B: Array, A: Array) -> ClientFactors:
    return ClientFactors(A, B, np.full(len(A), 1 / len(A)))
