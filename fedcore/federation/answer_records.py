"""How many answers of models are right, as ``answers.json`` holds it."""

from __future__ import annotations

from pydantic import Field

from fedcore.federation.record_fields import Count, Number, Record


class Difference(Record):
    """A mean difference on the same rows, with its 95% interval."""

    mean: Number
    low: Number
    high: Number


class MeasuredAnswers(Record):
    """One measure of one model: its mean over rows and every row's value, 1 for right.

    ``minus_base`` is None of the base itself.
    """

    value: Number
    standard_error: Number
    rows: tuple[float, ...] = ()
    minus_base: Difference | None = None


class TaskAnswers(Record):
    """One task: model to measure to what was measured, the base first."""

    kind: str
    n: Count
    models: dict[str, dict[str, MeasuredAnswers]]


class Answers(Record):
    """``answers.json``: by the tasks' names."""

    tasks: dict[str, TaskAnswers] = Field(default_factory=dict)
