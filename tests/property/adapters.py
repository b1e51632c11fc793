"""Random adapters as clients would send them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedcore.data.adapter_state import AdapterState

MODULES = (("encoder.layer.0.query", 12, 10), ("encoder.layer.0.value", 12, 7))


def lora_tensors(
    seed: int,
    rank: int = 3,
    modules: Sequence[tuple[str, int, int]] = MODULES,
    head: int = 5,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """A PEFT state dict: ``(module, d_in, d_out)`` each with random A and B, and a head."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    found = {}
    for name, d_in, d_out in modules:
        found[f"base_model.model.{name}.lora_A.weight"] = draw(rank, d_in)
        found[f"base_model.model.{name}.lora_B.weight"] = draw(d_out, rank)
    if head:
        found["base_model.model.classifier.weight"] = draw(head, 4)
        found["base_model.model.classifier.bias"] = draw(head)
    return found


def lora_state(seed: int, rank: int = 3, alpha: float = 3.0, **options: object) -> AdapterState:
    """One client's LoRA adapter."""
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
    return AdapterState.from_peft(lora_tensors(seed, rank, **options), config)  # type: ignore[arg-type]


def gram_state(
    seed: int, rank: int = 3, width: int = 12, alpha: float | None = None
) -> AdapterState:
    """One client's Gram adapter on two modules of equal width, with a head."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"base_model.model.{name}.gram_A": torch.randn(rank, width, generator=generator)
        for name in ("layer.0.query", "layer.0.value")
    }
    tensors["base_model.model.classifier.weight"] = torch.randn(5, 4, generator=generator)
    config = {"peft_type": "GRAM", "r": rank, "lora_alpha": alpha or float(rank)}
    return AdapterState.from_peft(tensors, config)


def tri_state(
    seed: int,
    rank: int = 3,
    alpha: float | None = None,
    modules: Sequence[tuple[str, int, int]] = MODULES,
    dtype: torch.dtype = torch.float32,
) -> AdapterState:
    """One client's tri-factor adapter: ``(module, d_in, d_out)`` each, with a head."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = {}
    for name, d_in, d_out in modules:
        for factor, shape in {"A": (rank, d_in), "R": (rank, rank), "B": (d_out, rank)}.items():
            tensors[f"base_model.model.{name}.tri_{factor}"] = draw(*shape)
    tensors["base_model.model.classifier.weight"] = draw(5, 4)
    config = {"peft_type": "TRI", "r": rank, "lora_alpha": alpha or float(rank)}
    return AdapterState.from_peft(tensors, config)
