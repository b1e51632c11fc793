"""Problems that meet the hypotheses of RoLoRA's contraction lemma, from three sines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedcore_theory.models.regressor import Regression, at_sine, random_regression
from fedcore_theory.rounds import Array

ROWS: Mapping[float, int] = {0.3: 4_000, 0.5: 4_000, 0.8: 16_000}
"""Initial sine to rows per client, enough for eps~ to stay below (1 - sine^2)/16."""

ITERATIONS = 60


@dataclass(frozen=True)
class Case:
    """A seed's problems and starts, by the initial sine."""

    starts: Mapping[float, tuple[Regression, Array]]
    seed: int


def draw(seed: int) -> Case:
    """10 clients in 5 dimensions, a problem for every sine."""
    random = np.random.default_rng(seed)
    starts = {}
    for sine, rows in ROWS.items():
        problem = random_regression(random, 10, rows, 5)
        starts[sine] = problem, at_sine(random, problem.truth, sine)
    return Case(starts, seed)
