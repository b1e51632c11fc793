"""Settings of every test."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# Examples are judged by what they compute, never by how long a busy machine takes.
settings.register_profile("fedcore", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("fedcore")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small batched problems are slower on several threads than on one."""
    torch.set_num_threads(1)
