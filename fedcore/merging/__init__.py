"""Adapters that were trained elsewhere, aggregated by one call: folders in, a folder out."""

from typing import Any

from fedcore.merging.api import aggregate
from fedcore.merging.result import Aggregated, MethodError
from fedcore.merging.usable import methods_for_merging

__all__ = ["Aggregated", "MethodError", "aggregate", "methods_for_merging"]


def __getattr__(name: str) -> Any:
    """``usable_methods`` is called ``methods_for_merging`` now; the old name goes with 0.3."""
    if name == "usable_methods":
        return methods_for_merging
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
