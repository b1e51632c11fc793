"""Where a Gram layer keeps its tensors, by adapter name: what is frozen, and what trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from fedcore.errors import FedcoreError
from fedcore.tuners.gram.frames import DenseFrame, Frame, StructuredFrame
from fedcore.tuners.lora_factors import lora_factors
from fedcore.tuners.shared.factors import ActiveFactors, WideBufferDict


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


class GramFactors(ActiveFactors):
    """The trained factors ``A (r, k)``; a call adds up the updates of the active adapters."""

    def __init__(self, constants: GramConstants) -> None:
        super().__init__()
        # A plain attribute: the containers in it are registered with the layer, not twice.
        self._constants = constants

    def pair(self, adapter: str) -> tuple[Tensor, Tensor]:
        """``lora_A (m, in)``, ``lora_B (out, m)`` of ``adapter``; see :func:`lora_factors`."""
        constants = self._constants
        return lora_factors(
            self[adapter],
            constants.offset(adapter),
            constants.frame(adapter),
            constants.scaling[adapter],
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
