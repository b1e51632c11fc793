"""A frozen layer with Gram adapters on it."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from fedcore.data.declared import declared_rank_and_scaling
from fedcore.data.seeding import derive_seed
from fedcore.tuners.gram.config import GramConfig
from fedcore.tuners.gram.factors import GramConstants, GramFactors
from fedcore.tuners.gram.frames import (
    DenseFrame,
    Frame,
    FrameRecipe,
    StructuredFrame,
    check_same_frames,
    qr_frame,
)
from fedcore.tuners.shared.additive_layer import AdditiveLayer

INIT_SCALE = 0.1
"""The rows of the initial ``A`` have about this norm unless ``init_std`` says otherwise."""


class GramLayer(AdditiveLayer):
    """``y = W0 x + b + sum over active adapters of s left (A^T A - A0^T A0) right x``.

    ``A`` is ``gram_A`` ``(r, k)``, ``A0`` the buffer ``gram_A0``; dense frames are buffers
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
        super().__init__(base_layer, adapter_name, module)
        self.frame_ids: dict[str, str] = {}
        self._constants = constants = GramConstants()
        self.gram_A = GramFactors(constants)
        self.gram_A0 = constants.initial
        self.gram_left = constants.left
        self.gram_right = constants.right
        self.gram_frame = constants.structured
        self.scaling = constants.scaling
        self.frame_pending = constants.frame_pending
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

    def carries(self, adapter: str) -> bool:
        """Whether the layer has an adapter of this name."""
        return adapter in self.gram_A

    def lora_pair(self, adapter: str) -> tuple[Tensor, Tensor]:
        """``lora_A (m, in)``, ``lora_B (out, m)`` whose product is the adapter's update."""
        return self.gram_A.pair(adapter)

    @property
    def any_active(self) -> bool:
        """Whether :meth:`update` would add anything."""
        return self.gram_A.any_active

    def update(self, x: Tensor) -> Tensor:
        """The active adapters' share of the output, ``(..., in)`` to ``(..., out)``."""
        update: Tensor = self.gram_A(x)
        return update

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
                loaded = {prefix[:-1]: DenseFrame(left, right).frame_id}
                expected = {prefix[:-1]: self.frame_ids[adapter]}
                check_same_frames(expected, loaded, f"adapter {adapter!r}")
                self.frame_pending.pop(adapter, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT's own version also casts to the base's dtype, which is meant for half bases.
        target = self._base_device() if device is None else device
        if adapter_name not in self.gram_A or target.type == "meta":
            return
        for tensors in (self.gram_A, self.gram_A0, self.gram_left, self.gram_right):
            if adapter_name in tensors and tensors[adapter_name].device.type != "meta":
                tensors[adapter_name] = tensors[adapter_name].to(target)
        if adapter_name in self.gram_frame:
            self.gram_frame[adapter_name].to(target)
