"""The definitions as a backend, and poisoned memory."""

from __future__ import annotations

import pytest

from tests.reference.bodies import register_reference
from tests.reference.poison import poisoned_memory

__all__ = ["poisoned_memory"]


@pytest.fixture(scope="session", autouse=True)
def reference_bodies() -> None:
    """Make ``backend("reference")`` run the fp64 definitions."""
    register_reference()
