"""Checks of the numbers in an adapter's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from fedcore.errors import FedcoreError

RANK = "a whole number >= 1"
SEED = "a whole number >= 0"
POSITIVE = "a positive number"


def check_numbers(name: str, values: Mapping[str, Any], wanted: str) -> None:
    """Raise unless every one of ``values`` is what ``wanted`` says.

    Args:
        name: the field of the configuration.
        values: pattern to value for a field of patterns; ``""`` is the key of a plain field.
        wanted: ``RANK``, ``SEED`` or ``POSITIVE``.

    Raises:
        FedcoreError: naming the field, the pattern and the value.
    """
    for key, value in values.items():
        allowed = int | float if wanted == POSITIVE else int
        valid = isinstance(value, allowed) and not isinstance(value, bool) and isfinite(value)
        if not valid or value < 0 or (value == 0 and wanted != SEED):
            where = f"{name}[{key!r}]" if key else name
            raise FedcoreError(f"{where} is {value!r}; pass {wanted}")
