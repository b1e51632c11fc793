"""The methods that are shipped: whatever stands in the rooms of this package, without a list.

A new method is one file, or one folder, in the room of its adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from inspect import isabstract
from pkgutil import walk_packages
from types import ModuleType

from fedcore.methods.base import Method
from fedcore.methods.registry import register_method

_ROOMS = ("baselines", "gram", "lora", "robust", "tri")

_ORDER = (
    *("fedit", "ffa", "rolora", "fedsa"),
    *("florg.truncated", "florg.sketched", "florg.whitened", "florg.avg_a"),
    *("product_svd", "flora", "fedex", "florist", "lora_fair", "fedrot", "flora_na"),
    *("ce_lora", "ce_lora.projected", "fed_sb"),
    *("robust_clip", "robust_krum", "robust_median", "robust_geomedian"),
    *("head_only", "fedavg.full", "local_only", "centralised"),
)
"""The order of tables; a method that is not in it comes after these, by its name."""


def _modules(name: str) -> Iterator[ModuleType]:
    """The module or package ``name`` and all modules inside it."""
    module = import_module(name)
    yield module
    for inner in walk_packages(getattr(module, "__path__", ()), f"{name}."):
        yield import_module(inner.name)


def _shipped() -> list[type[Method]]:
    kinds = [
        kind
        for room in _ROOMS
        for module in _modules(f"{__package__}.{room}")
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Method)
        # Neither what a module imports nor what its methods are derived from.
        if kind.__module__ == module.__name__ and not isabstract(kind)
    ]
    places = {name: place for place, name in enumerate(_ORDER)}
    return sorted(kinds, key=lambda kind: (places.get(kind.name, len(places)), kind.name))


METHODS: tuple[type[Method], ...] = tuple(register_method(method) for method in _shipped())
"""All methods that are shipped, in the order in which tables show them."""
