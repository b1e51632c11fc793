"""Which starts of a tri-factor adapter have no gradient, for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from fedcore.methods import Method, create_method
from fedcore_theory.check import Check, Measured, Outcome, least, worst
from fedcore_theory.figures import Line, trajectories
from fedcore_theory.rounds import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Factors = dict[str, Array]

SUBSETS = tuple("".join(s) for n in (1, 2, 3) for s in combinations("ARB", n))
"""What may train."""

STARTS = ("ce", "lora", "random", "xs")
"""How an adapter may start, by the names that the package has for it."""

_STEPS = 60


@dataclass(frozen=True)
class Problem:
    """``1/2 ||W0 + B R A - T||^2`` with ``T - W0 (d_out, d_in)`` and the starts of the factors."""

    target: Array
    starts: dict[str, Factors]


def draw(seed: int) -> Problem:
    """A dense 10 x 8 target and rank-3 starts."""
    random = np.random.default_rng(seed)
    d_out, d_in, r = 10, 8, 3
    base = random.standard_normal((d_out, d_in)) / np.sqrt(d_in)
    u, s, vt = np.linalg.svd(base, full_matrices=False)
    left, right = (np.linalg.qr(random.standard_normal((d, r)))[0] for d in (d_out, d_in))
    zero = np.zeros((d_out, r))
    small = 1e-3 * random.standard_normal((r, d_in))
    uniform = random.uniform(-1, 1, (r, d_in)) / np.sqrt(d_in)
    return Problem(
        target=random.standard_normal((d_out, d_in)) / np.sqrt(d_in),
        starts={
            "ce": {"A": small, "R": np.eye(r), "B": zero},
            "lora": {"A": uniform, "R": np.eye(r), "B": zero},
            "random": {"A": right.T, "R": np.zeros((r, r)), "B": left},
            "xs": {
                "A": s[:r, None] * vt[:r],
                "R": 1e-5 * random.standard_normal((r, r)),
                "B": u[:, :r],
            },
        },
    )


def gradients(factors: Factors, target: Array) -> Factors:
    """Of ``1/2 ||B R A - T||^2``."""
    A, R, B = (factors[name] for name in "ARB")
    g = B @ R @ A - target
    return {"A": (B @ R).T @ g, "R": B.T @ g @ A.T, "B": g @ (R @ A).T}


def losses(start: Factors, trains: str, target: Array) -> Array:
    """The loss over gradient descent on the factors ``trains``, from ``start``."""
    factors, curve = dict(start), []
    for _ in range(_STEPS + 1):
        residual = factors["B"] @ factors["R"] @ factors["A"] - target
        curve.append(0.5 * float((residual**2).sum()))
        steps = gradients(factors, target)
        factors |= {name: factors[name] - 0.1 * steps[name] for name in trains}
    return np.array(curve)


def zero_and_frozen(start: Factors, trains: str) -> bool:
    """Whether a factor that is zero does not train: the rule under test."""
    return any(not start[name].any() for name in "ARB" if name not in trains)


def tri_methods() -> Sequence[Method]:
    """The shipped methods for such adapters."""
    return [create_method(name) for name in ("ce_lora", "ce_lora.projected", "fed_sb")]


def measure(
    cases: Iterable[Problem],
    refuses: Callable[[Factors, str], bool] = zero_and_frozen,
    methods: Callable[[], Sequence[Method]] = tri_methods,
) -> Outcome:
    """Gradients at B = 0, and every start with every choice of what trains."""
    dead, alive, moved, misjudged, stuck = [], [], [], 0, 0
    shown: dict[str, Array] = {}
    seeds = 0
    for case in cases:
        seeds += 1
        ce = case.starts["ce"]
        at_start = gradients(ce, case.target)
        dead += [float(np.abs(at_start[name]).max()) for name in "AR"]
        alive.append(float(np.linalg.norm(at_start["B"])))
        constant = {}
        for name in STARTS:
            for trains in SUBSETS:
                run = losses(case.starts[name], trains, case.target)
                constant[name, trains] = bool((run == run[0]).all())
                shown.setdefault(f"{name}, trained: {trains}", run / run[0])
                misjudged += constant[name, trains] != refuses(case.starts[name], trains)
        moved.append(float(np.ptp(losses(ce, "R", case.target))))
        for method in methods():
            trains = "".join(sorted(method.plan(0).trains, key="ARB".index))
            stuck += constant[method.adapter_options["init"], trains]
    return Outcome(
        measured=(
            Measured("largest entry of the gradients of A and R at B = 0", worst(dead), "<=", 0),
            Measured("smallest norm of the gradient of B there", least(alive), ">", 1e-4),
            Measured("change of the loss, core alone trained", worst(moved), "<=", 0),
            Measured("starts that the rule judges wrongly", misjudged, "<=", 0),
            Measured("shipped methods that start dead", stuck, "<=", 0),
        ),
        samples=f"{seeds} problems with {len(STARTS) * len(SUBSETS)} starts each, {_STEPS} steps",
        curves=shown,
    )


def picture(outcome: Outcome) -> Figure:
    """The loss over the steps, for the most instructive starts."""
    chosen = {
        "ce, trained: AR": "CE-LoRA start, A and R",
        "ce, trained: ARB": "CE-LoRA start, A, R, B",
        "lora, trained: ARB": "LoRA start, A, R, B",
        "random, trained: R": "orthonormal bases, R alone",
        "xs, trained: R": "singular vectors, R alone",
    }
    lines = [
        Line(label, np.arange(_STEPS + 1), outcome.curves[key]) for key, label in chosen.items()
    ]
    return trajectories(lines, "gradient step", "loss / loss at the start", log_y=False)


CHECK = Check(
    id="C1",
    title="dead adapters",
    claim="With B = 0 the gradients of A and R of B R A are zero, so that training the core alone, "
    "or A and the core, changes nothing for ever. A start is dead if and only if a factor that is "
    "zero does not train.",
    source="ours; the start A small, R = I, B = 0 is CE-LoRA's, arXiv 2503.23869",
    verdict="holds",
    assumptions="Gradient steps on a loss of B R A; at most one factor is zero. That the condition "
    "suffices for being dead needs nothing else; that it is necessary is for a target in general "
    "position.",
    data="10 x 8 target, rank 3, four starts by seven choices of what trains, 60 steps of 0.1; "
    "seeds 0 to 4",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=5,
    derivation="grad A = (B R)^T g and grad R = B^T g A^T vanish with B; grad B = g (R A)^T does "
    "not.",
    finding="CE-LoRA's start needs B to train, as its authors' clients do; the core alone can "
    "train between bases that are not zero. The package's tuner refuses the dead choices.",
)
