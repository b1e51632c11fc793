"""Real numbers as integers of a public grid, without bias."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore.errors import FedcoreError


class WholeNumbers(NamedTuple):
    """Grid points ``(P,)`` int64 and the number of values that were clipped to the range."""

    points: Tensor
    clipped: int


@dataclass(frozen=True)
class FixedPoint:
    """The ``levels + 1`` multiples of ``step = 2 clip / levels`` in ``[-clip, clip]``.

    A value between two of them becomes the upper one with a probability of its distance to the
    lower, in steps. It is right on average, never off by a step, and exact on the grid, zero
    included.

    Raises:
        FedcoreError: ``clip`` is not positive and finite, or ``levels`` is no even number from 2 to
            2^32.
    """

    clip: float = 8.0
    levels: int = 2**22

    def __post_init__(self) -> None:
        if isinstance(self.clip, bool) or not 0 < self.clip < inf:
            raise FedcoreError(f"clip is {self.clip!r}; pass a finite number above 0")
        whole = isinstance(self.levels, int) and not isinstance(self.levels, bool)
        if not whole or self.levels % 2 or not 2 <= self.levels <= 2**32:
            raise FedcoreError(f"levels is {self.levels!r}; pass an even number from 2 to 2^32")

    @property
    def step(self) -> float:
        """The distance of two neighbours."""
        return 2 * self.clip / self.levels

    def encode(self, values: Tensor, draws: Tensor) -> WholeNumbers:
        """The grid points of finite ``values (P,)``.

        Args:
            values: floating point.
            draws: ``(P,)`` fp64, uniform on [0, 1).
        """
        half = self.levels // 2
        places = values.to(torch.float64) / self.step
        clipped = int((places.abs() > half).sum())
        places = places.clamp(-half, half)
        below = places.floor()
        return WholeNumbers((below + (draws < places - below)).to(torch.int64), clipped)
