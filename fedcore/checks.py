"""Checks of options and arguments: each returns the value it was given, or says what to pass.

``owner`` is what the option belongs to, a method's name for instance, and stands in front of the
message; ``""`` where the option's name says it all. A boolean is not a number here, although
Python counts it as one.
"""

from __future__ import annotations

from collections.abc import Collection
from math import inf
from typing import TypeGuard

from fedcore.errors import FedcoreError, unknown_name

# Values may come from a file of somebody else.
_SHOWN = 60


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether ``value`` is an integer or a float, finite or not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def wrong(owner: str, option: str, value: object, wanted: str) -> FedcoreError:
    """The error for an ``option`` whose ``value`` is not what is ``wanted``."""
    place = f"{owner}: " if owner else ""
    return FedcoreError(f"{place}{option} is {value!r:.{_SHOWN}}; pass {wanted}")


def number(
    owner: str,
    option: str,
    value: object,
    *,
    least: float = -inf,
    above: float = -inf,
    most: float = inf,
    below: float = inf,
    otherwise: str = "",
) -> float:
    """A finite number.

    Args:
        least, most: bounds that it may reach.
        above, below: bounds that it may not reach.
        otherwise: what else may be passed, for the message alone.

    Raises:
        FedcoreError: anything else, a boolean and NaN too.

    Example:
        >>> number("fedrot", "strength", 1.5, least=0, most=1)
        Traceback (most recent call last):
        fedcore.errors.FedcoreError: fedrot: strength is 1.5; pass a number in [0, 1]
    """
    # NaN is in no range, and the open ends of an unbounded one leave out the infinities.
    if is_number(value) and least <= value <= most and above < value < below:
        return value
    raise wrong(owner, option, value, _range(least, above, most, below) + otherwise)


def count(
    owner: str,
    option: str,
    value: object,
    *,
    least: int | None = None,
    most: float | None = None,
    otherwise: str = "",
) -> int:
    """An integer, from ``least`` to ``most`` where they are set.

    Raises:
        FedcoreError: anything else, a boolean and a float without a fraction too.

    Example:
        >>> count("flora", "max_rank", 0, least=1, otherwise=", or None")
        Traceback (most recent call last):
        fedcore.errors.FedcoreError: flora: max_rank is 0; pass an integer of 1 or more, or None
    """
    if is_integer(value) and (least is None or value >= least) and (most is None or value <= most):
        return value
    wanted = "an integer"
    if least is not None:
        wanted += f" of {least} or more" if most is None else f" from {least} to {most}"
    elif most is not None:
        wanted += f" of {most} or less"
    raise wrong(owner, option, value, wanted + otherwise)


def choice(owner: str, option: str, value: object, valid: Collection[str]) -> str:
    """One of the ``valid`` names.

    Raises:
        FedcoreError: with the nearest valid names.
    """
    if isinstance(value, str) and value in valid:
        return value
    raise unknown_name(f"{option} of {owner}" if owner else option, str(value), valid)


def flag(owner: str, option: str, value: object) -> bool:
    """True or false.

    Raises:
        FedcoreError: anything else, 0 and 1 too.
    """
    if isinstance(value, bool):
        return value
    raise wrong(owner, option, value, "true or false")


def _range(least: float, above: float, most: float, below: float) -> str:
    lowest, highest = max(least, above), min(most, below)
    if highest == inf:
        if lowest == -inf:
            return "a finite number"
        return f"a finite number {'above' if lowest == above else '>='} {lowest:g}"
    left, right = "(" if lowest == above else "[", ")" if highest == below else "]"
    return f"a number in {left}{lowest:g}, {highest:g}{right}"
