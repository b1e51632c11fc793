"""Tri-factor adapters on the tiny models."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from fedcore.tuners import TriConfig, TriFactors, TriLayer
from tests.tuners.tiny import BUILD, TARGETS, TASK

STARTS = ("lora", "xs", "random", "ce")


def tri_config(name: str, **fields: object) -> TriConfig:
    known = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS[name], "task_type": TASK[name]}
    return TriConfig(**{**known, **fields})


def tri_adapted(name: str, **fields: object) -> PeftModel:
    return get_peft_model(BUILD[name](), tri_config(name, **fields)).eval()


def tri_layers(model: nn.Module) -> list[TriLayer]:
    return [module for module in model.modules() if isinstance(module, TriLayer)]


@torch.no_grad()
def move_factors(model: nn.Module, adapter: str = "default", size: float = 0.3) -> None:
    """Move every factor away from its start, far enough to change the logits by about one."""
    generator = torch.Generator().manual_seed(9)
    for layer in tri_layers(model):
        for factor in "ARB":
            held = layer.factor(factor)[adapter]
            held += size * torch.randn(held.shape, generator=generator)


def tri_linear(
    out_features: int = 7,
    in_features: int = 5,
    dtype: torch.dtype = torch.float64,
    **fields: object,
) -> TriLayer:
    """One adapted ``nn.Linear``, its factors away from the start."""
    torch.manual_seed(1)
    base = nn.Linear(in_features, out_features).to(dtype).requires_grad_(False)
    known = {"r": 3, "lora_alpha": 12}
    layer = TriLayer(base, "default", "block.linear", TriConfig(**{**known, **fields}))
    layer.to(dtype)
    move_factors(layer)
    return layer


def held_factors(layer: TriLayer, adapter: str = "default") -> TriFactors:
    """Copies of the layer's factors in fp64."""
    return TriFactors(*(layer.factor(name)[adapter].detach().double().clone() for name in "ARB"))


def dense_product(layer: TriLayer, adapter: str = "default") -> Tensor:
    """``s B R A`` by its definition, in fp64."""
    A, R, B = held_factors(layer, adapter)
    rank = A.shape[0]
    update = torch.zeros(B.shape[0], A.shape[1], dtype=torch.float64)
    for i in range(rank):
        for j in range(rank):
            update += R[i, j] * torch.outer(B[:, i], A[j])
    return layer.scaling[adapter] * update
