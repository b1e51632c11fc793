"""Rows of CSV, TSV, JSON-lines and Parquet files, read strictly.

Every defect is an error that names the file and the line (of Parquet, the row); nothing is skipped
or guessed. No error shows a value: rows may be confidential, and so may be the first line of a
table whose header was forgotten.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fedcore.checks import is_integer
from fedcore.data.folders import distinct, open_regular
from fedcore.errors import FedcoreError, missing_extra, unknown_name
from fedcore.training.text_columns import UNLABELLED, described, fill, wanted_columns

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
"""Endings of the files that :func:`read_rows` understands."""

_PARQUET_ROWS = 1024


def read_rows(
    path: Path,
    columns: Collection[str],
    optional: Collection[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` file, in file order.

    Files of text are UTF-8, with or without a byte-order mark; CSV and TSV have a header line, and
    all their values are strings. JSON and Parquet values may be nested.

    Args:
        columns: what every row must have.
        optional: what is read where it is there. Further columns may be left out or not.
        renamed: the file's columns that are known under another name, to that name.

    Yields:
        The line on which a row ends, counted from 1, or its row in a Parquet file; and its values.

    Raises:
        FedcoreError: an unknown ending, a file that cannot be read, an absent column, a row with
            too few or too many fields, a broken quote, or bytes that are not UTF-8.
        MissingExtraError: pyarrow, which reads Parquet, is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        valid = ", ".join(TABLE_SUFFIXES)
        raise FedcoreError(f"{path}: unknown ending {path.suffix!r}; valid: {valid}")
    names = renamed or {}
    if suffix == ".parquet":
        yield from _parquet_rows(path, columns, optional, names)
    elif suffix == ".jsonl":
        yield from json_lines(path, columns, names)
    else:
        yield from _csv_rows(path, "\t" if suffix == ".tsv" else ",", columns, names)


def _decode(path: Path) -> str:
    try:
        with open_regular(path) as handle:
            data = handle.readall()
    except OSError as error:
        raise FedcoreError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"0x{data[error.start]:02x}"
        raise FedcoreError(f"{path}:{line}: byte {byte} is not UTF-8 ({error.reason})") from None


def _check_columns(where: str, known: Collection[str], columns: Collection[str]) -> None:
    for column in columns:
        if column not in known:
            raise FedcoreError(f"{where}: {unknown_name('column', column, known)}")


def _check_header(where: str, header: list[str], columns: Collection[str]) -> None:
    for column in columns:
        if column not in header:
            # Not all of the first line: it may be a row.
            near = get_close_matches(column, header, n=3, cutoff=0.6)
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"the first line must name the columns, of which it has {len(header)}"
            )
            raise FedcoreError(f"{where}: unknown column {column!r}; {hint}")
        if header.count(column) > 1:
            raise FedcoreError(f"{where}: column {column!r} appears {header.count(column)} times")


def _renamed(where: str, columns: Iterable[str], names: Mapping[str, str]) -> list[str]:
    """``columns`` of a file under the names by which they are known."""
    known = list(columns)
    taken = sorted(set(names.values()) & set(known) - set(names))
    if taken:
        raise FedcoreError(
            f"{where}: column {taken[0]!r} is there, and another one is renamed to it; leave one "
            "of them out of columns"
        )
    return [names.get(column, column) for column in known]


def _csv_rows(
    path: Path, delimiter: str, columns: Collection[str], names: Mapping[str, str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    # newline="" keeps line breaks inside quoted fields as they are.
    stream = io.StringIO(_decode(path), newline="")
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        _check_header(f"{path}:1", header, names)
        header = _renamed(f"{path}:1", header, names)
        _check_header(f"{path}:1", header, columns)
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    try:
        return distinct(pairs)
    except ValueError as error:
        raise FedcoreError(str(error)) from None


def json_lines(
    path: Path, columns: Collection[str], names: Mapping[str, str] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line of a JSON-lines file; blank lines are passed over.

    Raises:
        FedcoreError: a line is not a JSON object, names a column twice or lacks one of ``columns``,
            or a byte is not UTF-8; with file and line.
    """
    # Only \n ends a line: JSON strings may hold U+2028 and the like unescaped.
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            raise FedcoreError(f"{path}:{number}: not JSON: {error.msg}") from None
        except FedcoreError as error:
            raise FedcoreError(f"{path}:{number}: {error}") from None
        except (ValueError, RecursionError):
            # An integer of thousands of digits, or thousands of brackets.
            raise FedcoreError(
                f"{path}:{number}: a number is too long, or it nests too deeply"
            ) from None
        if not isinstance(record, dict):
            raise FedcoreError(f"{path}:{number}: {type(record).__name__}, not a JSON object")
        if names:
            _check_columns(f"{path}:{number}", record, names)
            known = _renamed(f"{path}:{number}", record, names)
            record = dict(zip(known, record.values(), strict=True))
        _check_columns(f"{path}:{number}", record, columns)
        yield number, record


def _parquet_rows(
    path: Path, columns: Collection[str], optional: Collection[str], names: Mapping[str, str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        from pyarrow import ArrowException  # type: ignore[import-untyped]
        from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing_extra("pyarrow", "hub") from error
    number = 0
    try:
        with ParquetFile(path) as file:
            stored = file.schema_arrow.names
            _check_columns(str(path), stored, names)
            known = dict(zip(_renamed(str(path), stored, names), stored, strict=True))
            _check_columns(str(path), known, columns)
            chosen = [known[column] for column in (*columns, *optional) if column in known]
            for batch in file.iter_batches(_PARQUET_ROWS, columns=chosen):
                for record in batch.to_pylist():
                    number += 1
                    yield number, {names.get(column, column): v for column, v in record.items()}
    except (ArrowException, OSError) as error:
        raise FedcoreError(
            f"cannot read {path} as Parquet after row {number}: {type(error).__name__}"
        ) from None


def read_table(
    path: Path,
    *,
    text_column: str = "text",
    label_column: str = "label",
    columns: Mapping[str, str] | None = None,
    labels: Collection[str] | None = None,
) -> tuple[list[str], list[str]]:
    """The texts and label names of a file that :func:`read_rows` reads, in file order.

    Labels may be strings or integers; with an empty ``label_column`` all texts have one label.
    ``text_column`` may be a template of columns, as in ``"{question} {answer}"``.

    Args:
        columns: the file's columns that are known under another name, to that name.
        labels: the only ones that there may be.

    Raises:
        FedcoreError: as :func:`read_rows`, or an empty or non-string text, an empty or other label,
            or no rows at all; with file and line.
    """
    texts, names = [], []
    wanted = wanted_columns(text_column, label_column)
    for line, row in read_rows(path, wanted, renamed=columns):
        text = fill(text_column, row)
        if not isinstance(text, str) or not text.strip():
            raise FedcoreError(
                f"{path}:{line}: column {text_column!r} is {described(text)}; each row needs a text"
            )
        names.append(label_in(row, label_column, f"{path}:{line}", labels))
        texts.append(text)
    if not texts:
        raise FedcoreError(f"{path}: no rows")
    return texts, names


def label_in(
    row: Mapping[str, Any], column: str, place: str, labels: Collection[str] | None = None
) -> str:
    """The label of ``row``: a string or an integer, as text; of an empty ``column`` the one of all.

    Args:
        place: of the row, in front of errors.
        labels: the only ones that there may be.

    Raises:
        FedcoreError: an empty label, one of another type, or one that is not in ``labels``.
    """
    if not column:
        return UNLABELLED
    label = row[column]
    if not (isinstance(label, str) or is_integer(label)) or not str(label).strip():
        raise FedcoreError(
            f"{place}: column {column!r} is {described(label)}; each row needs a string or an "
            "integer"
        )
    name = str(label).strip()
    if labels is not None and name not in labels:
        raise FedcoreError(f"{place}: column {column!r} holds a label that is not in data.labels")
    return name
