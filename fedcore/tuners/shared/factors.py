"""Containers of a layer's factors, by adapter name, never narrower than fp32.

``model.to(torch.bfloat16)`` is meant for the base weights. Frozen bases and dense frames rounded to
bf16 are orthonormal to 1e-2 only, and an initial factor rounded to bf16 no longer cancels, so these
containers follow a cast to another device and to wider dtypes, not to half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Self

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn


def _at_least_fp32(cast: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``cast``, as ``nn.Module`` applies it, except where it would narrow a tensor below fp32."""

    def guarded(tensor: Tensor) -> Tensor:
        out = cast(tensor)
        narrowed = out.element_size() < min(tensor.element_size(), torch.float32.itemsize)
        return tensor.to(out.device) if narrowed else out

    return guarded


class WideBufferDict(BufferDict):
    """A ``BufferDict`` that is not cast to half precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(_at_least_fp32(fn), recurse)


class ActiveFactors(nn.ParameterDict):
    """One trained factor of a layer's adapters; subclasses say what a call of the active ones does.

    The module that is called is the module that owns the parameters: per-sample gradients by hooks
    (Opacus) or by ``torch.func`` are then right, and a key in a state dict ends in the factor's
    name.
    """

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(_at_least_fp32(fn), recurse)
