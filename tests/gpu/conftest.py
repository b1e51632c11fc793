"""Kernels run on a card or, where there is none, in Triton's interpreter.

The interpreter has to be asked for before triton is imported:
``TRITON_INTERPRET=1 pytest tests/gpu``.
"""

from __future__ import annotations

import os

import pytest
import torch

from fedcore_kernels.cuda import register_bodies
from tests.reference.bodies import register_reference
from tests.reference.poison import poisoned_memory

__all__ = ["poisoned_memory"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config: pytest.Config) -> None:
    # Triton warns until its default is chosen: products and sums fuse, as they always did.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if INTERPRETED:
        from tests.reference import interpreted_dot

        interpreted_dot.install()
    elif not torch.cuda.is_available():
        raise pytest.UsageError("there is no CUDA device; set TRITON_INTERPRET=1")


@pytest.fixture(scope="session", autouse=True)
def bodies() -> None:
    """The interpreter takes tensors on the CPU for tensors on the card."""
    register_reference()
    if INTERPRETED:
        register_bodies(lambda *_: None)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cpu" if INTERPRETED else "cuda")
