"""Federated fine-tuning with low-rank adapters.

Importing this package loads torch alone; transformers, peft and the command line's libraries are
imported by the rooms that need them.
"""

from fedcore.data.adapter_state import AdapterState
from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError
from fedcore.methods import create_method, describe_methods

__version__ = "0.1.0"

__all__ = [
    "AdapterState",
    "Cohort",
    "FedcoreError",
    "__version__",
    "create_method",
    "describe_methods",
]
