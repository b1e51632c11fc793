"""Aggregation methods: each a client half and a server half in one file of its name."""

from fedcore.methods.base import (
    Aggregate,
    Broadcast,
    Capabilities,
    ClientPlan,
    Description,
    Method,
    Upload,
)
from fedcore.methods.catalog import METHODS
from fedcore.methods.registry import create_method, describe_methods, find_method, register_method

__all__ = [
    "METHODS",
    "Aggregate",
    "Broadcast",
    "Capabilities",
    "ClientPlan",
    "Description",
    "Method",
    "Upload",
    "create_method",
    "describe_methods",
    "find_method",
    "register_method",
]
