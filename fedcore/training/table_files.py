"""Labelled texts from CSV, TSV and JSON-lines files, read strictly.

Every defect is an error that names the file and the line; nothing is skipped or guessed.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedcore.checks import is_integer
from fedcore.errors import FedcoreError, unknown_name
from fedcore.training.text_columns import UNLABELLED, fill, wanted_columns

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
"""Endings of the files that :func:`read_table` understands."""


def _decode(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"0x{data[error.start]:02x}"
        raise FedcoreError(f"{path}:{line}: byte {byte} is not UTF-8 ({error.reason})") from None


def _check_columns(where: str, columns: Iterable[str], wanted: tuple[str, ...]) -> None:
    known = list(columns)
    for column in wanted:
        if column not in known:
            raise FedcoreError(f"{where}: {unknown_name('column', column, known)}")


def _renamed(where: str, columns: Iterable[str], names: Mapping[str, str]) -> list[str]:
    """``columns`` under the recipe's names for them."""
    known = list(columns)
    _check_columns(where, known, tuple(names))
    taken = sorted(set(names.values()) & set(known) - set(names))
    if taken:
        raise FedcoreError(
            f"{where}: column {taken[0]!r} is there, and another one is renamed to it; leave one "
            "of them out of columns"
        )
    return [names.get(column, column) for column in known]


def _csv_rows(
    path: Path, delimiter: str, wanted: tuple[str, ...], names: Mapping[str, str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    # newline="" keeps line breaks inside quoted fields as they are.
    stream = io.StringIO(_decode(path), newline="")
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    try:
        header = _renamed(f"{path}:1", next(reader, []), names)
        _check_columns(f"{path}:1", header, wanted)
        for column in wanted:
            if header.count(column) > 1:
                raise FedcoreError(
                    f"{path}:1: column {column!r} appears {header.count(column)} times"
                )
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise FedcoreError(
                    f"{path}:{reader.line_num}: {len(row)} fields; the header has {len(header)}"
                )
            yield reader.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise FedcoreError(f"{path}:{reader.line_num}: {error}") from None


def _jsonl_rows(
    path: Path, wanted: tuple[str, ...], names: Mapping[str, str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    # Only \n ends a line: JSON strings may hold U+2028 and the like unescaped.
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise FedcoreError(f"{path}:{number}: not JSON: {error.msg}") from None
        if not isinstance(record, dict):
            raise FedcoreError(f"{path}:{number}: {type(record).__name__}, not a JSON object")
        where = f"{path}:{number}"
        renamed = dict(zip(_renamed(where, record, names), record.values(), strict=True))
        _check_columns(where, renamed, wanted)
        yield number, renamed


def read_table(
    path: Path,
    *,
    text_column: str = "text",
    label_column: str = "label",
    columns: Mapping[str, str] | None = None,
    labels: Collection[str] | None = None,
) -> tuple[list[str], list[str]]:
    """The texts and label names of a ``.csv``, ``.tsv`` or ``.jsonl`` file, in file order.

    Files are UTF-8, with or without a byte-order mark; CSV and TSV have a header line. Labels may
    be strings or integers; with an empty ``label_column`` all texts have one label.
    ``text_column`` may be a template of columns, as in ``"{question} {answer}"``.

    Args:
        columns: the file's columns that are known under another name, to that name.
        labels: the only ones that there may be.

    Raises:
        FedcoreError: an unknown ending, an absent column, a row with too few or too many fields, a
            broken quote, an empty or non-string text, an empty or other label, bytes that are not
            UTF-8, or no rows at all; with file and line, and without the row's values.
    """
    wanted = wanted_columns(text_column, label_column)
    if path.suffix.lower() not in TABLE_SUFFIXES:
        valid = ", ".join(TABLE_SUFFIXES)
        raise FedcoreError(f"{path}: unknown ending {path.suffix!r}; valid: {valid}")
    if path.suffix.lower() == ".jsonl":
        rows = _jsonl_rows(path, wanted, columns or {})
    else:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        rows = _csv_rows(path, delimiter, wanted, columns or {})
    texts, names = [], []
    for line, row in rows:
        text = fill(text_column, row)
        label = row[label_column] if label_column else UNLABELLED
        if not isinstance(text, str) or not text.strip():
            raise FedcoreError(f"{path}:{line}: column {text_column!r} {_not(text)} a text")
        if not (isinstance(label, str) or is_integer(label)) or not str(label).strip():
            raise FedcoreError(
                f"{path}:{line}: column {label_column!r} {_not(label)} a string or an integer"
            )
        name = str(label).strip()
        if labels is not None and name not in labels:
            raise FedcoreError(
                f"{path}:{line}: column {label_column!r} holds a label that is not in data.labels"
            )
        texts.append(text)
        names.append(name)
    if not texts:
        raise FedcoreError(f"{path}: no rows")
    return texts, names


def _not(value: object) -> str:
    """How a value of the wrong kind is described without its content."""
    return "is empty, not" if isinstance(value, str) else f"holds {type(value).__name__}, not"
