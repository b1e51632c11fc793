"""How far K local steps drift from K times the mean gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedcore_theory.check import Check, Measured, Outcome, worst
from fedcore_theory.figures import Line, trajectories
from fedcore_theory.rounds import Array, server_round

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE, LONGEST = 5, 19


@dataclass(frozen=True)
class Case:
    """Quadratics ``(x - c_n)^T H_n (x - c_n)/2``.

    Attributes:
        hessians: ``(N, 5, 5)``, positive semi-definite.
        centres: ``(N, 5)``.
        x: ``(5,)`` the common start.
        eta: the step size, ``eta max ||H_n|| <= 1``.
    """

    hessians: Array
    centres: Array
    x: Array
    eta: float


def draw(seed: int) -> Case:
    """2 to 8 clients, Hessians of rank 1 to 5, a step between a tenth of the limit and it."""
    random = np.random.default_rng(seed)
    clients, rank = int(random.integers(2, 9)), int(random.integers(1, SIZE + 1))
    roots = random.standard_normal((clients, SIZE, rank))
    hessians = roots @ roots.swapaxes(1, 2)
    eta = random.uniform(0.1, 1) / float(np.linalg.norm(hessians, 2, axis=(1, 2)).max())
    return Case(
        hessians, random.standard_normal((clients, SIZE)), random.standard_normal(SIZE), eta
    )


def local_steps(case: Case) -> Array:
    """``(19, N, 5)`` the clients after 1 to 19 gradient steps of their own."""
    x, iterates = np.broadcast_to(case.x, case.centres.shape), []
    for _ in range(LONGEST):
        x = x - case.eta * np.einsum("nij,nj->ni", case.hessians, x - case.centres)
        iterates.append(x)
    return np.stack(iterates)


def measure(cases: Iterable[Case], steps: Callable[[Case], Array] = local_steps) -> Outcome:
    """Drift over its bound for every K, and the single step's error."""
    ratios: list[Array] = []
    single: list[float] = []
    for case in cases:
        local = steps(case)
        gradients = np.einsum("nij,nj->ni", case.hessians, case.x - case.centres)
        many = np.arange(1, LONGEST + 1)
        straight = case.x - case.eta * many[:, None] * gradients.mean(axis=0)
        drift = np.linalg.norm(_averaged(local) - straight, axis=1)
        norms = np.linalg.norm(case.hessians, 2, axis=(1, 2)) * np.linalg.norm(gradients, axis=1)
        single.append(float(drift[0]))
        ratios.append(drift[1:] / (case.eta**2 * (many * (many - 1))[1:] / 2 * norms.mean()))
    every = np.array(ratios)
    return Outcome(
        measured=(
            Measured("worst drift / bound, K = 2 to 19", worst(every.ravel().tolist()), "<=", 1),
            Measured("largest drift at K = 1", worst(single), "<=", 1e-13),
        ),
        samples=f"{len(every)} problems, K = 1 to {LONGEST}",
        excludes=f"none of {len(every)} problems above the bound: a rate of violations above "
        f"{min(1.0, 3 / len(every)):.1%} among such problems is excluded at 95%",
        curves={"ratios": every},
    )


def _averaged(local: Array) -> Array:
    """``(19, 5)`` the server's means, taken for all K at once: averaging acts entry by entry."""
    count, clients, size = local.shape
    B = local.transpose(1, 0, 2).reshape(clients, -1, 1)
    uploads = {"A": np.ones((clients, 1, 1)), "B": B}
    result = server_round("rolora", uploads, previous={"A": np.ones((1, 1))}, round=0)
    return result.factors["B"].reshape(count, size)


def picture(outcome: Outcome) -> Figure:
    """The largest, median and least ratio of every K."""
    ratios = outcome.curves["ratios"]
    steps = range(2, LONGEST + 1)
    lines = [
        Line("largest", steps, ratios.max(axis=0)),
        Line("median", steps, np.median(ratios, axis=0)),
        Line("least", steps, ratios.min(axis=0)),
        Line("bound", steps, np.ones(len(steps)), bound=True),
    ]
    return trajectories(lines, "local steps K", "drift / bound")


CHECK = Check(
    id="R12",
    title="local drift",
    claim="||mean_n x_n^K - x + eta K gbar|| <= eta^2 K (K - 1)/2 mean_n ||H_n|| ||g_n|| if eta "
    "max ||H_n|| <= 1; a single step does not drift.",
    source="ours",
    verdict="holds",
    assumptions="Quadratic client losses with positive semi-definite H_n; g_n is the gradient at "
    "the common start, gbar their mean.",
    data="300 problems of 2 to 8 clients in 5 dimensions, H_n of rank 1 to 5, eta max ||H_n|| "
    "uniform on [.1, 1], K = 1 to 19; seeds 0 to 299",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=300,
    derivation="The k-th local gradient is (I - eta H_n)^k g_n, and ||(I - eta H)^k - I|| <= k eta "
    "||H|| for 0 <= eta H <= 1. Sum k over 0 to K - 1.",
    finding="With one factor frozen the loss of a linear layer under squared error is quadratic in "
    "the other, so this is the drift of a phase. At K = 1 rounds are exact gradient steps (R11).",
)
