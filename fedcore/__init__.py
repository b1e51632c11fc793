"""Federated fine-tuning with low-rank adapters.

Importing this package loads torch alone; transformers, peft and the command line's libraries are
imported by the rooms that need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedcore import engines as _engines  # noqa: F401  # makes the import paths of 0.1 known
from fedcore.data.adapter_state import AdapterState
from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError
from fedcore.methods import create_method, describe_methods

if TYPE_CHECKING:
    from fedcore.merging import Aggregated, aggregate

__version__ = "0.1.0"

__all__ = [
    "AdapterState",
    "Aggregated",
    "Cohort",
    "FedcoreError",
    "__version__",
    "aggregate",
    "create_method",
    "describe_methods",
]


def __getattr__(name: str) -> Any:
    """Merging is loaded when it is first asked for."""
    if name in ("aggregate", "Aggregated"):
        from fedcore import merging

        return getattr(merging, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
