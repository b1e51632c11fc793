"""Typed access to the fields of a JSON object, with errors that name file, line and field."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from fedcore.errors import FedcoreError


class Fields:
    """A JSON object and the place it was read from.

    Numbers that are not finite were turned into ``null`` when the text was parsed, so that every
    number may be ``None``. A field that is absent is an error unless ``default`` is given.
    """

    _absent = object()

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise FedcoreError(f"{where}: expected a JSON object, found {_shown(values)}")
        self.values = values
        self.where = where

    def wrong(self, key: str, wanted: str) -> FedcoreError:
        """The error for a ``key`` whose value is not what is ``wanted``."""
        return FedcoreError(
            f"{self.where}: {key!r} is {_shown(self.values.get(key))}; it must be {wanted}"
        )

    def get(self, key: str, default: Any = _absent) -> Any:
        """The raw value of ``key``."""
        if key in self.values:
            return self.values[key]
        if default is Fields._absent:
            raise FedcoreError(f"{self.where}: field {key!r} is missing")
        return default

    def number(self, key: str, default: Any = _absent) -> float | None:
        """A number, or ``None`` for null."""
        value = self.get(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "a number or null")
        return float(value) if isfinite(value) else None

    def whole(self, key: str, default: Any = _absent) -> int | None:
        """An integer, or ``None`` for null."""
        value = self.get(key, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.wrong(key, "a whole number or null")
        return value

    def count(self, key: str, default: Any = _absent) -> int:
        """An integer >= 0."""
        value = self.whole(key, default)
        if value is None or value < 0:
            raise self.wrong(key, "a whole number >= 0")
        return value

    def text(self, key: str, default: Any = _absent) -> str:
        """A string."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def objects(self, key: str, default: Any = _absent) -> list[Fields]:
        """A list of JSON objects."""
        value = self.get(key, default)
        if not isinstance(value, list):
            raise self.wrong(key, "a list of objects")
        return [Fields(item, f"{self.where}, {key}[{i}]") for i, item in enumerate(value)]

    def inner(self, key: str, default: Any = _absent) -> Fields:
        """A JSON object."""
        return Fields(self.get(key, default), f"{self.where}, {key!r}")

    def numbers(self, key: str, default: Any = _absent) -> Mapping[str, float]:
        """An object of numbers; nulls are left out."""
        inner = self.inner(key, default)
        found = {name: inner.number(name) for name in inner.values}
        return {name: value for name, value in found.items() if value is not None}

    def names(self, key: str) -> tuple[str, ...]:
        """A list of different strings."""
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of strings")
        if len(set(value)) != len(value):
            raise self.wrong(key, "a list of strings that are all different")
        return tuple(value)

    def count_table(self, key: str, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
        """A table of integers >= 0 of the given size."""
        value = self.get(key)
        fits = (
            isinstance(value, list)
            and len(value) == rows
            and all(isinstance(row, list) and len(row) == columns for row in value)
        )
        if not fits or any(type(n) is not int or n < 0 for row in value for n in row):
            raise self.wrong(key, f"{rows} rows (clients) of {columns} counts >= 0 (classes)")
        return tuple(tuple(row) for row in value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
