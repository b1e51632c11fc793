"""What a comparison of answers says, each model against the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedcore.answers.candidates import BASE
from fedcore.answers.scoring import TaskScore
from fedcore.federation.answer_records import Answers, Difference, MeasuredAnswers, TaskAnswers
from fedcore.reports.intervals import Estimate, estimate

Scores = Mapping[str, Sequence[TaskScore]]
"""Model to one score per task, the same tasks for all."""


def paired_difference(score: TaskScore, base: TaskScore, measure: str) -> Estimate:
    """The mean of ``score - base`` row by row, with its 95% Student-t interval over rows."""
    pairs = zip(score.rows[measure], base.rows[measure], strict=True)
    return estimate([one - other for one, other in pairs])


def answers_of(scores: Scores) -> Answers:
    """The record of ``scores``, of every task, model and measure, with every row's value."""
    tasks: dict[str, TaskAnswers] = {}
    for i, base in enumerate(scores[BASE]):
        models = {
            model: {measure: _measured(model, task[i], base, measure) for measure in task[i].rows}
            for model, task in scores.items()
        }
        tasks[base.task] = TaskAnswers(kind=base.kind, n=base.n, names=tuple(models), models=models)
    return Answers(tasks=tasks)


def _measured(model: str, score: TaskScore, base: TaskScore, measure: str) -> MeasuredAnswers:
    difference = None
    if model != BASE:
        paired = paired_difference(score, base, measure)
        difference = Difference(mean=paired.mean, low=paired.low, high=paired.high)
    return MeasuredAnswers(
        value=score.value(measure),
        standard_error=score.standard_error(measure),
        rows=score.rows[measure],
        minus_base=difference,
    )
