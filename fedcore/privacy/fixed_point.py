"""Real numbers as integers of a public grid, without bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore.checks import is_integer, number, wrong


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
        FedcoreError: ``clip`` is not positive and finite, or ``levels`` is not an even number from
            2 to 2^32.
    """

    clip: float = 8.0
    levels: int = 2**22

    def __post_init__(self) -> None:
        number("", "clip", self.clip, above=0)
        if not is_integer(self.levels) or self.levels % 2 or not 2 <= self.levels <= 2**32:
            raise wrong("", "levels", self.levels, "an even number from 2 to 2^32")

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
