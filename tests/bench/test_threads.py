"""Every library under comparison is held to the threads that were asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from bench import session as session_module
from bench.limits import Limits
from bench.session import Request, Session


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.mark.parametrize("threads", [1, 2])
def test_blas_follows_torch_and_is_given_back(threads, monkeypatch):
    monkeypatch.setattr(
        session_module, "measure_limits", lambda *_: Limits(1.0, 1.0, {"float32": 1.0})
    )
    np.linalg.eigh(np.eye(2))
    before, torch_before = blas_threads(), torch.get_num_threads()
    try:
        with Session(Request(threads=threads)):
            assert blas_threads() == {threads}
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(torch_before)
    assert blas_threads() == before
