"""What aggregating adapter folders means: bytes to dense means of products, in fp64.

Reads files and configurations with nothing of the package, tensor by tensor.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of ``adapter_model.safetensors`` by their keys, in their own dtypes."""
    data = (folder / "adapter_model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    found = {}
    for key, entry in json.loads(data[8 : 8 + length]).items():
        if key != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            flat = torch.frombuffer(bytearray(data[begin:end]), dtype=DTYPES[entry["dtype"]])
            found[key] = flat.view(entry["shape"])
    return found


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def scaling(config: Mapping, module: str) -> float:
    """``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA; patterns as PEFT matches them."""

    def own(patterns: str, default: str) -> float:
        for pattern, value in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return config[default]

    rank, alpha = own("rank_pattern", "r"), own("alpha_pattern", "lora_alpha")
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank


def products(tensors: Mapping[str, Tensor], config: Mapping) -> dict[str, Tensor]:
    """Module to its update ``s B A (d_out, d_in)``."""
    found = {}
    # Live models write an adapter's name into their keys, and wrappers may lack PEFT's prefix.
    plain = {
        key.removeprefix("base_model.model.").replace(".default.", "."): tensor
        for key, tensor in tensors.items()
    }
    for key, a in plain.items():
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            b = plain[key.replace("lora_A", "lora_B")]
            found[module] = scaling(config, module) * b.double() @ a.double()
    return found


def folder_products(folder: Path) -> dict[str, Tensor]:
    return products(stored_tensors(folder), config_of(folder))


def mean_products(folders: Sequence[Path], weights: Sequence[float]) -> dict[str, Tensor]:
    """Module to ``sum_n w_n s_n B_n A_n`` with weights that sum to one."""
    shares = [weight / sum(weights) for weight in weights]
    every = [folder_products(folder) for folder in folders]
    return {
        module: sum(
            (w * own[module] for w, own in zip(shares, every, strict=True)), torch.zeros(())
        )
        for module in every[0]
    }


def tail(matrix: Tensor, rank: int) -> float:
    """The least Frobenius error of any approximation of rank ``rank``."""
    return float(torch.linalg.svdvals(matrix)[rank:].norm())
