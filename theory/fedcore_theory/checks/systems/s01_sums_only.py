"""A sum-only aggregator takes FedEx's residual away without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedcore.data.cohort import Cohort, CohortBuilder
from fedcore.data.validation import identical_rows
from fedcore.errors import FedcoreError
from fedcore.experiments.privacy import aggregate_securely
from fedcore.methods import Broadcast, Method, create_method
from fedcore.methods.requirements import EXCHANGES, SECURE_SUM, methods_meeting, refuse
from fedcore_kernels.layout import FactorLayout
from fedcore_theory.check import Check, Measured, Outcome, least, worst
from fedcore_theory.figures import bars
from fedcore_theory.models.factors import relative
from fedcore_theory.rounds import Array, server_round

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Factors = Mapping[str, Array]

Permits = Callable[[Method], None]
"""Raises where the method needs more than sums."""

_CLIENTS = 4
_GRID = 2**-18
"""A step of the secure sum's fixed point, ``16 / 2^22``."""


def draw(seed: int) -> Factors:
    """4 clients of 32 x 24 at rank 4, standard normal factors."""
    random = np.random.default_rng(seed)
    return {
        "B": random.standard_normal((_CLIENTS, 32, 4)),
        "A": random.standard_normal((_CLIENTS, 4, 24)),
    }


def from_mean_alone(method: Method) -> None:
    """Ask for the result of a mean."""
    layout = FactorLayout.build([])
    method.from_mean(torch.zeros(layout.size), layout, Broadcast(layout, torch.zeros(layout.size)))


def behind_a_sum(method: Method) -> None:
    """Ask for a round behind secure aggregation."""
    refuse(method, SECURE_SUM, "round.secure_sum")


def measure(
    cases: Iterable[Factors],
    notices: Callable[[torch.Tensor], bool] = identical_rows,
    engine_permits: Permits = behind_a_sum,
    method_permits: Permits = from_mean_alone,
) -> Outcome:
    """What is lost, what notices it, and who may run behind a sum."""
    before, after, missed, unseen, false_alarms, linear = [], [], [], [], [], []
    shown: dict[str, dict[str, float]] = {}
    for case in cases:
        # Behind a sum-only aggregator every upload arrives as the mean of all.
        same = {name: np.repeat(stack.mean(0)[None], _CLIENTS, 0) for name, stack in case.items()}
        clear, summed = (server_round("fedex", uploads) for uploads in (case, same))
        exact = (case["B"] @ case["A"]).mean(0)
        before.append(float(np.linalg.norm(clear.residual)))
        after.append(float(np.linalg.norm(summed.residual)))
        missed.append(relative(summed.product, exact))
        cohorts = [_cohort(uploads) for uploads in (case, same)]
        false_alarms.append(notices(cohorts[0].updates))
        unseen.append(not notices(cohorts[1].updates))
        linear.append(_secure_error(cohorts[0]))
        shown = shown or {
            "separate uploads": {
                "residual / mean product": before[0] / float(np.linalg.norm(exact)),
                "true error of the model": relative(clear.product, exact),
            },
            "uploads replaced by their mean": {
                "residual / mean product": after[0] / float(np.linalg.norm(exact)),
                "true error of the model": missed[0],
            },
        }
    exchanging = methods_meeting((EXCHANGES,))
    wrong = sum(
        _raises(permits, method) == method.capabilities.linear
        for permits in (engine_permits, method_permits)
        for method in exchanging
    )
    return Outcome(
        measured=(
            Measured("identical uploads that pass unnoticed", sum(unseen), "<=", 0),
            Measured("FedEx's residual from separate uploads", least(before), ">", 1),
            Measured("FedEx's residual from identical uploads", worst(after), "<=", 0),
            Measured("true relative error then", least(missed), ">", 0.5),
            Measured("separate uploads that raise an alarm", sum(false_alarms), "<=", 0),
            Measured("methods let through or refused wrongly", wrong, "<=", 0),
            Measured("FedIT behind a masked sum, error / grid step", worst(linear), "<=", 1),
        ),
        samples=f"{len(missed)} rounds; {len(exchanging)} methods, each asked at two places",
        curves=shown,
    )


def _cohort(uploads: Factors) -> Cohort:
    layout = FactorLayout.build([("w", "A", 4, 24), ("w", "B", 4, 32)])
    names = [f"{n:06d}" for n in range(_CLIENTS)]
    builder = CohortBuilder(layout, names, round=0, dtype=torch.float64)
    for n, name in enumerate(names):
        for slot in layout.factor_slots:
            value = torch.from_numpy(np.array(uploads[slot.factor][n]))
            view = layout.view(builder.row(name), slot)
            view.copy_(value.T if slot.factor == "B" else value)
        builder.receive(name, 1.0)
    return builder.finish()


def _secure_error(cohort: Cohort) -> float:
    """Largest difference between FedIT behind a masked sum and in the clear, in grid steps."""
    method = create_method("fedit")
    start = Broadcast(cohort.layout, torch.zeros(cohort.layout.size, dtype=torch.float64))
    masked = aggregate_securely(method, cohort, start, seed=0)
    return float((masked.row - method.aggregate(cohort, start).row).abs().max()) / _GRID


def _raises(permits: Permits, method: Method) -> bool:
    try:
        permits(method)
    except FedcoreError:
        return True
    return False


def picture(outcome: Outcome) -> Figure:
    """The residual vanishes and the error appears."""
    return bars(outcome.curves, "relative to the mean product")


CHECK = Check(
    id="S1",
    title="sums in place of uploads",
    claim="If an aggregator hands a non-linear method N copies of the mean, FedEx's residual is "
    "zero and the round falls back to FedAvg without a trace; the package notices bit-identical "
    "uploads, and methods that need more than a sum refuse one.",
    source="ours; the behaviour of secure aggregation is that of Flower's SecAgg+",
    verdict="holds",
    assumptions="Clients differ; secure aggregation overwrites every upload with the mean.",
    data="4 clients, 32 x 24, rank 4, standard normal factors, equal weights; seeds 0 to 4",
    draw=draw,
    measure=measure,
    picture=picture,
    repetitions=5,
    finding="The result looks like that of clients in perfect agreement, so nothing downstream can "
    "notice it. It has to be refused where uploads arrive.",
)
