"""The adapter of a model in memory, as it would be saved."""

from __future__ import annotations

import torch
from torch import nn

from fedcore.data.adapter_kind import kind
from fedcore.data.adapter_state import AdapterState
from fedcore.data.validation import check_rounds
from fedcore.errors import FedcoreError, missing_extra

ADAPTER_NAME = "default"


def live_adapter(model: nn.Module, name: str = "the model's adapter") -> AdapterState:
    """A copy, on the CPU, of what PEFT would save of ``model``.

    Args:
        name: what to call the adapter in errors.

    Raises:
        FedcoreError: the model has no adapter, or another one than ``"default"``.
        MissingExtraError: PEFT is not installed.
    """
    try:
        from peft import get_peft_model_state_dict
    except ImportError as error:
        raise missing_extra("peft", "peft") from error
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or list(configs) != [ADAPTER_NAME]:
        adapters = list(configs) if isinstance(configs, dict) else "none"
        raise FedcoreError(
            f"{name}: the model has adapters {adapters}; wrap it by peft with one adapter "
            f"called {ADAPTER_NAME!r}"
        )
    tensors: dict[str, torch.Tensor] = {
        key: tensor.detach().cpu().clone()
        for key, tensor in get_peft_model_state_dict(model).items()
    }
    config = {**configs[ADAPTER_NAME].to_dict(), "inference_mode": True}
    if kind(config) == "ADALORA":
        raise FedcoreError(
            f"{name}: AdaLoRA keeps singular values beside its factors and drops some while it "
            "trains, which no row holds; train LORA, or merge such adapters (fedcore aggregate)"
        )
    adapter = AdapterState.from_peft(tensors, config, name=name)
    check_rounds(adapter, name)
    return adapter
