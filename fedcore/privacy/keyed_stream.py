"""Random numbers that only who holds the key can draw again."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256, shake_256
from math import pi, prod

import numpy as np
import torch
from torch import Tensor

SECRET_BITS = 256
"""Of a seed that nobody may guess."""


class KeyedStream:
    """Uniform and normal numbers from SHAKE-256, keyed by a seed of any size and a purpose.

    What privacy rests on must not come from torch's CPU generator: it keeps only 32 bits of its
    seed, so that four billion trials find a client's noise, and of a hundred thousand draws of it
    two are likely to be the same. Here the whole seed counts; streams of different seeds or
    purposes are unrelated, and the same ones give the same numbers. Noise is secret if the seed is,
    and as hard to guess.

    Numbers are fp64 on the CPU, so they do not depend on the device that they are added on.

    Example:
        >>> stream = KeyedStream(0, "noise")
        >>> bool((stream.normal((2,)) == KeyedStream(0, "noise").normal((2,))).all())
        True
    """

    def __init__(self, seed: int, *purpose: str | int) -> None:
        text = "/".join([str(seed), *(str(part) for part in purpose)])
        self._key = sha256(text.encode()).digest()
        self._drawn = 0

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Independent multiples of 2^-53 in ``[0, 1)``, fp64."""
        count = prod(shape)
        # Every call reads from the beginning of a stream of its own.
        block = self._key + self._drawn.to_bytes(8, "little")
        self._drawn += 1
        raw = np.frombuffer(shake_256(block).digest(8 * count), dtype="<u8")
        return torch.from_numpy((raw >> 11).astype(np.float64)).mul_(2.0**-53).reshape(tuple(shape))

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Independent ``N(0, 1)``, fp64, by Box and Muller's transform."""
        count = prod(shape)
        half = (count + 1) // 2
        angle, level = 2 * pi * self.uniform((half,)), 1 - self.uniform((half,))
        radius = (-2 * level.log()).sqrt()
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count].reshape(tuple(shape))
