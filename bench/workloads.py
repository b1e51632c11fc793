"""The rounds that are timed: adapters of known models, twenty clients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedcore_kernels import FactorLayout


@dataclass(frozen=True)
class Workload:
    """One factor a module, of one rank and width, from ``clients`` clients."""

    name: str
    modules: int
    width: int
    rank: int
    clients: int = 20

    @property
    def shape(self) -> str:
        """What stands in the tables."""
        sizes = f"L={self.modules} k={self.width} r={self.rank} N={self.clients}"
        return f"{self.name}, {sizes}"

    @property
    def layout(self) -> FactorLayout:
        """The flat row of one upload."""
        names = [f"layer.{i:03}" for i in range(self.modules)]
        return FactorLayout.build([(name, "A", self.rank, self.width) for name in names])

    def data(self) -> tuple[Tensor, Tensor, Tensor]:
        """fp32 updates (N, P), weights (N,), previous row (P,): small drifts of one start."""
        random = torch.Generator().manual_seed(0)
        size = self.layout.size
        previous = 0.02 * torch.randn(size, generator=random)
        updates = torch.empty(self.clients, size)
        for row in updates:
            torch.randn(size, generator=random, out=row).mul_(0.002).add_(previous)
        return updates, torch.rand(self.clients, generator=random) + 0.5, previous


ROBERTA_LARGE = Workload("RoBERTa-large q,v", modules=48, width=1024, rank=4)
LLAMA_2_7B = Workload("Llama-2-7B q,v", modules=64, width=4096, rank=8)
