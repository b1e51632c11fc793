"""Kernels are compiled for cards that are not there, in a process that cannot interpret them."""

from __future__ import annotations

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Triton warns until its default is chosen: products and sums fuse, as they always did.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("tests/offline compiles kernels; unset TRITON_INTERPRET")
