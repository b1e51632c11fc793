"""Between common bases, averaging cores is exact, and a step on the core is a projected step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedcore.methods.tri.ce_lora.method import CELoRA
from fedcore_theory.check import Check, Measured, Outcome, worst
from fedcore_theory.figures import bars
from fedcore_theory.models.tri_factors import CommonBases, TriClients
from fedcore_theory.rounds import Array, Round, server_round

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPERATURE = 0.2
_RATE = 0.1


@dataclass(frozen=True)
class Case:
    """Clients that hold the same orthonormal bases, and gradients ``(N, d_out, d_in)`` there."""

    clients: TriClients
    bases: CommonBases
    gradients: Array


Averaged = Callable[[TriClients, CommonBases], Round]
CoreGradient = Callable[[CommonBases, Array], Array]


def draw(seed: int) -> Case:
    """6 clients, 14 x 11, rank 3, Dirichlet(1) weights."""
    random = np.random.default_rng(seed)
    clients, d_out, d_in, r = 6, 14, 11, 3
    B, right = (np.linalg.qr(random.standard_normal((d, r)))[0] for d in (d_out, d_in))
    A = np.ascontiguousarray(right.T)
    adapters = TriClients(
        A=np.broadcast_to(A, (clients, r, d_in)),
        R=np.eye(r) + 0.3 * random.standard_normal((clients, r, r)),
        B=np.broadcast_to(B, (clients, d_out, r)),
        weights=random.dirichlet(np.ones(clients)),
    )
    return Case(adapters, CommonBases(A, B), random.standard_normal((clients, d_out, d_in)))


def fed_sb(clients: TriClients, bases: CommonBases) -> Round:
    """The shipped mean of cores."""
    previous = {"A": bases.A, "B": bases.B, "R": np.eye(len(bases.A))}
    return server_round("fed_sb", clients.uploads, clients.weights, previous)


def ce_lora(clients: TriClients, bases: CommonBases) -> Round:
    """The shipped mixes of cores, weighted by the cosine of ``R - I`` alone."""
    method = CELoRA(lam=0.0, temperature=TEMPERATURE)
    return server_round(method, clients.uploads, clients.weights)


def core_gradient(bases: CommonBases, gradient: Array) -> Array:
    """``B^T g A^T``, for a stack of gradients too."""
    return bases.B.T @ gradient @ bases.A.T


def measure(
    cases: Iterable[Case],
    mean: Averaged = fed_sb,
    mixes: Averaged = ce_lora,
    gradient: CoreGradient = core_gradient,
) -> Outcome:
    """The mean, every client's mix, and one step of gradient descent on the cores."""
    errors: dict[str, list[float]] = {"mean": [], "mixes": [], "step": []}
    for case in cases:
        clients, bases = case.clients, case.bases
        exact = clients.mean_product
        errors["mean"].append(_distance(mean(clients, bases).product, exact))
        personal = mixes(clients, bases).personal
        wanted = np.einsum("ij,jod->iod", _shares(clients.R), clients.products)
        errors["mixes"] += [
            _distance(bases.B @ personal[n]["R"] @ bases.A, wanted[n]) for n in range(len(wanted))
        ]
        stepped = TriClients(
            A=clients.A,
            R=clients.R[:1] - _RATE * gradient(bases, case.gradients),
            B=clients.B,
            weights=clients.weights,
        )
        left, right = bases.B @ np.linalg.pinv(bases.B), np.linalg.pinv(bases.A) @ bases.A
        g = np.einsum("n,noi->oi", clients.weights, case.gradients)
        projected = bases.B @ clients.R[0] @ bases.A - _RATE * left @ g @ right
        errors["step"].append(_distance(mean(stepped, bases).product, projected))
    return Outcome(
        measured=(
            Measured(
                "largest entry of the error, mean of cores", worst(errors["mean"]), "<=", 1e-13
            ),
            Measured("the same, each client's mix", worst(errors["mixes"]), "<=", 1e-13),
            Measured("the same, a step against P_B g P_A", worst(errors["step"]), "<=", 1e-13),
        ),
        samples=f"{len(errors['mean'])} rounds of 6 clients",
        curves=errors,
    )


def _shares(R: Array) -> Array:
    """``softmax_j(cos(R_i - I, R_j - I) / temperature)``, entry by entry."""
    moves = (R - np.eye(R.shape[1])).reshape(len(R), -1)
    lengths = np.linalg.norm(moves, axis=1)
    exponentials = np.exp(moves @ moves.T / np.outer(lengths, lengths) / TEMPERATURE)
    return np.asarray(exponentials / exponentials.sum(1, keepdims=True))


def _distance(found: Array, exact: Array) -> float:
    return float(np.abs(found - exact).max())


def picture(outcome: Outcome) -> Figure:
    """The largest error of each seed, beside what is allowed."""
    names = {"mean": "mean", "mixes": "clients' mixes", "step": "step on the core"}
    seeds = len(outcome.curves["mean"])
    groups = {
        f"seed {n}": {
            label: worst(np.array_split(outcome.curves[key], seeds)[n])
            for key, label in names.items()
        }
        for n in range(seeds)
    }
    return bars(groups, "largest entry of the error", log_y=True, marks={"allowed": 1e-13})


CHECK = Check(
    id="C2",
    title="cores between common bases",
    claim="With common A and B any weighted mean of cores is the mean of the models: B (sum w_n "
    "R_n) A = sum w_n B R_n A. If the bases are orthonormal, a gradient step on R moves the weight "
    "by P_B g P_A: B (B^T g A^T) A = P_B g P_A.",
    source="ours; exact averaging of cores is the point of Fed-SB, arXiv 2502.15436",
    verdict="holds",
    assumptions="All clients hold identical bases, bit for bit; for the step, orthonormal ones.",
    data="6 clients, 14 x 11, rank 3, cores I + 0.3 N(0, 1), Dirichlet(1) weights; seeds 0 to 4",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=5,
    finding="Exact in Fed-SB and in every client's mix of CE-LoRA, as long as bases are common; "
    "what a core can learn is confined to the spans of its bases.",
)
