"""One thread: medians that do not depend on what else the machine is doing."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads of torch's pool wait for each other, so a busy machine makes them slower than one."""
    torch.set_num_threads(1)
