"""How many answers of a model are right, by task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn

from fedcore.answers.cached import CachedModel
from fedcore.answers.harness import HarnessTask
from fedcore.answers.likelihoods import option_likelihoods
from fedcore.answers.marking import same_formula, same_number, same_text
from fedcore.answers.sandbox import passes
from fedcore.answers.task import KINDS, AnswerTask
from fedcore.answers.writing import continuations
from fedcore.checks import count
from fedcore.errors import FedcoreError
from fedcore.training.layers import eval_mode

Progress = Callable[[str, int, int], None]
"""Called with a task's name, how many of its rows are done, and of how many."""

BATCH_SIZE = 8
"""Prompts that are read at once."""

_MARKS: Mapping[str, Callable[[str, str], bool]] = {
    "number": same_number,
    "math": same_formula,
    "exact": same_text,
}


@dataclass(frozen=True)
class TaskScore:
    """The outcome of one task, row by row.

    Attributes:
        task, kind: as the task has them; the kind of lm-eval's tasks is ``"lm-eval"``.
        rows: measure to one value per row, 1 for right and 0 for wrong, or between them as a mean
            over models. The measure that the task is compared by comes first.
    """

    task: str
    kind: str
    rows: Mapping[str, tuple[float, ...]] = field(repr=False)

    @property
    def n(self) -> int:
        """How many rows were scored."""
        return len(next(iter(self.rows.values())))

    def value(self, measure: str) -> float:
        """The mean over rows."""
        return fmean(self.rows[measure])

    def standard_error(self, measure: str) -> float | None:
        """``s / sqrt(n)`` with the sample's standard deviation; None of one row."""
        values = self.rows[measure]
        return stdev(values) / sqrt(len(values)) if len(values) > 1 else None


def score_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[AnswerTask | HarnessTask],
    *,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    run_code: bool = False,
    progress: Progress = lambda task, done, total: None,
) -> tuple[TaskScore, ...]:
    """Score a causal language model, PEFT-wrapped or not, on ``tasks``, in eval mode.

    Nothing is drawn: continuations take the likeliest token.

    Args:
        limit: of each task, only its first rows.
        batch_size: prompts that are read at once.
        run_code: whether programs that the model writes may be run, see
            :mod:`fedcore.answers.sandbox`.

    Returns:
        One score per task, in their order.

    Raises:
        FedcoreError: two tasks have one name, a task runs code and ``run_code`` is False, or a row
            does not fit the model, naming task and row; before anything is computed but the last.
        MissingExtraError: a task needs a package that is not installed.
    """
    count("", "batch_size", batch_size, least=1)
    check_tasks(tasks, run_code=run_code)
    chosen = [task.first(limit) for task in tasks]
    scores = []
    with torch.no_grad(), eval_mode(model):
        for task in chosen:
            if isinstance(task, HarnessTask):
                progress(task.name, 0, 1)
                rows = task.rows(model, tokenizer, batch_size)
                progress(task.name, 1, 1)
                scores.append(TaskScore(task.name, "lm-eval", rows))
            else:
                rows = _score(model, tokenizer, task, batch_size, progress)
                scores.append(TaskScore(task.name, task.kind, rows))
    return tuple(scores)


def check_tasks(tasks: Sequence[AnswerTask | HarnessTask], *, run_code: bool) -> None:
    """Refuse what :func:`score_tasks` would refuse, without a model.

    Raises:
        FedcoreError: no tasks, two of one name, or code that may not be run.
        MissingExtraError: a task needs a package that is not installed.
    """
    if not tasks:
        raise FedcoreError("there are no tasks; pass one or more")
    names = [task.name for task in tasks]
    for task in tasks:
        if names.count(task.name) > 1:
            raise FedcoreError(f"two tasks are called {task.name!r}; pass each once")
        if isinstance(task, HarnessTask):
            task.check()
        elif task.kind == "code" and not run_code:
            raise FedcoreError(
                f"{task.name}: its programs are run on this machine with your permissions, with "
                "limits of time and memory alone; pass --run-code (run_code=True) to run them"
            )


def mean_score(scores: Sequence[TaskScore]) -> TaskScore:
    """The mean of several models' scores on one task, row by row."""
    first = scores[0]
    means = {
        measure: tuple(
            fmean(row) for row in zip(*(score.rows[measure] for score in scores), strict=True)
        )
        for measure in first.rows
    }
    return TaskScore(first.task, first.kind, means)


def _score(
    model: nn.Module, tokenizer: Any, task: AnswerTask, batch_size: int, progress: Progress
) -> dict[str, tuple[float, ...]]:
    total = len(task.rows)
    finished = 0

    def done(rows: int) -> None:
        nonlocal finished
        finished += rows
        progress(task.name, finished, total)

    progress(task.name, 0, total)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    cached = CachedModel(model, pad)
    if task.kind == "choice":
        return _choices(task, option_likelihoods(cached, tokenizer, task, batch_size, done))
    texts = continuations(cached, tokenizer, task, batch_size, done)
    if task.kind == "code":
        right = [
            passes(row.prompt + text, str(row.answer))
            for row, text in zip(task.rows, texts, strict=True)
        ]
    else:
        mark = _MARKS[task.kind]
        right = [mark(text, str(row.answer)) for row, text in zip(task.rows, texts, strict=True)]
    return {KINDS[task.kind]: tuple(map(float, right))}


def _choices(
    task: AnswerTask, likelihoods: Sequence[Sequence[float]]
) -> dict[str, tuple[float, ...]]:
    """``acc``: the likeliest option is the right one; ``acc_norm``: the likeliest per character.

    The blanks around an option are not counted among its characters.
    """
    plain, by_characters = [], []
    for row, scores in zip(task.rows, likelihoods, strict=True):
        relative = [s / len(o.strip()) for s, o in zip(scores, row.options, strict=True)]
        plain.append(float(_largest(scores) == row.answer))
        by_characters.append(float(_largest(relative) == row.answer))
    return {"acc": tuple(plain), "acc_norm": tuple(by_characters)}


def _largest(values: Sequence[float]) -> int:
    """The index of the largest value, the first of equal ones."""
    return max(range(len(values)), key=values.__getitem__)
