"""From the bytes of a file to a record, with errors that name file, line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fedcore.data.folders import OWN_LIMIT, read_json
from fedcore.errors import FedcoreError
from fedcore.federation.record_fields import Record

AnyRecord = TypeVar("AnyRecord", bound=Record)


def parse_json(text: bytes, where: str) -> tuple[Any, int]:
    """JSON with NaN and infinities as ``None``, and how many of these there were.

    Raises:
        FedcoreError: it is not JSON.
    """
    undefined: list[str] = []
    try:
        return json.loads(text, parse_constant=undefined.append), len(undefined)
    except ValueError as error:
        raise FedcoreError(f"{where} is not JSON in UTF-8: {error}") from None


def validated(model: type[AnyRecord], values: Any, where: str) -> AnyRecord:
    """``values``, which were read from ``where``, as a ``model``.

    Raises:
        FedcoreError: naming the place, the first wrong field, and what it must be.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise FedcoreError(f"{where}{_problem(error)}") from None


def read_record(model: type[AnyRecord], path: Path) -> AnyRecord:
    """The file ``path`` as a ``model``.

    Raises:
        FedcoreError: as :func:`fedcore.data.folders.read_json` and :func:`validated`.
    """
    # In files of version 0.1 the perplexity of a loss that diverged is infinite.
    values = read_json(path, "the run", limit=OWN_LIMIT, finite=False)
    return validated(model, values, str(path))


_WANTED = {
    "float_type": "a number or null",
    "int_type": "a whole number",
    "string_type": "a string",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}


def _problem(error: ValidationError) -> str:
    """The first error, worded as all of ours, behind the place where it was read from."""
    problem = error.errors(include_url=False)[0]
    kind, message = problem["type"], problem["msg"]
    steps: list[str] = []
    for step in problem["loc"]:
        if isinstance(step, int):
            steps[-1] += f"[{step}]"
        else:
            steps.append(step)
    inside = "".join(f", {step}" if step.endswith("]") else f", {step!r}" for step in steps[:-1])
    if kind == "missing":
        return f"{inside}: " + (f"field {steps[-1]!r} is missing" if steps else message)
    wanted = _WANTED.get(kind, message.removeprefix("Input should be "))
    shown = repr(problem["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    subject = f"{steps[-1]!r} is {shown}" if steps else f"it is {shown}"
    return f"{inside}: {subject}; it must be {wanted}"
