"""The one rule by which a result counts as right.

``||actual - expected|| / ||expected|| <= max(2 e, c eps sqrt(K) condition)`` where ``expected`` is
the fp64 definition, ``e`` the error that torch itself makes in the dtype of the result, ``K`` the
length of the sums and ``condition`` that of the problem (1 for sums and products).
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

UNITS = 16.0
"""c: units of round-off a sum of length 1 may lose."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``||actual - expected|| / ||expected||`` in fp64; absolute where ``expected`` is zero."""
    wide = expected.double()
    scale = wide.norm().item()
    return (actual.double() - wide).norm().item() / (scale or 1.0)


def tolerance(
    dtype: torch.dtype, length: int = 1, torch_error: float = 0.0, condition: float = 1.0
) -> float:
    """The largest relative error that counts as right."""
    return max(2 * torch_error, UNITS * torch.finfo(dtype).eps * sqrt(length) * condition)


def assert_close(
    actual: Tensor,
    expected: Tensor,
    length: int = 1,
    plain: Tensor | None = None,
    condition: float = 1.0,
) -> None:
    """Fail unless ``actual`` is right; ``plain`` is torch's own result in the same dtype."""
    assert actual.shape == expected.shape
    torch_error = 0.0 if plain is None else relative_error(plain, expected)
    error = relative_error(actual, expected)
    allowed = tolerance(actual.dtype, length, torch_error, condition)
    assert error <= allowed, f"relative error {error:.2e} > {allowed:.2e}"
