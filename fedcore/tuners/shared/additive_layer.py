"""What every layer with an additive update does alike: merge it, take it out, find its device."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from itertools import chain
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedcore.errors import FedcoreError


class AdditiveLayer(nn.Module, BaseTunerLayer):
    """``y = W0 x + b + sum over active adapters of update(x)``.

    Wraps ``nn.Linear``, ``Conv1D`` or a quantised layer with ``in_features`` and ``out_features``.
    The base weight is read by ``merge`` and by data-dependent starts alone: training and inference
    work on half and quantised bases.

    Subclasses fill in :meth:`carries`, :meth:`lora_pair`, :meth:`any_active` and :meth:`update`.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, module: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = layer_shape(self.get_base_layer(), module)
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name

    @abstractmethod
    def carries(self, adapter: str) -> bool:
        """Whether the layer has an adapter of this name."""

    @abstractmethod
    def lora_pair(self, adapter: str) -> tuple[Tensor, Tensor]:
        """``lora_A (m, in)``, ``lora_B (out, m)`` whose product is the adapter's update."""

    @property
    @abstractmethod
    def any_active(self) -> bool:
        """Whether :meth:`update` would add anything."""

    @abstractmethod
    def update(self, x: Tensor) -> Tensor:
        """The active adapters' share of the output, ``(..., in)`` to ``(..., out)``."""

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense update of ``adapter``, oriented as the base weight is, in fp32 or wider."""
        lora_A, lora_B = self.lora_pair(adapter)
        with torch.autocast(device_type=lora_A.device.type, enabled=False):
            delta = lora_B @ lora_A
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates to the base weight; rounded once, to the weight's dtype.

        Args:
            safe_merge: refuse, before the weight changes, an update that makes it not finite.
            adapter_names: which; the active ones by default.

        Raises:
            FedcoreError: the base weight is quantised, or the merged weight is not finite.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if not self.carries(adapter):
                continue
            merged = self._shifted_weight(adapter, +1)
            if safe_merge and not torch.isfinite(merged).all():
                raise FedcoreError(f"adapter {adapter!r} makes the merged weight NaN or infinite")
            self.get_base_layer().weight.data = merged
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take the merged updates out of the base weight again, up to the weight's rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self.get_base_layer().weight.data = self._shifted_weight(self.merged_adapters.pop(), -1)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is additive; ``export_lora`` converts it exactly."""
        return True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the active adapters' updates, in the base output's dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged or not self.any_active:
            return result
        return (result + self.update(x)).to(result.dtype)

    def _shifted_weight(self, adapter: str, sign: int) -> Tensor:
        weight = cast(nn.Linear, self.get_base_layer()).weight.data
        if not weight.dtype.is_floating_point:
            raise FedcoreError(
                f"adapter {adapter!r} cannot be merged into a base weight of dtype {weight.dtype}; "
                "export it with export_lora and keep it beside the base"
            )
        delta = self.get_delta_weight(adapter)
        shifted = torch.add(weight.to(delta.dtype), delta.to(weight.device), alpha=sign)
        return shifted.to(weight.dtype)

    def _base_device(self) -> torch.device:
        base = self.get_base_layer()
        first = next(chain(base.parameters(), base.buffers()), None)
        return torch.device("cpu") if first is None else first.device


def layer_shape(layer: nn.Module, module: str) -> tuple[int, int]:
    """``(out, in)`` of a layer that can carry an additive adapter.

    Raises:
        FedcoreError: naming ``module`` and its type.
    """
    if isinstance(layer, Conv1D):
        fan_in, fan_out = layer.weight.shape
        return fan_out, fan_in
    shape = (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
    if isinstance(shape[0], int) and isinstance(shape[1], int):
        return shape[0], shape[1]
    raise FedcoreError(
        f"module {module} is a {type(layer).__name__}; an adapter needs nn.Linear, Conv1D or a "
        "quantised linear layer"
    )
