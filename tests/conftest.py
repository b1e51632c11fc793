"""Settings of every test."""

from __future__ import annotations

from pathlib import Path

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


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with the tiny model and texts for all tests of a process."""
    return tmp_path_factory.mktemp("home")
