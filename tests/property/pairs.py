"""Hypothesis strategies for rounds of two-factor updates ``left_n^T right_n``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.property.stacks import KINDS, make_round

PAIR_KINDS = (*KINDS, "mixed_ranks", "zero_updates")
"""Trouble of a stack, and clients of lower rank or without an update."""


@dataclass(frozen=True)
class Pair:
    """Factors left (N, L, r, p) and right (N, L, r, q), and weights (N,)."""

    kind: str
    left: Tensor
    right: Tensor
    weights: Tensor

    @property
    def shares(self) -> Tensor:
        """Weights that sum to 1."""
        return self.weights / self.weights.sum()


def make_pair(
    kind: str,
    clients: int,
    modules: int,
    rank: int,
    widths: tuple[int, int],
    seed: int,
    drift: float = 0.3,
    dtype: torch.dtype = torch.float64,
) -> Pair:
    """Both factors drift from a common start and share the trouble named by ``kind``."""
    base = kind if kind in KINDS else "random"
    left, right = (
        make_round(base, clients, modules, rank, width, seed + i, drift, dtype)
        for i, width in enumerate(widths)
    )
    pair = Pair(kind, left.stack, right.stack, left.weights)
    if kind == "mixed_ranks":
        for n in range(clients):
            pair.left[n, :, n % rank + 1 :] = 0
            pair.right[n, :, n % rank + 1 :] = 0
    elif kind == "zero_updates":
        pair.left[:, 0] = 0
    return pair


@st.composite
def pairs(
    draw: st.DrawFn,
    max_clients: int = 6,
    max_modules: int = 3,
    max_rank: int = 4,
    max_width: int = 33,
    kinds: tuple[str, ...] = PAIR_KINDS,
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
) -> Pair:
    """Pairs of every kind, stacks longer and shorter than either width among them."""
    rank = draw(st.integers(1, max_rank))
    widths = st.integers(rank, max_width)
    return make_pair(
        draw(st.sampled_from(kinds)),
        draw(st.integers(1, max_clients)),
        draw(st.integers(1, max_modules)),
        rank,
        (draw(widths), draw(widths)),
        draw(st.integers(0, 2**31)),
        draw(st.sampled_from((1e-3, 0.3, 3.0))),
        draw(st.sampled_from(dtypes)),
    )
