"""A frozen layer with Gram adapters on it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import chain
from math import sqrt
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedcore.data.adapter_state import declared_rank_and_scaling
from fedcore.data.seeding import derive_seed
from fedcore.errors import FedcoreError
from fedcore.tuners.containers import GramConstants, GramFactors
from fedcore.tuners.frames import (
    DenseFrame,
    Frame,
    FrameRecipe,
    StructuredFrame,
    check_same_frames,
    qr_frame,
)
from fedcore.tuners.gram_config import GramConfig

INIT_SCALE = 0.1
"""The rows of the initial ``A`` have about this norm unless ``init_std`` says otherwise."""


class GramLayer(nn.Module, BaseTunerLayer):
    """``y = W0 x + b + sum over active adapters of s left (A^T A - A0^T A0) right x``.

    Wraps ``nn.Linear``, ``Conv1D`` or a quantised layer with ``in_features`` and ``out_features``.
    The base weight is read by ``merge`` alone: training and inference work on half and quantised
    bases. ``A`` is ``gram_A`` ``(r, k)``, ``A0`` the buffer ``gram_A0``; dense frames are buffers
    too, ``gram_left`` and ``gram_right``; frames made from a recipe are not in the state dict.
    """

    adapter_layer_names = ("gram_A",)
    other_param_names = (
        "gram_A0",
        "gram_left",
        "gram_right",
        "gram_frame",
        "r",
        "scaling",
        "frame_pending",
        "frame_ids",
    )

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, module: str, config: GramConfig
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = layer_shape(self.get_base_layer(), module)
        self.r: dict[str, int] = {}
        self.frame_ids: dict[str, str] = {}
        self._constants = constants = GramConstants()
        self.gram_A = GramFactors(constants)
        self.gram_A0 = constants.initial
        self.gram_left = constants.left
        self.gram_right = constants.right
        self.gram_frame = constants.structured
        self.scaling = constants.scaling
        self.frame_pending = constants.frame_pending
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, module, config)

    def update_layer(self, adapter_name: str, module: str, config: GramConfig) -> None:
        """Add the adapter ``adapter_name`` to the layer; ``module`` is its path in the base model.

        ``A`` and ``A0`` are the same draw from N(0, init_std^2), which depends on the configuration
        and the module's path only.
        """
        recipe = FrameRecipe(
            config.frame, config.frame_seed, module, self.out_features, self.in_features
        )
        rank, scaling = declared_rank_and_scaling(vars(config), module)
        device = self._base_device()
        self._add_frame(adapter_name, recipe, config.frame_ids.get(module), device)
        generator = torch.Generator().manual_seed(derive_seed(config.init_seed, "gram_A", module))
        std = INIT_SCALE / sqrt(recipe.k) if config.init_std is None else config.init_std
        initial = (torch.randn(rank, recipe.k, generator=generator) * std).to(device)
        self.r[adapter_name] = rank
        self.scaling[adapter_name] = scaling
        self.gram_A[adapter_name] = nn.Parameter(initial)
        if config.offset:
            self.gram_A0[adapter_name] = initial.clone()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def frame(self, adapter: str) -> Frame:
        """The frame of ``adapter``."""
        return self._constants.frame(adapter)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate ``adapter_names`` and freeze the others, as PEFT does."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.gram_A.activate(names)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense update of ``adapter``, oriented as the base weight is, in fp32 or wider."""
        lora_A, lora_B = self.gram_A.pair(adapter)
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
            if adapter not in self.gram_A:
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
        if self.disable_adapters or self.merged or not self.gram_A.any_active:
            return result
        return (result + self.gram_A(x)).to(result.dtype)

    def __repr__(self) -> str:
        return "gram." + super().__repr__()

    def _add_frame(
        self, adapter: str, recipe: FrameRecipe, recorded: str | None, device: torch.device
    ) -> None:
        if recipe.kind == "structured":
            self.gram_frame[adapter] = StructuredFrame(recipe, device)
            self.frame_ids[adapter] = recipe.frame_id
        elif recorded is None:
            frame = qr_frame(recipe)
            self.gram_left[adapter] = frame.left.to(device)
            self.gram_right[adapter] = frame.right.to(device)
            self.frame_ids[adapter] = frame.frame_id
        else:
            # The bytes are in a file: room for them, unusable until they are there.
            self.gram_left[adapter] = torch.zeros(self.out_features, recipe.k, device=device)
            self.gram_right[adapter] = torch.zeros(recipe.k, self.in_features, device=device)
            self.frame_ids[adapter] = recorded
            self.frame_pending[adapter] = recorded

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for adapter in list(self.gram_left):
            left = state_dict.get(f"{prefix}gram_left.{adapter}")
            right = state_dict.get(f"{prefix}gram_right.{adapter}")
            if left is not None and right is not None:
                found = {prefix[:-1]: DenseFrame(left, right).frame_id}
                expected = {prefix[:-1]: self.frame_ids[adapter]}
                check_same_frames(expected, found, f"adapter {adapter!r}")
                self.frame_pending.pop(adapter, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

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
        held = next(chain(base.parameters(), base.buffers()), None)
        return torch.device("cpu") if held is None else held.device

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT's own version also casts to the base's dtype, which is meant for half bases.
        target = self._base_device() if device is None else device
        if adapter_name not in self.gram_A or target.type == "meta":
            return
        for held in (self.gram_A, self.gram_A0, self.gram_left, self.gram_right):
            if adapter_name in held and held[adapter_name].device.type != "meta":
                held[adapter_name] = held[adapter_name].to(target)
        if adapter_name in self.gram_frame:
            self.gram_frame[adapter_name].to(target)


def layer_shape(layer: nn.Module, module: str) -> tuple[int, int]:
    """``(out, in)`` of a layer that can carry a Gram adapter.

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
        f"module {module} is a {type(layer).__name__}; a Gram adapter needs nn.Linear, Conv1D or a "
        "quantised linear layer"
    )
