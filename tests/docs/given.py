"""What pages take for granted, a reader's own folders and names, and what is done with what a page
only defines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fedcore.data import AdapterState, write_adapter


def _adapters(folder: Path) -> dict[str, Any]:
    """PEFT LoRA folders ``a``, ``b`` and ``c`` of one base model."""
    for seed, name in enumerate("abc"):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"base_model.model.layer.{layer}.query.lora_{factor}.weight": torch.randn(
                shape, generator=generator
            )
            for layer in range(2)
            for factor, shape in (("A", (4, 24)), ("B", (16, 4)))
        }
        config = {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["query"],
            "base_model_name_or_path": "our/base",
        }
        write_adapter(AdapterState.from_peft(tensors, config), folder / name)
    return {}


def _uploads(folder: Path) -> dict[str, Any]:
    """Arrays of a round, a stack of factors, and the definitions that the tests register."""
    from fedcore_kernels import gram
    from tests.reference.bodies import register_reference

    register_reference()
    generator = torch.Generator().manual_seed(0)
    return {
        "adapters": [torch.randn(3, 5, generator=generator).numpy() for _ in range(4)],
        "sample_counts": [10, 20, 30, 40],
        "stack": torch.randn(4, 2, 3, 5, generator=generator),
        "weights": [1.0, 2.0, 3.0, 4.0],
        "gram": gram,
    }


def _model(folder: Path) -> dict[str, Any]:
    """A classifier without an adapter, and labelled batches for it."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(num_hidden_layers=1, vocab_size=50, **sizes))
    tokens = torch.randint(0, 50, (3, 8, 6))
    batches = [{"input_ids": ids, "labels": ids[:, 0] % 2} for ids in tokens]
    return {"base": base, "batches": batches}


GIVEN: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "README.md": _adapters,
    "docs/aggregate.md": _adapters,
    "docs/methods.md": _model,
    "kernels/README.md": _uploads,
}
"""Page to what makes its folders in the working directory and returns its names."""


def _flower_rounds(names: Mapping[str, Any]) -> None:
    """The page's apps, with nodes in this process."""
    from tests.transports.flower.grid import FakeGrid

    names["main"](FakeGrid({1: names["client"], 2: names["client"]}), None)
    assert Path("states/round-0002").is_dir()
    grid = FakeGrid(dict.fromkeys((1, 2, 3), names["secure_client"]))
    names["secure_main"](grid, grid.contexts[1])
    assert Path("sums/round-0002").is_dir()


TRIED: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "docs/engines/flower.md": _flower_rounds,
}
"""Page to what runs the functions that it defines, given its names."""
