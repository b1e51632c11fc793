"""PEFT adapter folders on disk, as clients would leave them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

BASE = "base_model.model."
MODULES = (("block.0.q", 12, 10), ("block.0.v", 12, 7), ("block.1.q", 12, 10))
"""Module, d_in, d_out; one of them is as narrow as a rank."""


def lora_folder(
    folder: Path,
    seed: int,
    rank: int = 3,
    *,
    modules: Sequence[tuple[str, int, int]] = MODULES,
    ranks: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    dora: bool = False,
    head: bool = False,
    common_a: bool = False,
    **config: object,
) -> Path:
    """Random factors of ``rank`` (or the module's in ``ranks``), under PEFT's own keys."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.Generator().manual_seed(0)

    def draw(*shape: int, source: torch.Generator = generator) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype)

    tensors = {}
    for name, d_in, d_out in modules:
        r = (ranks or {}).get(name, rank)
        tensors[f"{BASE}{name}.lora_A.weight"] = draw(
            r, d_in, source=common if common_a else generator
        )
        tensors[f"{BASE}{name}.lora_B.weight"] = draw(d_out, r)
        if dora:
            tensors[f"{BASE}{name}.lora_magnitude_vector"] = draw(d_out).abs() + 1
    if head:
        tensors[f"{BASE}classifier.weight"] = draw(5, 4)
    fields = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q", "v"],
        "use_dora": dora,
    }
    if ranks:
        fields["rank_pattern"] = {name.replace(".", r"\."): r for name, r in ranks.items()}
    return write_folder(folder, tensors, {**fields, **config})


def write_folder(folder: Path, tensors: Mapping[str, Tensor], config: Mapping) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
