"""A frozen layer with tri-factor adapters on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedcore.data.declared import declared_rank_and_scaling
from fedcore.errors import FedcoreError
from fedcore.tuners.shared.additive_layer import AdditiveLayer
from fedcore.tuners.tri.config import TriConfig
from fedcore.tuners.tri.factors import (
    Cores,
    InputBases,
    OutputBases,
    StackedFactors,
    tri_pair,
)
from fedcore.tuners.tri.start import TriFactors, initial_factors

_IN_FILE = "the adapter's file, which was not loaded"
_STATISTIC = "a statistic that was not given; call apply_sb"


class TriLayer(AdditiveLayer):
    """``y = W0 x + b + sum over active adapters of s B R A x``.

    The factors are ``tri_A (r, in)``, ``tri_R (r, r)`` and ``tri_B (out, r)``; those that do not
    train are parameters without gradient, saved with the adapter: they cannot be derived again.
    """

    adapter_layer_names = ("tri_A", "tri_R", "tri_B")
    other_param_names = ("r", "scaling", "trains", "pending")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, module: str, config: TriConfig
    ) -> None:
        super().__init__(base_layer, adapter_name, module)
        self.tri_A = InputBases()
        self.tri_R = Cores()
        self.tri_B = OutputBases(self.scaling)
        self.trains: dict[str, tuple[str, ...]] = {}
        self.pending: dict[str, str] = {}
        self.update_layer(adapter_name, module, config)

    def update_layer(self, adapter_name: str, module: str, config: TriConfig) -> None:
        """Add the adapter ``adapter_name`` to the layer; ``module`` is its path in the base model.

        What is drawn depends on ``init_seed`` and the module's path only. A configuration that
        names the module's shape comes from a file, whose tensors the factors wait for.

        Raises:
            FedcoreError: as :func:`~fedcore.tuners.tri.start.initial_factors`.
        """
        rank, scaling = declared_rank_and_scaling(vars(config), module)
        waits = {"sb": _STATISTIC}.get(config.init)
        if module in config.module_shapes:
            waits = _IN_FILE
        if waits:
            shapes = ((rank, self.in_features), (rank, rank), (self.out_features, rank))
            start = TriFactors(*(torch.zeros(shape) for shape in shapes))
        else:
            shape = (self.out_features, self.in_features)
            base = self.get_base_layer()
            start = initial_factors(config.init, config.init_seed, module, shape, rank, base)
        self.r[adapter_name] = rank
        self.scaling[adapter_name] = scaling
        self.trains[adapter_name] = config.trains
        if waits:
            self.pending[adapter_name] = waits
        for factor, values in start._asdict().items():
            self.factor(factor)[adapter_name] = nn.Parameter(values.to(self._base_device()))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factor(self, name: str) -> StackedFactors:
        """The container of factor ``"A"``, ``"R"`` or ``"B"``."""
        factors: StackedFactors = getattr(self, f"tri_{name}")
        return factors

    @torch.no_grad()
    def set_factors(self, adapter: str, factors: TriFactors) -> None:
        """Copy ``factors`` into those of ``adapter``, which then waits for nothing more."""
        for name, values in factors._asdict().items():
            self.factor(name)[adapter].copy_(values)
        self.pending.pop(adapter, None)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate ``adapter_names``; of their factors train those the configuration says."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for factor in "ARB":
            self.factor(factor).activate(names)
        self._freeze_bases()

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Gradients on or off for the factors of ``adapter_names`` that train at all."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_bases()

    def carries(self, adapter: str) -> bool:
        """Whether the layer has an adapter of this name."""
        return adapter in self.tri_R

    def lora_pair(self, adapter: str) -> tuple[Tensor, Tensor]:
        """``lora_A (r, in) = A``, ``lora_B (out, r) = s B R`` of ``adapter``.

        Raises:
            FedcoreError: the factors are not there yet.
        """
        self._check_present([adapter])
        A, R, B = (self.factor(name)[adapter] for name in "ARB")
        return tri_pair(A, R, B, self.scaling[adapter])

    @property
    def any_active(self) -> bool:
        """Whether an active adapter is on this layer."""
        return self.tri_R.any_active

    def update(self, x: Tensor) -> Tensor:
        """``sum s B (R (A x))``, ``(..., in)`` to ``(..., out)``, ``r (in + r + out)`` a token.

        Raises:
            FedcoreError: the factors of an active adapter are not there yet.
        """
        self._check_present(self.active_adapters)
        update: Tensor = self.tri_B(self.tri_R(self.tri_A(x)))
        return update

    def __repr__(self) -> str:
        return "tri." + super().__repr__()

    def _freeze_bases(self) -> None:
        for adapter, trained in self.trains.items():
            for factor in "ARB":
                if factor not in trained:
                    self.factor(factor)[adapter].requires_grad_(False)

    def _check_present(self, adapters: Sequence[str]) -> None:
        for adapter in adapters:
            if adapter in self.pending:
                source = self.pending[adapter]
                raise FedcoreError(f"adapter {adapter!r} takes its factors from {source}")

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for adapter in list(self.pending):
            if all(f"{prefix}tri_{factor}.{adapter}" in state_dict for factor in "ARB"):
                del self.pending[adapter]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT's own version also casts to the base's dtype, and what is moved would train again.
        target = self._base_device() if device is None else device
        if not self.carries(adapter_name) or target.type == "meta":
            return
        for factor in "ARB":
            values = self.factor(factor)[adapter_name]
            if values.device.type != "meta" and values.device != target:
                moved = nn.Parameter(values.detach().to(target), requires_grad=values.requires_grad)
                self.factor(factor)[adapter_name] = moved
