"""The data model: adapters, a round's cohort, the server's state, and their files."""

from fedcore.data.adapter_state import AdapterState
from fedcore.data.cohort import Cohort, CohortBuilder, adapter_from_row
from fedcore.data.peft_files import read_adapter, write_adapter
from fedcore.data.server_state import ServerState
from fedcore.data.validation import Dropped

__all__ = [
    "AdapterState",
    "Cohort",
    "CohortBuilder",
    "Dropped",
    "ServerState",
    "adapter_from_row",
    "read_adapter",
    "write_adapter",
]
