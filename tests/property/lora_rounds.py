"""Hypothesis strategies for rounds of LoRA uploads on modules of several shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from fedcore.data.cohort import Cohort
from fedcore.methods import Broadcast
from fedcore_kernels.layout import FactorLayout

KINDS = ("random", "near", "identical", "shared_a", "repeated_row", "mixed_ranks", "zero")
"""Far apart, close to the broadcast, equal, of one A, with a singular mean A, of mixed ranks."""

WIDTHS = (7, 33, 64)


@dataclass(frozen=True)
class LoraRound:
    """The uploads of a round and the state that its clients started from."""

    kind: str
    cohort: Cohort
    previous: Broadcast

    def with_updates(self, updates: Tensor) -> Cohort:
        """The same clients with other uploads."""
        return replace(self.cohort, updates=updates)


def pick(cohort: Cohort, clients: Sequence[int], weights: Sequence[float] | None = None) -> Cohort:
    """Some of the clients in the given order, with weights of their own if given."""
    index = torch.tensor(clients, dtype=torch.int64)
    return replace(
        cohort,
        updates=cohort.updates[index],
        weights=cohort.weights[index] if weights is None else torch.tensor(weights).double(),
        client_ids=tuple(f"c{n:03d}" for n in range(len(clients))),
        ranks=cohort.ranks[index],
        scalings=cohort.scalings[index],
    )


def make_lora_round(
    kind: str,
    weights: Sequence[float],
    shapes: Sequence[tuple[int, int]],
    rank: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> LoraRound:
    """Uploads for modules ``m0, m1, ...`` of ``shapes`` (d_out, d_in) and a head of 3 x 5."""
    layout = FactorLayout.build(
        [
            slot
            for j, (d_out, d_in) in enumerate(shapes)
            for slot in ((f"m{j}", "A", rank, d_in), (f"m{j}", "B", rank, d_out))
        ],
        [("head", (3, 5))],
    )
    random = torch.Generator().manual_seed(seed)
    clients = len(weights)
    start = torch.zeros(layout.size, dtype=torch.float64)
    updates = torch.zeros(clients, layout.size, dtype=torch.float64)
    ranks = torch.full((clients, len(shapes)), rank)
    for slot in layout:
        held, sent = layout.view(start, slot), layout.view(updates, slot)
        held.copy_(torch.randn(held.shape, generator=random, dtype=torch.float64))
        drift = torch.randn(sent.shape, generator=random, dtype=torch.float64)
        sent.copy_(held + {"near": 1e-3, "random": 3.0}.get(kind, 0.3) * drift)
        if slot.dense:
            continue
        if kind == "identical":
            sent.copy_(sent[:1].expand_as(sent).clone())
        elif kind == "shared_a" and slot.factor == "A":
            sent.copy_(held.expand_as(sent))
        elif kind == "repeated_row" and slot.factor == "A":
            sent[:, -1] = sent[:, 0]
        elif kind == "mixed_ranks":
            for n in range(clients):
                sent[n, n % rank + 1 :] = 0
                ranks[n] = n % rank + 1
        elif kind == "zero":
            sent.zero_()
    cohort = Cohort(
        layout=layout,
        updates=updates.to(dtype),
        weights=torch.tensor(weights, dtype=torch.float64),
        client_ids=tuple(f"c{n:03d}" for n in range(clients)),
        round=1,
        ranks=ranks,
        scalings=torch.ones(clients, len(shapes), dtype=torch.float64),
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return LoraRound(kind, cohort, Broadcast(layout, start.to(wide)))


@st.composite
def lora_rounds(
    draw: st.DrawFn,
    kinds: tuple[str, ...] = KINDS,
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    max_rank: int = 5,
) -> LoraRound:
    """Rounds of every kind; weights may be zero, stacks longer than a width occur."""
    share = st.just(0.0) | st.floats(0.01, 1e6)
    weights = draw(st.lists(share, min_size=1, max_size=6).filter(any))
    width = st.sampled_from(WIDTHS)
    return make_lora_round(
        draw(st.sampled_from(kinds)),
        weights,
        draw(st.lists(st.tuples(width, width), min_size=1, max_size=4)),
        draw(st.integers(1, max_rank)),
        draw(st.integers(0, 2**31)),
        draw(st.sampled_from(dtypes)),
    )
