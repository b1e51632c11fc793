"""Flower: its server with any method of ours, its clients with any recipe of ours.

``FedLoRA`` is a strategy of Flower's Message API for every app whose clients send adapters by
PEFT's keys, ``secure_sums.SecureFedLoRA`` one of its older API for secure aggregation. A whole
recipe runs in Flower's ``simulation``, or as the app of an ``app_folder`` on many machines, to the
bits of the local engine.
"""

from __future__ import annotations

from fedcore.errors import missing_extra

try:
    import flwr  # noqa: F401
except ImportError as error:
    raise missing_extra("flwr", "flower") from error

from fedcore.transports.flower.messages import from_arrays, to_arrays
from fedcore.transports.flower.own_clients import repeat
from fedcore.transports.flower.strategy import FedLoRA

__all__ = ["FedLoRA", "from_arrays", "repeat", "to_arrays"]
