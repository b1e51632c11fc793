"""Robust rules on the Gram matrix of products: the same models get the same verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedcore.methods import create_method
from fedcore.methods.robust.base import RobustMethod, distances
from fedcore.methods.robust.rules import RobustKrum, RobustMedian
from fedcore_kernels import product_gram
from fedcore_theory.check import Check, Measured, Outcome, least, worst
from fedcore_theory.figures import bars
from fedcore_theory.models.factors import relative
from fedcore_theory.rounds import Array, server_round

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Gram = Callable[[Array, Array], Array]
"""``A (N, r, d_in)``, ``B (N, d_out, r)`` to ``K_ij = <B_i A_i, B_j A_j>``."""

_RANK, _D_OUT, _D_IN = 4, 40, 30
_SCALINGS = np.array([4.0, 2.0, 1.0, 1.0, 2.0, 4.0])
_HONEST, _FAULTY = 7, 2

JUDGES = (RobustKrum(faulty=_FAULTY, keep=1), RobustKrum(faulty=_FAULTY), RobustMedian())
"""Rules that leave clients out."""


@dataclass(frozen=True)
class Clients:
    """Unrelated clients and the same in other gauges; honest ones, two faulty ones, their truth."""

    A: Array
    B: Array
    gauges: Array
    crowd_A: Array
    crowd_B: Array
    truth: Array


def draw(seed: int) -> Clients:
    """6 clients at rank 4 with scalings 4, 2, 1, 1, 2, 4; 7 near one model and 2 at -5 times."""
    random = np.random.default_rng(seed)
    A = random.standard_normal((6, _RANK, _D_IN))
    B = _SCALINGS[:, None, None] * random.standard_normal((6, _D_OUT, _RANK))
    gauges = np.linalg.qr(random.standard_normal((9, _RANK, _RANK))).Q
    gauges *= random.uniform(0.5, 2, (9, 1, _RANK))
    common_A = random.standard_normal((_RANK, _D_IN))
    common_B = random.standard_normal((_D_OUT, _RANK))
    count = _HONEST + _FAULTY
    crowd_A = common_A + 0.02 * random.standard_normal((count, *common_A.shape))
    crowd_B = common_B + 0.02 * random.standard_normal((count, *common_B.shape))
    # Faulty clients in the middle of the order, where ties do not favour honest ones.
    crowd_B[[1, 4]] *= -5
    return Clients(A, B, gauges, crowd_A, crowd_B, common_B @ common_A)


def shipped(A: Array, B: Array) -> Array:
    """The kernels' Gram of products, in fp64."""
    return product_gram(B.transpose(0, 2, 1)[:, None], A[:, None])[0].numpy()


def measure(
    cases: Iterable[Clients],
    gram: Gram = shipped,
    judges: Sequence[RobustMethod] = JUDGES,
    centre: str = "robust_geomedian",
) -> Outcome:
    """The Gram, its invariance, its distance floor, and what three rules make of faulty clients."""
    series: dict[str, list[float]] = {}
    shown: dict[str, dict[str, float]] = {}
    for case in cases:
        K = gram(case.A, case.B)
        products = (case.B @ case.A).reshape(6, -1)
        numbers = {
            "off the dense": relative(K, products @ products.T),
            "gauge": relative(gram(*_turned(case.A, case.B, case.gauges[:6])), K),
            "floor": _read_distance(case, 1e-8, gram),
            "above the floor": _read_distance(case, 1e-6, gram) / 1e-6,
            "single precision": _read_single(case, 1e-4),
        }
        A, B = _turned(case.crowd_A, case.crowd_B, case.gauges)
        votes = gram(A, B)
        numbers["faulty kept"] = sum(_faulty_weight(judge, votes) for judge in judges)
        uploads = {"A": A, "B": B}
        errors = {
            "Krum": _error(uploads, case, "robust_krum", faulty=_FAULTY, keep=1),
            "median": _error(uploads, case, "robust_median"),
            "geometric median": _error(uploads, case, centre),
            "mean": _error(uploads, case, "product_svd"),
        }
        for name, value in (numbers | errors).items():
            series.setdefault(name, []).append(value)
        shown = shown or {name: {"error": value} for name, value in errors.items()}
    return Outcome(
        measured=(
            Measured(
                "Gram off the dense products, relative", worst(series["off the dense"]), "<=", 1e-13
            ),
            Measured(
                "change of the Gram with gauges, relative", worst(series["gauge"]), "<=", 1e-12
            ),
            Measured(
                "faulty clients kept by Krum and medoid", worst(series["faulty kept"]), "<=", 0
            ),
            Measured("error of the geometric median", worst(series["geometric median"]), "<=", 0.1),
            Measured("error of the mean", least(series["mean"]), ">", 1),
            Measured("distance read for 1e-8 of the norm", worst(series["floor"]), "<=", 0),
            Measured(
                "distance read for 1e-6, relative error",
                worst(abs(one - 1) for one in series["above the floor"]),
                "<=",
                0.01,
            ),
            Measured(
                "a Gram in fp32, distance read for 1e-4, relative error",
                least(series["single precision"]),
                ">",
                0.5,
            ),
        ),
        samples=f"{len(series['mean'])} cohorts of 6 and of 9 clients",
        curves=shown,
    )


def _turned(A: Array, B: Array, gauges: Array) -> tuple[Array, Array]:
    """The same products, ``(B_n X_n)(X_n^-1 A_n)``."""
    return np.asarray(np.linalg.inv(gauges) @ A), B @ gauges


def _pair(case: Clients, deviation: float) -> tuple[Array, Array, float]:
    """Two clients of relative distance ``deviation``, in different gauges, and their norm."""
    B = np.stack([case.B[0], case.B[0] * (1 + deviation)])
    A = np.stack([case.A[0]] * 2)
    return *_turned(A, B, case.gauges[:2]), float(np.linalg.norm(case.B[0] @ case.A[0]))


def _read_distance(case: Clients, deviation: float, gram: Gram) -> float:
    """The shipped distance of two such clients, relative to their norm."""
    A, B, size = _pair(case, deviation)
    return float(distances(torch.from_numpy(gram(A, B)))[0, 1]) / size


def _read_single(case: Clients, deviation: float) -> float:
    """How far a distance from a Gram in fp32 is off, relative to the distance."""
    A, B, size = _pair(case, deviation)
    A, B = A.astype(np.float32), B.astype(np.float32)
    left, right = (np.einsum("iab,jac->ijbc", B, B), np.einsum("iba,jca->ijbc", A, A))
    K = (left * right).sum((2, 3)).astype(float)
    distance = np.sqrt(max(K[0, 0] + K[1, 1] - 2 * K[0, 1], 0))
    return abs(float(distance) / (size * deviation) - 1)


def _faulty_weight(method: RobustMethod, gram: Array) -> float:
    """The weight that a rule leaves to the faulty clients, of equal weights."""
    names = [f"{n:06d}" for n in range(len(gram))]
    ones = torch.ones(len(gram), dtype=torch.float64)
    weights = method.decide(names, ones, torch.from_numpy(gram)).weights
    return float(weights[[1, 4]].sum())


def _error(uploads: dict[str, Array], case: Clients, name: str, **options: int) -> float:
    return relative(server_round(create_method(name, **options), uploads).product, case.truth)


def picture(outcome: Outcome) -> Figure:
    """The rules' errors side by side."""
    return bars(outcome.curves, "relative error, 2 of 9 clients at -5 times", log_y=True)


CHECK = Check(
    id="S3",
    title="robust rules on products",
    claim="K_ij = <B_i^T B_j, A_i A_j^T> holds the inner products of the clients' updates, "
    "whatever their gauges and scalings; Krum and the medoid judged by it never pick a faulty "
    "client, and the geometric median moves little where the mean is lost.",
    source="ours; the rules are Krum, arXiv 1703.02757, and the geometric median, arXiv 1912.13445",
    verdict="holds",
    assumptions="Honest clients are close to each other; fewer than a third are faulty. Distances "
    "below 1e-7 of the norm cannot be told from rounding and read as zero.",
    data="6 clients, 40 x 30, rank 4, scalings 4, 2, 1, 1, 2, 4; 9 clients around one model with "
    "noise .02 on the factors, two of them times -5, each in a gauge of its own; seeds 0 to 4",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=5,
    finding="Judging factors instead would judge gauges. The Gram needs double precision: in "
    "single precision a distance of 1e-4 of the norm is noise.",
)
