"""Methods by name: where one is registered, looked up, built with its options and described.

Which methods there are is none of its concern: :mod:`.catalog` registers those that are shipped,
anyone else registers their own.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from fedcore.checks import flag
from fedcore.errors import FedcoreError, unknown_name
from fedcore.methods.base import Method

_Class = TypeVar("_Class", bound=type[Method])

_CLASSES: dict[str, type[Method]] = {}


def register_method(method: _Class) -> _Class:
    """Make ``method`` known by its name and aliases; returns it, so that it can decorate a class.

    Every option of it needs a default.

    Raises:
        FedcoreError: another method has one of these names.
    """
    for name in (method.name, *method.aliases):
        known = _by_name().get(name)
        if known not in (None, method):
            raise FedcoreError(
                f"{method.__qualname__}: {name!r} is the name of {known.__qualname__} already; "
                "choose another"
            )
    _CLASSES[method.name] = method
    return method


def method_classes() -> tuple[type[Method], ...]:
    """All registered methods, in the order in which tables show them."""
    return tuple(_CLASSES.values())


def default_methods() -> tuple[Method, ...]:
    """All registered methods with their default options, in the order of tables."""
    return tuple(method() for method in method_classes())


def find_method(name: str) -> type[Method]:
    """The class of a method, by its name or one of its aliases.

    Raises:
        FedcoreError: one line with the nearest valid names.
    """
    known = _by_name()
    if name not in known:
        raise unknown_name("method", name, known)
    return known[name]


def create_method(name: str, **options: Any) -> Method:
    """A method with its hyper-parameters.

    Raises:
        FedcoreError: unknown name or option, or an option of the wrong type.

    Example:
        >>> create_method("florg", align=False)
        FlorgTruncated(align=False)
    """
    method = find_method(name)
    # Every subclass is a dataclass; the abstract base is not.
    known = {option.name: option.type for option in fields(method)}  # type: ignore[arg-type]
    for option, value in options.items():
        if option not in known:
            raise unknown_name(f"option of method {method.name}", option, known)
        if known[option] == "bool":
            flag(method.name, option, value)
    return method(**options)


def options_of(method: Method) -> dict[str, Any]:
    """The hyper-parameters by name: ``create_method(method.name, **options_of(method))`` is it."""
    return {option.name: getattr(method, option.name) for option in fields(method)}  # type: ignore[arg-type]


def describe_methods() -> list[dict[str, Any]]:
    """One flat record per method: name, aliases, source, promises and traffic."""
    return [
        {
            "name": method.name,
            "aliases": ", ".join(method.aliases),
            "summary": method.description.summary,
            "paper": method.description.paper,
            "adapter": method.family,
            "exact": method.description.exact,
            "linear": method.capabilities.linear,
            "mixed_ranks": method.capabilities.mixed_ranks,
            "personalised": method.capabilities.personalised,
            "uplink": method.description.uplink,
            "downlink": method.description.downlink,
            "server_cost": method.description.server_cost,
            "privacy_note": method.description.privacy_note,
        }
        for method in default_methods()
    ]


def _by_name() -> dict[str, type[Method]]:
    return {name: method for method in method_classes() for name in (method.name, *method.aliases)}
