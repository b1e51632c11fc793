"""How many answers of models are right, as ``answers.json`` holds it."""

from __future__ import annotations

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from fedcore.federation.record_fields import Count, Names, Number, Record


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
    """One task: model to measure to what was measured; ``names`` are the models, the base first."""

    kind: str
    n: Count
    names: Names = ()
    models: dict[str, dict[str, MeasuredAnswers]]

    @model_validator(mode="after")
    def _complete(self) -> TaskAnswers:
        measures = [set(measured) for measured in self.models.values()]
        if not measures or any(one != measures[0] for one in measures):
            raise PydanticCustomError("measures", "models with the same measures each")
        if self.names and set(self.names) != set(self.models):
            raise PydanticCustomError("names", "the names of its models")
        return self


class Answers(Record):
    """``answers.json``: by the tasks' names."""

    tasks: dict[str, TaskAnswers] = Field(default_factory=dict)
