"""What a run's quality is measured in, and which end of the scale is the good one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, isnan

from fedcore.errors import unknown_name


@dataclass(frozen=True)
class Measure:
    """One scale of quality.

    Attributes:
        name: how tables and axes call it.
        lower_is_better: whether small values are good.
        least, most: what no value lies beyond.
    """

    name: str
    lower_is_better: bool
    least: float
    most: float

    def of(self, accuracy: float | None, loss: float | None) -> float | None:
        """The value on this scale of a model with this ``accuracy`` and mean ``loss`` in nats.

        Perplexity is ``exp(loss)``. None where what it is made of is unknown.
        """
        if not self.lower_is_better:
            return accuracy
        if loss is None or isnan(loss):
            return None
        # exp overflows above 709 nats, which no mean of bounded logits reaches but garbage does.
        return exp(loss) if loss < 700 else inf

    def best(self, values: Sequence[float]) -> float | None:
        """The best of ``values``; None of nothing."""
        return (min if self.lower_is_better else max)(values, default=None)

    def worst(self, values: Sequence[float]) -> float | None:
        """The worst of ``values``; None of nothing."""
        return (max if self.lower_is_better else min)(values, default=None)

    def reaches(self, value: float, target: float) -> bool:
        """Whether ``value`` is as good as ``target``, or better."""
        return value <= target if self.lower_is_better else value >= target


ACCURACY = Measure("accuracy", lower_is_better=False, least=0.0, most=1.0)
"""Share of right predictions."""

PERPLEXITY = Measure("perplexity", lower_is_better=True, least=1.0, most=inf)
"""The exponential of the mean cross-entropy of a token: 1 is certainty."""

_OF_TASK = {"classification": ACCURACY, "causal": PERPLEXITY, "sft": PERPLEXITY}


def measure_of(task: str) -> Measure:
    """The measure in which runs of ``task`` are reported.

    Raises:
        FedcoreError: an unknown task.
    """
    if task not in _OF_TASK:
        raise unknown_name("task", task, _OF_TASK)
    return _OF_TASK[task]
