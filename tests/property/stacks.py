"""Hypothesis strategies for a round's uploads: sizes, strides, weights and spectra."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

KINDS = ("random", "strided", "duplicates", "rank_deficient", "repeated_spectrum", "zero_weight")
"""Shapes of trouble a stack may have."""


@dataclass(frozen=True)
class Round:
    """Uploads (N, L, r, k), weights (N,) and the previous factors (L, r, k)."""

    kind: str
    stack: Tensor
    weights: Tensor
    previous: Tensor

    @property
    def shares(self) -> Tensor:
        """Weights that sum to 1."""
        return self.weights / self.weights.sum()


def make_round(
    kind: str,
    clients: int,
    modules: int,
    rank: int,
    width: int,
    seed: int,
    drift: float = 0.3,
    dtype: torch.dtype = torch.float64,
) -> Round:
    """``A_n = A_prev + drift N(0, 1)`` with the trouble named by ``kind``."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    previous = normal(modules, rank, width)
    stack = previous + drift * normal(clients, modules, rank, width)
    weights = torch.rand(clients, generator=random, dtype=torch.float64) + 0.05
    stack, previous = stack.to(dtype), previous.to(dtype)
    if kind == "strided":
        row = normal(clients, 3 + modules * (rank * width + 7)).to(dtype)
        view = row.as_strided(
            stack.shape, (row.shape[1], rank * width + 7, width, 1), storage_offset=3
        )
        stack = view.copy_(stack)
    elif kind == "duplicates":
        stack = stack[:1].expand_as(stack)
    elif kind == "rank_deficient":
        stack = stack.clone()
        stack[:, :, -1] = stack[:, :, 0]
    elif kind == "repeated_spectrum" and rank <= width:
        basis = torch.linalg.qr(previous.double().mT).Q.mT
        stack = basis.to(dtype).expand_as(stack).clone()
    elif kind == "zero_weight" and clients > 1:
        weights[0] = 0.0
    return Round(kind, stack, weights, previous)


@st.composite
def rounds(
    draw: st.DrawFn,
    max_clients: int = 6,
    max_modules: int = 3,
    max_rank: int = 4,
    max_width: int = 33,
    kinds: tuple[str, ...] = KINDS,
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
) -> Round:
    """Rounds of every kind, with rank 1, odd widths and single clients among them."""
    rank = draw(st.integers(1, max_rank))
    return make_round(
        draw(st.sampled_from(kinds)),
        draw(st.integers(1, max_clients)),
        draw(st.integers(1, max_modules)),
        rank,
        draw(st.integers(rank, max_width)),
        draw(st.integers(0, 2**31)),
        draw(st.sampled_from((1e-3, 0.3, 3.0))),
        draw(st.sampled_from(dtypes)),
    )
