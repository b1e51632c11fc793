"""Finds the checks: every module below ``fedcore_theory.checks`` that has a ``CHECK``."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from fedcore.errors import FedcoreError, unknown_name
from fedcore_theory import checks
from fedcore_theory.check import Check

ORDER = ("R", "A", "V", "G", "FR", "N", "I", "C", "D", "S", "X")
"""The letters that ids begin with, as the report has them."""


@cache
def all_checks() -> tuple[Check[Any], ...]:
    """Every check, in the order of :data:`ORDER` and of the numbers.

    Raises:
        FedcoreError: two checks of one id, or an id that is not a letter of ``ORDER`` and a number.
    """
    by_id: dict[str, Check[Any]] = {}
    for module in pkgutil.walk_packages(checks.__path__, f"{checks.__name__}."):
        if module.ispkg:
            continue
        check = importlib.import_module(module.name).CHECK
        if check.id in by_id:
            raise FedcoreError(f"two checks are called {check.id}; rename that of {module.name}")
        by_id[check.id] = check
    return tuple(sorted(by_id.values(), key=lambda check: _place(check.id)))


def chosen_checks(ids: Sequence[str]) -> tuple[Check[Any], ...]:
    """The checks of ``ids``, whatever their case; all if there are none.

    Raises:
        FedcoreError: an unknown id.
    """
    known = {check.id.casefold(): check for check in all_checks()}
    for name in ids:
        if name.casefold() not in known:
            raise unknown_name("check", name, [check.id for check in all_checks()])
    wanted = {name.casefold() for name in ids} or known.keys()
    return tuple(check for check in all_checks() if check.id.casefold() in wanted)


def _place(name: str) -> tuple[int, int, str]:
    parts = re.fullmatch(r"([A-Z]+)(\d*)([a-z]*)", name)
    if parts is None or parts[1] not in ORDER:
        raise FedcoreError(f"a check is called {name!r}; use a letter of {', '.join(ORDER)}")
    return ORDER.index(parts[1]), int(parts[2] or 0), parts[3]
