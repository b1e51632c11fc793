"""Adapters that were trained elsewhere, aggregated by one call: folders in, a folder out."""

from fedcore.merging.api import aggregate
from fedcore.merging.errors_table import MethodError
from fedcore.merging.result import Aggregated
from fedcore.merging.usable import usable_methods

__all__ = ["Aggregated", "MethodError", "aggregate", "usable_methods"]
