"""The tuner that puts tri-factor layers into a base model."""

from __future__ import annotations

from copy import copy
from typing import cast

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedcore.errors import FedcoreError
from fedcore.tuners.shared.additive_layer import layer_shape
from fedcore.tuners.tri.config import TriConfig
from fedcore.tuners.tri.layer import TriLayer


class TriModel(BaseTuner):
    """PEFT's tuner for :class:`TriConfig`; made by ``get_peft_model`` and ``PeftModel``.

    Raises:
        FedcoreError: a target that cannot carry the adapter, or a base model whose modules or
            shapes are not those the adapter was made for; before any layer is replaced.
    """

    prefix = "tri_"
    tuner_layer_cls = TriLayer
    target_module_mapping = cast(
        dict[str, list[str]], TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    )

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        # A copy: the record of shapes is this model's, not the caller's, and one configuration
        # object may serve many clients.
        own = copy(cast(TriConfig, peft_config))
        own.module_shapes = dict(own.module_shapes)
        for name, held in self.peft_config.items():
            if held is peft_config:
                self.peft_config[name] = own
        return super()._prepare_adapter_config(own, model_config)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        for module, recorded in cast(TriConfig, peft_config).module_shapes.items():
            try:
                target = model.get_submodule(module)
            except AttributeError as error:
                raise FedcoreError(
                    f"the adapter was made for module {module}, which the base model lacks"
                ) from error
            base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
            shape = layer_shape(base, module)
            if shape != tuple(recorded):
                raise FedcoreError(
                    f"module {module} is {shape[0]} x {shape[1]} (out x in); the adapter was made "
                    f"for {recorded[0]} x {recorded[1]}"
                )

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
        config = cast(TriConfig, peft_config)
        if isinstance(parent, nn.MultiheadAttention):
            raise FedcoreError(
                f"module {current_key} belongs to nn.MultiheadAttention, which reads its weight "
                "and never calls it; an adapter there would do nothing"
            )
        if isinstance(target, TriLayer):
            layer = target
            layer.update_layer(adapter_name, current_key, config)
        else:
            layer = TriLayer(target, adapter_name, current_key, config)
            self._replace_module(parent, target_name, layer, target)
        if isinstance(layer.get_base_layer(), Conv1D):
            config.fan_in_fan_out = True
        config.module_shapes[current_key] = [layer.out_features, layer.in_features]
