"""PEFT's ``add_weighted_adapter(combination_type="svd")``, called on a model with one layer.

PEFT forms the dense update of every adapter, sums them, and takes the SVD of the sum with full
matrices. Frameworks that merge LoRA adapters with it pay that for every adapted layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

_MERGED = "merged"


def peft_model(left: Tensor, right: Tensor) -> Any:
    """A PEFT model with one linear layer and the adapters ``left`` (N, r, p), ``right`` (N, r, q).

    ``left`` holds the transposes of the B factors; alpha equals the rank, so the scaling is 1.
    """
    rank, width = right.shape[1:]
    base = nn.Sequential(nn.Linear(width, left.shape[-1], bias=False, device=left.device))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    model: Any = get_peft_model(base, config, adapter_name="client-0")
    for client in range(1, len(left)):
        model.add_adapter(f"client-{client}", config)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for client, (b, a) in enumerate(zip(left, right, strict=True)):
            layer.lora_A[f"client-{client}"].weight.copy_(a)
            layer.lora_B[f"client-{client}"].weight.copy_(b.T)
    return model


def peft_weighted_adapter(model: Any, weights: Sequence[float], rank: int) -> tuple[Tensor, Tensor]:
    """Merge all adapters of ``model``: factors (r, p) and (r, q) of the mean's best rank r.

    The merged adapter is deleted again, so that the call may be repeated.
    """
    total = sum(weights)
    names = [f"client-{client}" for client in range(len(weights))]
    model.add_weighted_adapter(
        names, [weight / total for weight in weights], _MERGED, "svd", svd_rank=rank
    )
    layer = model.base_model.model[0]
    merged = (
        layer.lora_B[_MERGED].weight.detach().T.clone(),
        layer.lora_A[_MERGED].weight.detach().clone(),
    )
    model.delete_adapter(_MERGED)
    return merged
