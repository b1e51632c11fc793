"""Which methods aggregate adapters that were trained elsewhere."""

from __future__ import annotations

from dataclasses import Field, fields
from typing import Any

from fedcore.errors import FedcoreError
from fedcore.methods.base import Method
from fedcore.methods.requirements import (
    NO_PREVIOUS,
    NO_ROUNDS,
    methods_meeting,
    of_family,
    refuse,
)


def methods_for_merging(family: str | None = None, *, previous: bool = True) -> list[type[Method]]:
    """Methods that need no training history, of one adapter ``family`` if given.

    Args:
        previous: whether the adapter that all clients started from is there.
    """
    needs = [NO_ROUNDS]
    if family is not None:
        needs.append(of_family(family))
    if not previous:
        needs.append(NO_PREVIOUS)
    return [type(method) for method in methods_meeting(needs)]


def check_usable(method: Method, previous: bool, align: bool | None) -> Method:
    """The method as it runs on adapters alone.

    Args:
        previous: whether the adapter that all clients started from is there.
        align: what the caller said of the option ``align``, if anything.

    Returns:
        ``method``, without the alignment to a previous adapter where there is none.

    Raises:
        FedcoreError: naming the methods that can be used instead.
    """
    refuse(method, (NO_ROUNDS,), "adapters that were trained elsewhere")
    if not previous:
        needs = (NO_ROUNDS, NO_PREVIOUS, of_family(method.family))
        refuse(method, needs, "adapters without previous", "pass previous")
    if method.capabilities.history == "alignment" and not previous and _aligns(method):
        if align:
            raise FedcoreError(
                f"{method.name}: align is true without an adapter to align to; pass previous"
            )
        options = {field.name: getattr(method, field.name) for field in _fields(method)}
        return type(method)(**{**options, "align": False})
    return method


def names_of(methods: list[type[Method]]) -> str:
    """The names, separated by commas."""
    return ", ".join(method.name for method in methods)


def _aligns(method: Method) -> bool:
    return any(field.name == "align" and vars(method)[field.name] for field in _fields(method))


def _fields(method: Method) -> tuple[Field[Any], ...]:
    # Every subclass is a dataclass; the abstract base is not.
    return fields(method)  # type: ignore[arg-type]
