"""Where a Gram layer keeps its tensors, by adapter name, never narrower than fp32.

``model.to(torch.bfloat16)`` is meant for the base weights. An initial factor rounded to bf16 no
longer cancels and dense frames rounded to bf16 are orthonormal to 1e-2 only, so these containers
follow a cast to another device and to wider dtypes, not to half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import cast

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from fedcore.errors import FedcoreError
from fedcore.tuners.lora_factors import lora_factors
from fedcore.tuners.shared.frames import DenseFrame, Frame, StructuredFrame


def at_least_fp32(cast: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``cast``, as ``nn.Module`` applies it, except where it would narrow a tensor below fp32."""

    def guarded(tensor: Tensor) -> Tensor:
        out = cast(tensor)
        narrowed = out.element_size() < min(tensor.element_size(), torch.float32.itemsize)
        return tensor.to(out.device) if narrowed else out

    return guarded


class WideBufferDict(BufferDict):
    """A ``BufferDict`` that is not cast to half precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WideBufferDict:
        return super()._apply(at_least_fp32(fn), recurse)


@dataclass(eq=False)
class GramConstants:
    """What is frozen in a Gram layer, by adapter name; the layer owns the containers."""

    initial: WideBufferDict = field(default_factory=lambda: WideBufferDict(persistent=True))
    left: WideBufferDict = field(default_factory=lambda: WideBufferDict(persistent=True))
    right: WideBufferDict = field(default_factory=lambda: WideBufferDict(persistent=True))
    structured: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    scaling: dict[str, float] = field(default_factory=dict)
    frame_pending: dict[str, str] = field(default_factory=dict)

    def offset(self, adapter: str) -> Tensor | None:
        """The initial factor of ``adapter``, or None for an adapter without offset."""
        if adapter not in self.initial:
            return None
        return self.initial[adapter]

    def frame(self, adapter: str) -> Frame:
        """The frame of ``adapter``.

        Raises:
            FedcoreError: the frame is stored in the adapter's file, which has not been loaded.
        """
        if adapter in self.structured:
            return cast(StructuredFrame, self.structured[adapter])
        if adapter in self.frame_pending:
            raise FedcoreError(
                f"adapter {adapter!r} has a stored frame ({self.frame_pending[adapter]}) that was "
                "not loaded; load the adapter's file, gram_left and gram_right are in it"
            )
        return DenseFrame(self.left[adapter], self.right[adapter])


class GramFactors(nn.ParameterDict):
    """The trained factors ``A (r, k)`` by adapter name; called, it sums the active ones' updates.

    The module that is called is the module that owns the parameters: per-sample gradients by hooks
    (Opacus) or by ``torch.func`` are then right, and a key in a state dict ends in ``gram_A``.
    """

    # ParameterDict refuses to be called; a Module does not.
    __call__ = nn.Module.__call__

    def __init__(self, constants: GramConstants) -> None:
        super().__init__()
        # Plain attributes: the containers in them are registered with the layer, not twice.
        # Underscored, because an adapter's name becomes an attribute here too.
        self._constants = constants
        self._active: tuple[str, ...] = ()

    def activate(self, adapters: Iterable[str]) -> None:
        """Add up the updates of these ``adapters`` from now on; unknown names are left out."""
        self._active = tuple(name for name in adapters if name in self)

    @property
    def any_active(self) -> bool:
        """Whether a call would add anything."""
        return bool(self._active)

    def pair(self, adapter: str) -> tuple[Tensor, Tensor]:
        """``lora_A (m, in)``, ``lora_B (out, m)`` of ``adapter``; see :func:`lora_factors`."""
        held = self._constants
        return lora_factors(
            self[adapter], held.offset(adapter), held.frame(adapter), held.scaling[adapter]
        )

    def forward(self, x: Tensor) -> Tensor:
        """The active adapters' sum of ``s (A^T A - A0^T A0)`` between the frames: ``(..., in)`` to
        ``(..., out)``, in the factors' dtype or autocast's.
        """
        updates = []
        for adapter in self._active:
            lora_A, lora_B = self.pair(adapter)
            hidden = nn.functional.linear(x.to(lora_A.dtype), lora_A)
            updates.append(nn.functional.linear(hidden, lora_B))
        return sum(updates[1:], start=updates[0])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GramFactors:
        return super()._apply(at_least_fp32(fn), recurse)
