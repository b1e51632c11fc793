"""The data model: adapters, a round's cohort, and their files."""

from typing import Any

from fedcore.data.adapter_state import AdapterState, adapter_from_row
from fedcore.data.cohort import Cohort, CohortBuilder
from fedcore.data.peft_files import read_adapter, write_adapter
from fedcore.data.validation import Dropped

__all__ = [
    "AdapterState",
    "Cohort",
    "CohortBuilder",
    "Dropped",
    "adapter_from_row",
    "read_adapter",
    "write_adapter",
]


def __getattr__(name: str) -> Any:
    """``fedcore.data.ServerState`` is in ``fedcore.federation.state``; this path goes with 0.3."""
    if name == "ServerState":
        # The one import upwards, which the import contract names.
        from fedcore.federation.state import ServerState

        return ServerState
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
