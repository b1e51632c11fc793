"""The rounds that are timed: adapters of known models and a number of clients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedcore_kernels import FactorLayout, SlotGroup


@dataclass(frozen=True)
class Workload:
    """One factor per module, of one rank and width, from ``clients`` clients."""

    name: str
    modules: int
    width: int
    rank: int
    clients: int = 20

    @property
    def shape(self) -> str:
        """What stands in the tables."""
        sizes = f"N={self.clients} L={self.modules} r={self.rank} k={self.width}"
        return f"{self.name}, {sizes}" if self.name else sizes

    @property
    def layout(self) -> FactorLayout:
        """The flat row of one upload."""
        names = [f"layer.{i:03}" for i in range(self.modules)]
        return FactorLayout.build([(name, "A", self.rank, self.width) for name in names])

    def uploads(
        self, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Updates (N, P) of ``dtype``, weights (N,) on the CPU, previous row (P,) in fp32.

        The clients' rows are small drifts of the previous one; the same on every call.
        """
        random = torch.Generator(device).manual_seed(0)
        size = self.layout.size
        previous = 0.02 * torch.randn(size, generator=random, device=device)
        updates = torch.empty(self.clients, size, dtype=dtype, device=device)
        drift = torch.empty(size, device=device)
        for row in updates:
            row.copy_(drift.normal_(generator=random).mul_(0.002).add_(previous))
        weights = torch.linspace(0.5, 1.5, self.clients)
        return updates, weights, previous

    def stacks(
        self, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same round as stack (N, L, r, k), weights (N,) and previous factors (L, r, k)."""
        updates, weights, previous = self.uploads(device, dtype)
        (group,) = self.layout.groups
        return group.view(updates), weights, group.view(previous)


ROBERTA_LARGE = Workload("RoBERTa-large q,v", modules=48, width=1024, rank=4)
LLAMA_2_7B = Workload("Llama-2-7B q,v", modules=64, width=4096, rank=8)
LLAMA_2_7B_ALL = Workload("Llama-2-7B all", modules=224, width=4096, rank=8, clients=100)


@dataclass(frozen=True)
class Setting:
    """Where the operations run, and whether only on a few modules of the smaller model."""

    device: torch.device
    small: bool = False

    @property
    def rounds(self) -> list[Workload]:
        """The rounds of whole servers, the smaller first."""
        if self.small:
            return [replace(ROBERTA_LARGE, modules=8)]
        last = LLAMA_2_7B_ALL if self.device.type == "cuda" else LLAMA_2_7B
        return [ROBERTA_LARGE, last]


def state_dicts(flat: Tensor, group: SlotGroup) -> list[dict[str, Tensor]]:
    """Rows ``flat (N, P)`` as the dictionaries in which frameworks pass uploads about."""
    return [
        {
            f"{module}.lora_A.weight": factor
            for module, factor in zip(group.modules, row, strict=True)
        }
        for row in group.view(flat)
    ]
