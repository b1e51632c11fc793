"""What a comparison of answers says: a table, and the same as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedcore.answers.candidates import BASE
from fedcore.answers.scoring import TaskScore
from fedcore.reports.formatting import rate, signed, with_half_width
from fedcore.reports.grid import Column, Grid
from fedcore.reports.intervals import Estimate, estimate

Scores = Mapping[str, Sequence[TaskScore]]
"""Model to one score per task, the same tasks for all."""

_COLUMNS = (
    Column("model", number=False),
    Column("measure", number=False),
    Column("value"),
    Column("standard\nerror"),
    Column("n"),
    Column("minus base"),
)
_NOTE = "n: rows. minus base: the mean difference on the same rows, with its 95% interval."


def paired_difference(score: TaskScore, base: TaskScore, measure: str) -> Estimate:
    """The mean of ``score - base`` row by row, with its 95% Student-t interval over rows."""
    pairs = zip(score.rows[measure], base.rows[measure], strict=True)
    return estimate([one - other for one, other in pairs])


def answer_grids(scores: Scores) -> tuple[Grid, ...]:
    """One table per task, one row per model and measure."""
    tasks = len(next(iter(scores.values())))
    grids = []
    for i in range(tasks):
        rows = [
            _cells(model, task[i], scores[BASE][i], measure)
            for measure in scores[BASE][i].rows
            for model, task in scores.items()
        ]
        task = scores[BASE][i]
        note = _NOTE if i == tasks - 1 else ""
        grids.append(Grid(f"{task.task} ({task.kind})", _COLUMNS, tuple(rows), note))
    return tuple(grids)


def answers_json(scores: Scores) -> dict[str, Any]:
    """The same numbers, with every row's, as plain JSON: task, then model, then measure."""
    tasks: dict[str, Any] = {}
    for i, base in enumerate(scores[BASE]):
        models = {
            model: {
                measure: {
                    "value": task[i].value(measure),
                    "standard_error": task[i].standard_error(measure),
                    "rows": list(task[i].rows[measure]),
                    "minus_base": None
                    if model == BASE
                    else _plain(paired_difference(task[i], base, measure)),
                }
                for measure in task[i].rows
            }
            for model, task in scores.items()
        }
        tasks[base.task] = {"kind": base.kind, "n": base.n, "models": models}
    return {"tasks": tasks}


def _cells(model: str, score: TaskScore, base: TaskScore, measure: str) -> tuple[str, ...]:
    difference = ""
    if model != BASE:
        paired = paired_difference(score, base, measure)
        difference = with_half_width(signed(paired.mean), paired.half_width)
    values = rate(score.value(measure)), rate(score.standard_error(measure))
    return (model, measure, *values, str(score.n), difference)


def _plain(difference: Estimate) -> dict[str, float | None]:
    return {"mean": difference.mean, "low": difference.low, "high": difference.high}
