"""Where a tri-factor layer keeps its factors, and how they act: ``x -> s B (R (A x))``.

There is a container for each of ``A``, ``R`` and ``B``, and a call of one multiplies by that factor
of every active adapter at once: ``A`` stacks the hidden vectors of several adapters along the rank,
``R`` is block-diagonal on that stack and ``B`` adds up. So the module that is called is the module
that owns the parameters, and per-sample gradients by hooks (Opacus) or by ``torch.func`` are right
for every choice of the factors that train.

Frozen bases rounded to bf16 are orthonormal to 1e-2 only; like everything in
:mod:`fedcore.tuners.shared.containers` these follow a cast of the model to wider dtypes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fedcore.tuners.shared.containers import at_least_fp32


class StackedFactors(nn.ParameterDict):
    """One factor of a layer's adapters, by adapter name; subclasses say how it acts when called."""

    # ParameterDict refuses to be called; a Module does not.
    __call__ = nn.Module.__call__

    def __init__(self) -> None:
        super().__init__()
        # Underscored, because an adapter's name becomes an attribute here too.
        self._active: tuple[str, ...] = ()

    def activate(self, adapters: Iterable[str]) -> None:
        """Use these ``adapters`` from now on, in this order; unknown names are left out."""
        self._active = tuple(name for name in adapters if name in self)

    @property
    def any_active(self) -> bool:
        """Whether a call would use any adapter."""
        return bool(self._active)

    @property
    def active(self) -> list[nn.Parameter]:
        """The active adapters' factors."""
        return [self[name] for name in self._active]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StackedFactors:
        return super()._apply(at_least_fp32(fn), recurse)


class InputBases(StackedFactors):
    """``A (r, in)``: ``x (..., in)`` to ``[A_1 x, A_2 x, ...] (..., m)``, m the sum of ranks."""

    def forward(self, x: Tensor) -> Tensor:
        """In the factors' dtype, or autocast's."""
        found = [nn.functional.linear(x.to(factor.dtype), factor) for factor in self.active]
        return torch.cat(found, -1)


class Cores(StackedFactors):
    """``R (r, r)``: ``(..., m)`` to ``[R_1 h_1, R_2 h_2, ...] (..., m)``."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Block by block."""
        cores = self.active
        parts = hidden.split([core.shape[0] for core in cores], -1)
        found = [nn.functional.linear(h, core) for h, core in zip(parts, cores, strict=True)]
        return torch.cat(found, -1)


class OutputBases(StackedFactors):
    """``B (out, r)``: ``(..., m)`` to ``sum s_i B_i h_i (..., out)``."""

    def __init__(self, scaling: dict[str, float]) -> None:
        super().__init__()
        self._scaling = scaling

    def forward(self, hidden: Tensor) -> Tensor:
        """The adapters' updates, added up."""
        parts = hidden.split([factor.shape[1] for factor in self.active], -1)
        found = [
            nn.functional.linear(self._scaling[name] * h, self[name])
            for name, h in zip(self._active, parts, strict=True)
        ]
        return sum(found[1:], start=found[0])


def tri_pair(A: Tensor, R: Tensor, B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """``lora_A (r, in) = A``, ``lora_B (out, r) = s B R``: plain LoRA of the same update, exactly.

    In fp32, or fp64 for fp64 factors, whatever autocast says.
    """
    with torch.autocast(device_type=A.device.type, enabled=False):
        dtype = torch.promote_types(A.dtype, torch.float32)
        return A.to(dtype), scaling * (B.to(dtype) @ R.to(dtype))
