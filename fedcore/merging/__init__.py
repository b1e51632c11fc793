"""Adapters that were trained elsewhere, aggregated by one call: folders in, a folder out."""

from fedcore.merging.api import aggregate
from fedcore.merging.plan import usable_methods
from fedcore.merging.result import Aggregated, MethodError

__all__ = ["Aggregated", "MethodError", "aggregate", "usable_methods"]
