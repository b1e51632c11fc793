"""The tuner that puts additive layers into a base model of the shapes they were made for."""

from __future__ import annotations

from copy import copy
from typing import Any, ClassVar, cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedcore.errors import FedcoreError
from fedcore.tuners.shared.additive_layer import layer_shape
from fedcore.tuners.shared.config import AdditiveConfig


class ShapeCheckedTuner(BaseTuner):
    """PEFT's tuner for an :class:`AdditiveConfig`; made by ``get_peft_model`` and ``PeftModel``.

    Subclasses name their ``prefix`` and ``tuner_layer_cls``, and may record more than shapes.

    Raises:
        FedcoreError: a target that cannot carry the adapter, or a base model whose modules or
            shapes are not those the adapter was made for; before any layer is replaced.
    """

    target_module_mapping = cast(
        dict[str, list[str]], TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    )
    recorded: ClassVar[tuple[str, ...]] = ("module_shapes",)
    """Fields of the configuration, by module path, that are filled in when the layers are made."""

    def _check_module(self, config: Any, module: str, shape: tuple[int, int]) -> None:
        """Raise unless a layer of ``shape (out, in)`` is what ``module`` was recorded with."""
        recorded = config.module_shapes[module]
        if shape != tuple(recorded):
            raise FedcoreError(
                f"module {module} is {shape[0]} x {shape[1]} (out x in); the adapter was made "
                f"for {recorded[0]} x {recorded[1]}"
            )

    def _record(self, config: Any, module: str, layer: Any, adapter_name: str) -> None:
        """Note in ``config`` what the adapter on ``layer`` was made for."""
        config.module_shapes[module] = [layer.out_features, layer.in_features]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        # A copy: what is recorded is this model's, not the caller's, and one configuration object
        # may serve many clients.
        copied = copy(peft_config)
        for name in self.recorded:
            setattr(copied, name, dict(getattr(copied, name)))
        for name, known in self.peft_config.items():
            if known is peft_config:
                self.peft_config[name] = copied
        return super()._prepare_adapter_config(copied, model_config)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        for module in cast(AdditiveConfig, peft_config).module_shapes:
            try:
                target = model.get_submodule(module)
            except AttributeError as error:
                raise FedcoreError(
                    f"the adapter was made for module {module}, which the base model lacks"
                ) from error
            base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            self._check_module(peft_config, module, layer_shape(base, module))

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(parent, nn.MultiheadAttention):
            raise FedcoreError(
                f"module {current_key} belongs to nn.MultiheadAttention, which reads its weight "
                "and never calls it; an adapter there would do nothing"
            )
        layer: Any = target
        if isinstance(target, self.tuner_layer_cls):
            layer.update_layer(adapter_name, current_key, peft_config)
        else:
            make: Any = self.tuner_layer_cls
            layer = make(target, adapter_name, current_key, peft_config)
            self._replace_module(parent, target_name, layer, target)
        if isinstance(layer.get_base_layer(), Conv1D):
            cast(AdditiveConfig, peft_config).fan_in_fan_out = True
        self._record(peft_config, current_key, layer, adapter_name)
