"""Where a tri-factor layer keeps its factors, and how they act: ``x -> s B (R (A x))``.

There is a container for each of ``A``, ``R`` and ``B``, and a call of one multiplies by that factor
of every active adapter at once: ``A`` stacks the hidden vectors of several adapters along the rank,
``R`` is block-diagonal on that stack and ``B`` adds up. So every factor, whichever of them train,
is owned by the module that is called.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedcore.tuners.shared.factors import ActiveFactors


class StackedFactors(ActiveFactors):
    """One factor of a layer's adapters, by adapter name; subclasses say how it acts when called."""

    @property
    def active(self) -> list[nn.Parameter]:
        """The active adapters' factors."""
        return [self[name] for name in self._active]


class InputBases(StackedFactors):
    """``A (r, in)``: ``x (..., in)`` to ``[A_1 x, A_2 x, ...] (..., m)``, m the sum of ranks."""

    def forward(self, x: Tensor) -> Tensor:
        """In the factors' dtype, or autocast's."""
        hidden = [nn.functional.linear(x.to(factor.dtype), factor) for factor in self.active]
        return torch.cat(hidden, -1)


class Cores(StackedFactors):
    """``R (r, r)``: ``(..., m)`` to ``[R_1 h_1, R_2 h_2, ...] (..., m)``."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Block by block."""
        cores = self.active
        parts = hidden.split([core.shape[0] for core in cores], -1)
        products = [nn.functional.linear(h, core) for h, core in zip(parts, cores, strict=True)]
        return torch.cat(products, -1)


class OutputBases(StackedFactors):
    """``B (out, r)``: ``(..., m)`` to ``sum s_i B_i h_i (..., out)``."""

    def __init__(self, scaling: dict[str, float]) -> None:
        super().__init__()
        self._scaling = scaling

    def forward(self, hidden: Tensor) -> Tensor:
        """The adapters' updates, added up."""
        parts = hidden.split([factor.shape[1] for factor in self.active], -1)
        updates = [
            nn.functional.linear(self._scaling[name] * h, self[name])
            for name, h in zip(self._active, parts, strict=True)
        ]
        return sum(updates[1:], start=updates[0])


def tri_pair(A: Tensor, R: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """``lora_A (r, in) = A``, ``lora_B (out, r) = s B R``: plain LoRA of the same update, exactly.

    In fp32, or fp64 for fp64 factors, whatever autocast says.
    """
    with torch.autocast(device_type=A.device.type, enabled=False):
        dtype = torch.promote_types(A.dtype, torch.float32)
        return A.to(dtype), scaling * (B.to(dtype) @ R.to(dtype))
