"""Tables of answers: how many were right, against the base model."""

from __future__ import annotations

from fedcore.federation.answer_records import Answers, Difference, MeasuredAnswers
from fedcore.reports.formatting import rate, signed, with_half_width
from fedcore.reports.grid import Column, Grid

_COLUMNS = (
    Column("model", number=False),
    Column("measure", number=False),
    Column("value"),
    Column("standard\nerror"),
    Column("n"),
    Column("minus base"),
)
_NOTE = "n: rows. minus base: the mean difference on the same rows, with its 95% interval."


def answer_grids(answers: Answers) -> tuple[Grid, ...]:
    """One table per task, one row per model and measure."""
    grids: list[Grid] = []
    for name, task in answers.tasks.items():
        # A file's keys are sorted; one without names is another's.
        names = task.names or tuple(task.models)
        rows = [
            (model, measure, *_cells(task.models[model][measure], task.n))
            for measure in task.models[names[0]]
            for model in names
        ]
        last = len(grids) + 1 == len(answers.tasks)
        grids.append(Grid(f"{name} ({task.kind})", _COLUMNS, tuple(rows), _NOTE if last else ""))
    return tuple(grids)


def _cells(measured: MeasuredAnswers, n: int) -> tuple[str, ...]:
    minus = "" if measured.minus_base is None else _interval(measured.minus_base)
    return rate(measured.value), rate(measured.standard_error), str(n), minus


def _interval(difference: Difference) -> str:
    low, high = difference.low, difference.high
    half = None if low is None or high is None else (high - low) / 2
    return with_half_width(signed(difference.mean), half)
