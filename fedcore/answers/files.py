"""A task of one's own: a JSON-lines file of prompts with options, answers or tests."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcore.answers.marking import is_numeric
from fedcore.answers.task import DEFAULT_STOPS, AnswerTask, Row
from fedcore.checks import choice, is_integer, is_number
from fedcore.errors import FedcoreError, printable, unknown_name
from fedcore.training.table_files import json_lines

COLUMNS = ("prompt", "options", "answer", "tests")
"""What a row may have."""

WRITTEN_KINDS = ("number", "math", "exact")
"""The kinds of a file whose rows have an answer and no options."""


def read_task(
    path: Path, *, kind: str | None = None, stop: Sequence[str] = (), max_tokens: int = 256
) -> AnswerTask:
    """The task in a ``.jsonl`` file, called as the file is.

    A row has a ``prompt``, and ``options`` with the index of the right one as ``answer`` (a
    choice), an ``answer``, or ``tests``, Python that raises where the prompt and what the model
    adds to it is a wrong program. All rows have the same columns. Answers are numbers if all of
    them are (``####`` may stand before a number, as in GSM8K), otherwise texts.

    Args:
        kind: one of :data:`WRITTEN_KINDS` for answers without options, in place of what they
            look like.
        stop: the strings that end an answer; by default a line break for texts, and what is not
            indented for code.
        max_tokens: the most tokens that the model writes.

    Raises:
        FedcoreError: the file is missing, no JSON lines, or has a row with a missing, unknown or
            wrong column, naming file, line and column and no value.
    """
    if not path.is_file():
        raise FedcoreError(f"--data: there is no file {path}; pass a .jsonl file")
    if kind is not None:
        choice("", "kind", kind, WRITTEN_KINDS)
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for line, row in json_lines(path, ("prompt",)):
        place = f"{path}:{line}"
        for column in row:
            if column not in COLUMNS:
                raise FedcoreError(f"{place}: {unknown_name('column', printable(column), COLUMNS)}")
        if rows and set(row) != set(rows[0][1]):
            names = ", ".join(sorted(rows[0][1]))
            raise FedcoreError(f"{place}: its columns are not those of the first row, {names}")
        rows.append((place, row))
    if not rows:
        raise FedcoreError(f"{path}: no rows")
    columns = set(rows[0][1])
    shape, parse = _reader(rows[0][0], columns)
    if kind is not None and shape != "exact":
        raise FedcoreError(f"kind is {kind!r}, and {path} holds rows of kind {shape}; leave it out")
    parsed = tuple(parse(place, row) for place, row in rows)
    if shape == "exact":
        numbers = all(is_numeric(str(row.answer)) for row in parsed)
        shape = kind or ("number" if numbers else "exact")
    stops = tuple(stop) or DEFAULT_STOPS.get(shape, ())
    return AnswerTask(path.stem, shape, parsed, stops, max_tokens)


def _reader(place: str, columns: Collection[str]) -> tuple[str, Any]:
    if columns == {"prompt", "options", "answer"}:
        return "choice", _choice
    if columns == {"prompt", "answer"}:
        return "exact", _answer
    if columns == {"prompt", "tests"}:
        return "code", _tests
    raise FedcoreError(
        f"{place}: a row needs prompt and one of: options and answer; answer; tests; its columns "
        f"are {', '.join(sorted(columns))}"
    )


def _choice(place: str, row: Mapping[str, Any]) -> Row:
    options = row["options"]
    if not isinstance(options, list) or len(options) < 2:
        raise FedcoreError(f"{place}: column 'options' must be a list of two texts or more")
    if not all(isinstance(o, str) and o.strip() for o in options):
        raise FedcoreError(f"{place}: column 'options' holds what is not a text")
    if len(set(options)) < len(options):
        raise FedcoreError(f"{place}: column 'options' holds a text twice")
    answer = row["answer"]
    if not is_integer(answer) or not 0 <= answer < len(options):
        raise FedcoreError(
            f"{place}: column 'answer' must be the index of an option, from 0 to {len(options) - 1}"
        )
    return Row(_text(place, row, "prompt"), answer, tuple(options))


def _answer(place: str, row: Mapping[str, Any]) -> Row:
    answer = row["answer"]
    if is_number(answer):
        return Row(_text(place, row, "prompt"), str(answer))
    return Row(_text(place, row, "prompt"), _text(place, row, "answer"))


def _tests(place: str, row: Mapping[str, Any]) -> Row:
    return Row(_text(place, row, "prompt"), _text(place, row, "tests"))


def _text(place: str, row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise FedcoreError(f"{place}: column {column!r} is not a text")
    return value
