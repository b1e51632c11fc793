"""Uninitialised memory is NaN, so that an element nobody wrote shows.

A conftest imports the fixture to apply it to its folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_nan(*args: Any, **options: Any) -> Tensor:
        found = allocate(*args, **options)
        if found.dtype.is_floating_point and found.device.type != "meta":
            with torch.no_grad():
                found.fill_(float("nan"))
        return found

    return allocate_nan


@pytest.fixture(scope="module", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """``torch.empty``, ``empty_like`` and ``new_empty`` give NaN in floating dtypes."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield
