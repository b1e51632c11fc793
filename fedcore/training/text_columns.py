"""Which columns of a table make a text: one, or several put into a template."""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter

from fedcore.errors import FedcoreError

UNLABELLED = "all"
"""The one label of texts that have no label column."""


def columns_of(text: str, key: str = "text_column") -> tuple[str, ...]:
    """The columns that ``text`` names, in order of first appearance; ``key`` is its name in errors.

    Example:
        >>> columns_of("sentence"), columns_of("{question} {answer}")
        (('sentence',), ('question', 'answer'))

    Raises:
        FedcoreError: a template with a brace too many, or with more in its braces than a name.
    """
    if "{" not in text:
        return (text,)
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise FedcoreError(f"{key} {text!r} is not a valid template: {error}") from None
    columns: dict[str, None] = {}
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if not name or form or conversion:
            raise FedcoreError(
                f"{key} {text!r} is not a valid template: put only the name of a column "
                "in braces, as in '{question} {answer}'"
            )
        columns[name] = None
    return tuple(columns)


def described(value: object) -> str:
    """What ``value`` is, for an error, which never shows it: rows may be confidential.

    Example:
        >>> described(" "), described(None), described(4)
        ('empty', 'missing', 'of type int')
    """
    if value is None:
        return "missing"
    if isinstance(value, str) and not value.strip():
        return "empty"
    return f"of type {type(value).__name__}"


def fill(text: str, row: Mapping[str, object]) -> object:
    """The text that ``row`` gives: a column's value as it is, or the filled template.

    Of a template, the first value that is not a string is returned in place of the text, for the
    reader to refuse.
    """
    names = columns_of(text)
    if "{" not in text:
        return row[text]
    for name in names:
        if not isinstance(row[name], str):
            return row[name]
    pieces = []
    for literal, column, _, _ in Formatter().parse(text):
        pieces.append(literal)
        # Not str.format, which would look into what a column's name seems to index.
        pieces.append(str(row[column]) if column is not None else "")
    return "".join(pieces)


def wanted_columns(text: str, label: str) -> tuple[str, ...]:
    """The columns that a table must have; an empty ``label`` stands for no label column."""
    return (*columns_of(text), label) if label else columns_of(text)
