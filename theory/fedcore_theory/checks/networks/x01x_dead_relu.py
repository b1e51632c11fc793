"""A network whose only weight is low-rank starts where a ReLU has no slope."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fedcore_theory.check import Check, Measured, Outcome, least, worst
from fedcore_theory.figures import Line, trajectories
from fedcore_theory.models.digits import Digits, Trained, split_digits, train
from fedcore_theory.rounds import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Train = Callable[[Digits, str, float, int], Trained]

METHODS = ("fedit", "ffa", "rolora")

ROUNDS, RATE = 10, 0.5


def draw(seed: int) -> Digits:
    """Two federations of 5 clients."""
    return split_digits(seed, 5, 2)


without_slope: Train = partial(train, slope_at_zero=False)
"""The shipped rounds with the derivative that torch has."""


def measure(
    cases: Iterable[Digits],
    flat: Train = without_slope,
    sloped: Train = train,
) -> Outcome:
    """Ten rounds with a derivative of 0 at 0, and with 1 as the control."""
    moved: list[float] = []
    gained: list[float] = []
    chance: list[float] = []
    curves: dict[str, Array] = {}
    for case in cases:
        first = (case.test_labels == 0).mean(-1)
        for method in METHODS:
            still, trained = (way(case, method, RATE, ROUNDS) for way in (flat, sloped))
            moved += [float(np.abs(still.A - case.A).max()), float(np.abs(still.B).max())]
            chance.append(float(np.abs(still.accuracy - first).max()))
            gained.append(float(trained.accuracy[-1].mean() - first.mean()))
            curves.setdefault(f"{method}, slope 0 at 0", still.accuracy.mean(1))
            curves.setdefault(f"{method}, slope 1 at 0", trained.accuracy.mean(1))
    return Outcome(
        measured=(
            Measured("largest change of a factor, slope 0 at 0", worst(moved), "<=", 0),
            Measured("accuracy less the share of zeros, largest", worst(chance), "<=", 0),
            Measured("accuracy gained with slope 1 at 0, smallest", least(gained), ">", 0.1),
        ),
        samples=f"{len(gained)} runs of two federations, {ROUNDS} rounds",
        curves=curves,
    )


def picture(outcome: Outcome) -> Figure:
    """Accuracy over the rounds; the flat runs lie on each other."""
    names = {"fedit": "FedAvg of LoRA", "ffa": "FFA-LoRA", "rolora": "RoLoRA"}
    rounds = np.arange(1, ROUNDS + 1)
    lines = [
        Line(f"{names[m]}, slope 1 at 0", rounds, outcome.curves[f"{m}, slope 1 at 0"])
        for m in METHODS
    ]
    still = outcome.curves[f"{METHODS[0]}, slope 0 at 0"]
    lines.append(Line("all three, slope 0 at 0", rounds, still))
    return trajectories(lines, "round", "test accuracy", log_y=False)


CHECK = Check(
    id="X1x",
    title="a ReLU without slope at the start",
    claim="relu((x A^T) B^T) head with B = 0 has every argument of the ReLU at 0; with the usual "
    "derivative of 0 there, all gradients are zero and nothing ever trains.",
    source="ours, on the toy network of RoLoRA, arXiv 2502.01755, section 5",
    verdict="holds",
    assumptions="No weight but the low-rank one before the ReLU; an adapter on a pretrained weight "
    "does not have this problem.",
    data="The networks of X1 with 5 clients, 10 rounds of 5 epochs at 0.5; seeds 0 and 1",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=2,
    derivation="The derivative at 0 is a convention; torch and JAX take 0.",
    finding="Whoever repeats such a toy has to start B elsewhere or take the other derivative.",
)
