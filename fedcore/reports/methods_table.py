"""The table of all methods, as the documentation shows it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedcore.reports.grid import Column, Grid

_COLUMNS = {
    "method": "name",
    "adapter": "adapter",
    "exact": "exact",
    "linear": "linear",
    "mixed ranks": "mixed_ranks",
    "personalised": "personalised",
    "up": "uplink",
    "down": "downlink",
    "server cost": "server_cost",
    "source": "paper",
}
"""Heading to the key of :func:`fedcore.methods.describe_methods`."""


def methods_markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """A pipe table with one row per method.

    Args:
        rows: records of :func:`fedcore.methods.describe_methods`.

    Example:
        >>> from fedcore.methods import describe_methods
        >>> print(methods_markdown(describe_methods()[:1]).splitlines()[2][:42])
        | `fedit` | lora | no: misses the covarian
    """
    columns = tuple(Column(heading, number=False) for heading in _COLUMNS)
    cells = tuple(
        (f"`{row['name']}`", *(cell(row[key]) for key in list(_COLUMNS.values())[1:]))
        for row in rows
    )
    return Grid("Methods", columns, cells).markdown()


def cell(value: str | bool) -> str:
    """A trait as a table shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value
