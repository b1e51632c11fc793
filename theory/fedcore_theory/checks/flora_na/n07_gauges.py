"""Which changes of gauge the nearest combination does not notice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedcore.methods.lora.flora_na.method import FloraNA
from fedcore_theory.check import Check, Measured, Outcome, least, worst
from fedcore_theory.figures import bars
from fedcore_theory.models.combinations import (
    Coefficients,
    combined,
    nearest,
    squared_error,
    squared_size,
    tail,
)
from fedcore_theory.models.factors import ClientFactors, relative
from fedcore_theory.models.families import Random, Shape, consensus, rot, weighted
from fedcore_theory.rounds import Array, server_round

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Solve = Callable[[ClientFactors], Coefficients]
Product = Callable[[ClientFactors], Array]


class Gauges(NamedTuple):
    """A round, the same in other gauges, and rounds of rotated clients."""

    plain: ClientFactors
    common: ClientFactors
    scaled: ClientFactors
    stretched: ClientFactors
    order: NDArray[np.int64]
    permuted: ClientFactors
    rotated: dict[str, ClientFactors]


def draw(seed: int) -> Gauges:
    """5 clients of 40 x 50 at rank 4; rotated ones of 256 x 256 with (N, r) = (5, 16), (30, 8)."""
    random = np.random.default_rng(seed)
    plain = weighted(random, consensus(random, Shape(5, 40, 50, 4), drift=0.5))
    A, B, w = plain.A, plain.B, plain.weights
    gauge: Array = random.standard_normal((4, 4))
    scales = random.choice([-1.0, 1.0], size=(5, 1, 1)) * np.exp(random.standard_normal((5, 1, 1)))
    order = random.permutation(5)
    shapes = {"N=5, r=16": Shape(5, 256, 256, 16), "N=30, r=8": Shape(30, 256, 256, 8)}
    return Gauges(
        plain,
        common=ClientFactors(np.asarray(np.linalg.solve(gauge, A)), B @ gauge, w),
        scaled=ClientFactors(A / scales, B * scales, w),
        stretched=ClientFactors(3 * A, 2 * B, w),
        order=order,
        permuted=ClientFactors(A[order], B[order], w[order]),
        rotated={name: _rotated(random, shape) for name, shape in shapes.items()},
    )


def _rotated(random: Random, shape: Shape) -> ClientFactors:
    return weighted(random, rot(random, shape), concentration=5.0)


def aligned(clients: ClientFactors) -> Array:
    """The method's aggregate after it aligned the clients to one gauge."""
    uploads = {"A": clients.A, "B": clients.B}
    return server_round(FloraNA(align=True), uploads, clients.weights).product


def measure(cases: Iterable[Gauges], solve: Solve = nearest, align: Product = aligned) -> Outcome:
    """Changes under each gauge, and what rotations cost with and without alignment."""
    changes: dict[str, list[float]] = {
        name: []
        for name in (
            "f, common gauge",
            "f, scales",
            "p and q, stretch",
            "p q^T, order",
            "size of A^ against Abar's",
        )
    }
    signs, means, turned, cured = [], [], [], []
    heights: dict[str, dict[str, float]] = {}
    for case in cases:
        base = solve(case.plain)
        share = _share(case.plain, base)
        pair = np.outer(*base)
        scaled, stretched = solve(case.scaled), solve(case.stretched)
        common = solve(case.common)
        changes["f, common gauge"].append(abs(_share(case.common, common) / share - 1))
        changes["f, scales"].append(abs(_share(case.scaled, scaled) / share - 1))
        changes["p and q, stretch"].append(
            worst([relative(stretched.p, base.p), relative(stretched.q, base.q)])
        )
        permuted = solve(case.permuted)
        changes["p q^T, order"].append(
            relative(np.outer(*permuted), pair[np.ix_(case.order, case.order)])
        )
        for clients, point in ((case.plain, base), (case.scaled, scaled)):
            sizes = [
                np.linalg.norm(np.tensordot(c, clients.A, 1)) for c in (point.q, clients.weights)
            ]
            changes["size of A^ against Abar's"].append(float(abs(sizes[0] / sizes[1] - 1)))
            signs.append(float(point.p @ clients.weights))
        means.append(
            _share(case.scaled, _weights(case.scaled)) / _share(case.plain, _weights(case.plain))
        )
        for name, clients in case.rotated.items():
            size, floor = np.sqrt(squared_size(clients)), tail(clients)
            plain_error = float(
                np.linalg.norm(clients.mean_product - combined(clients, solve(clients)))
            )
            aligned_error = float(np.linalg.norm(clients.mean_product - align(clients)))
            turned.append(plain_error / floor)
            cured.append(aligned_error / floor)
            parts = {"as they are": plain_error, "aligned": aligned_error, "SVD": floor}
            heights.setdefault(name, {key: value / size for key, value in parts.items()})
    return Outcome(
        measured=(
            *(
                Measured(f"change: {name}", worst(values), "<=", 1e-9)
                for name, values in changes.items()
            ),
            Measured("least p^T w", least(signs), ">=", 0),
            Measured("FedAvg's f under scales / before", least(means), ">", 2),
            Measured("error of rotated clients / SVD's", least(turned), ">", 5),
            Measured("error of rotated clients, aligned / SVD's", worst(cured), "<", 1.1),
        ),
        samples=f"{len(means)} rounds in every gauge, {len(turned)} of rotated clients",
        curves=heights,
    )


def _share(clients: ClientFactors, point: Coefficients) -> float:
    return squared_error(clients, point) / squared_size(clients)


def _weights(clients: ClientFactors) -> Coefficients:
    return Coefficients(clients.weights, clients.weights)


def picture(outcome: Outcome) -> Figure:
    """Relative errors of the first round of rotated clients of each shape."""
    return bars(outcome.curves, "||M - B^ A^|| / ||M||", log_y=True)


CHECK = Check(
    id="N7",
    title="gauges",
    claim="One invertible matrix for all clients, one scale or sign per client, the order of the "
    "clients, and B -> 2 B, A -> 3 A leave the fit alone. One rotation per client does not: no "
    "product changes, but the error grows tenfold; aligning the clients to one gauge first mends "
    "it.",
    source="ours; the problem is FLoRA-NA's, arXiv 2509.26399",
    verdict="holds",
    assumptions="Equal ranks; the fit ends in the same minimum in every gauge.",
    data="5 clients, 40 x 50, rank 4, consensus with drift 0.5, Dirichlet(1) weights; rotated "
    "consensus clients with drift 0.3, 256 x 256, (N, r) = (5, 16) and (30, 8), Dirichlet(5) "
    "weights; seeds 2 to 5",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=4,
    first_seed=2,
    derivation="f depends on the products of sums only: B_n X and X^-1 A_n change none of them, "
    "and p_n -> p_n / c_n, q_n -> q_n c_n undoes c_n B_n, A_n / c_n.",
    finding="Coefficients repair scales and signs, which ruin FedAvg of the factors; they cannot "
    "repair rotations, for which align is meant.",
)
