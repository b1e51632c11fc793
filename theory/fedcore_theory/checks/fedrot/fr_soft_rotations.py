"""Soft rotations rotate every plane part of the way and never change the client's model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.linalg import block_diag

from fedcore.methods.lora.fedrot import FedRot
from fedcore_kernels import soft_rotation
from fedcore_theory.check import Check, Measured, Outcome, least, worst
from fedcore_theory.figures import Line, trajectories
from fedcore_theory.models.gram_rounds import orthogonal
from fedcore_theory.rounds import Array, Round, server_round

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)

Soft = Callable[[Array, float], Array]
"""A matrix and a strength to the rotation part of the way to the nearest one."""

Send = Callable[["Turned", FedRot], Round]


@dataclass(frozen=True)
class Turned:
    """A rotation of known angles, and a client that differs from the reference by a rotation.

    Attributes:
        basis: ``(6, 6)`` orthogonal; its columns span three planes.
        angles: ``(3,)`` by which they are rotated.
        A, B: ``(4, 30)`` and ``(20, 4)`` the reference.
        gauge: ``(4, 4)`` of determinant +1, by which the client's factors are rotated.
        noise: ``(4, 30)`` and ``(20, 4)``, what else it changed.
    """

    basis: Array
    angles: Array
    A: Array
    B: Array
    gauge: Array
    noise: tuple[Array, Array]

    def rotation(self, angles: Array) -> Array:
        """The rotation by ``angles`` in the planes of ``basis``."""
        blocks = [[[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]] for t in angles]
        return np.asarray(self.basis @ block_diag(*blocks) @ self.basis.T)

    @property
    def own(self) -> tuple[Array, Array]:
        """The client's A and B."""
        return self.gauge @ (self.A + self.noise[0]), (self.B + self.noise[1]) @ self.gauge.T


def draw(seed: int) -> Turned:
    """Angles below 3 in three planes of R^6; one client of a 20 x 30 weight at rank 4."""
    random = np.random.default_rng(seed)
    gauge = orthogonal(random, 4)
    gauge[0] *= np.sign(np.linalg.det(gauge))
    return Turned(
        orthogonal(random, 6),
        random.uniform(-3, 3, 3),
        random.standard_normal((4, 30)),
        random.standard_normal((20, 4)),
        gauge,
        (0.05 * random.standard_normal((4, 30)), 0.05 * random.standard_normal((20, 4))),
    )


def shipped(matrix: Array, strength: float) -> Array:
    """The op that clients use."""
    return soft_rotation(torch.from_numpy(matrix), strength).rotation.numpy()


def upload(case: Turned, method: FedRot) -> Round:
    """What ``fedrot`` makes of one client alone in round 1, where A is the reference."""
    A, B = case.own
    return server_round(
        method, {"A": A[None], "B": B[None]}, None, {"A": case.A, "B": case.B}, round=1
    )


def measure(cases: Iterable[Turned], soft: Soft = shipped, send: Send = upload) -> Outcome:
    """Angles, commutation, the distance to I, reflections, and one client's upload."""
    angles, commuting, lengths, signs, products = [], [], [], [], []
    jumps: list[tuple[float, float]] = []
    apart: list[list[float]] = []
    for case in cases:
        whole = case.rotation(case.angles)
        mirrored = whole @ np.diag([-1.0, 1, 1, 1, 1, 1])
        for strength in STRENGTHS:
            softened = soft(whole, strength)
            part = np.arctan2(
                strength * np.sin(case.angles), 1 - strength + strength * np.cos(case.angles)
            )
            angles.append(float(np.abs(softened - case.rotation(part)).max()))
            commuting.append(float(np.abs(softened @ whole - whole @ softened).max()))
            limit = 2 * strength * np.linalg.norm(whole - np.eye(6))
            lengths.append(float(np.linalg.norm(softened - np.eye(6)) - limit))
            signs.append(float(np.linalg.det(soft(mirrored, strength))))
        jumps.append((_towards(mirrored, 0.4), _towards(mirrored, 0.6)))
        apart.append([])
        A, B = case.own
        for strength in STRENGTHS:
            sent = send(case, FedRot(strength=strength))
            product = np.linalg.norm(sent.product - B @ A) / np.linalg.norm(B @ A)
            products.append(float(product))
            apart[-1].append(float(np.linalg.norm(sent.factors["A"] - case.A)))
    distances = np.array(apart)
    return Outcome(
        measured=(
            Measured("soft rotation against its angles, largest entry", worst(angles), "<=", 1e-12),
            Measured("commutator with the whole rotation", worst(commuting), "<=", 1e-12),
            Measured("||O - I|| above 2 strength ||O* - I||", worst(lengths), "<=", 1e-12),
            Measured("least determinant, also towards reflections", least(signs), ">=", 1 - 1e-12),
            Measured(
                "determinant of a plain interpolation at .4",
                least(j[0] for j in jumps),
                ">=",
                1 - 1e-12,
            ),
            Measured("the same at .6", worst(j[1] for j in jumps), "<=", -1 + 1e-12),
            Measured("change of the client's product, relative", worst(products), "<=", 1e-12),
            Measured(
                "distance to the reference, rotated / as it was",
                worst(distances[:, -1] / distances[:, 0]),
                "<=",
                0.2,
            ),
            Measured(
                "largest growth of the distance with the strength",
                worst(np.diff(distances, axis=1).ravel()),
                "<=",
                1e-9,
            ),
        ),
        samples=f"{len(jumps)} rotations and clients, {len(STRENGTHS)} strengths each",
        curves={"distances": distances},
    )


def _towards(mirrored: Array, strength: float) -> float:
    """The determinant of ``polar((1 - strength) I + strength O)``, O a reflection."""
    left, _, right = np.linalg.svd((1 - strength) * np.eye(len(mirrored)) + strength * mirrored)
    return float(np.linalg.det(left @ right))


def picture(outcome: Outcome) -> Figure:
    """Each client's distance to the reference over the strength."""
    lines = [
        Line(f"client {n}", STRENGTHS, distances)
        for n, distances in enumerate(outcome.curves["distances"][:5])
    ]
    floor = {"noise alone": 0.05 * np.sqrt(120)}
    return trajectories(lines, "strength", "‖Oᵀ Aₙ − A_prev‖", marks=floor)


CHECK = Check(
    id="FR",
    title="soft rotations",
    claim="O = polar((1 - lam) I + lam O*) rotates a plane that O* rotates by t by "
    "atan2(lam sin t, 1 - lam + lam cos t), commutes with O*, and is at most 2 lam ||O* - I|| "
    "from I. O* has determinant +1: on the way to a reflection O would jump from a rotation to a "
    "reflection at lam = 1/2. B_n O O^T A_n = B_n A_n.",
    source="FedRot-LoRA, arXiv 2602.23638; the bound is known to us from secondary summaries "
    "only; angles, commutation and the jump are ours",
    verdict="holds",
    assumptions="No plane is rotated by exactly pi when lam = 1/2.",
    data="Three planes of R^6, angles uniform in (-3, 3); a client of 20 x 30 at rank 4 rotated "
    "by a Haar rotation, plus .05 N(0, 1); strengths 0 to 1; seeds 0 to 9",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=10,
    derivation="In the complex form of a plane, (1 - lam) + lam e^{it} over its modulus. A "
    "reflection has an eigenvalue -1, whose interpolant 1 - 2 lam changes sign.",
    finding="The bound follows from the triangle inequality and says little; the angles say "
    "everything. A client that differs by a rotation and little noise is brought to within the "
    "noise.",
)
