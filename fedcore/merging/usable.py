"""The methods that can aggregate adapters that were trained elsewhere."""

from __future__ import annotations

from dataclasses import Field, fields
from typing import Any

from fedcore.errors import FedcoreError
from fedcore.methods.base import Method
from fedcore.methods.catalog import METHODS


def usable_methods(family: str | None = None, *, previous: bool = True) -> list[type[Method]]:
    """Methods that need no training history, of one adapter ``family`` if given.

    Args:
        previous: whether the adapter that all clients started from is there.
    """
    return [
        method
        for method in METHODS
        if method.history != "rounds"
        and family in (None, method.family)
        and (previous or method.history != "previous")
    ]


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
    if method.history == "rounds":
        whose = "" if method.rule is None else f" with host {method.rule.inner().name}"
        raise FedcoreError(
            f"{method.name}{whose} needs the rounds of a federation and cannot aggregate adapters "
            f"that were trained elsewhere; usable: {names_of(usable_methods())}"
        )
    if method.history == "previous" and not previous:
        raise FedcoreError(
            f"{method.name} needs the adapter that all clients started from; pass previous, or "
            f"use one of {names_of(usable_methods(method.family, previous=False))}"
        )
    if method.history == "alignment" and not previous and _aligns(method):
        if align:
            raise FedcoreError(
                f"{method.name}: align is true without an adapter to align to; pass previous"
            )
        own = {field.name: getattr(method, field.name) for field in _fields(method)}
        return type(method)(**{**own, "align": False})
    return method


def names_of(methods: list[type[Method]]) -> str:
    """The names, separated by commas."""
    return ", ".join(method.name for method in methods)


def _aligns(method: Method) -> bool:
    return any(field.name == "align" and vars(method)[field.name] for field in _fields(method))


def _fields(method: Method) -> tuple[Field[Any], ...]:
    # Every subclass is a dataclass; the abstract base is not.
    return fields(method)  # type: ignore[arg-type]
