"""``fedcore.aggregate`` on adapter folders, against reading their files.

The adapters have the shapes of SmolLM-135M's (``q_proj`` 576 x 576, ``v_proj`` 192 x 576). Times of
ours include the header checks, the search for values that are not finite, and the written result;
the files stay in the page cache for both sides.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from bench.case import Case, Other, Ours
from bench.ops.products import product_flops
from fedcore import aggregate

ADAPTERS, LAYERS, RANK = 20, 30, 16
"""How many adapters, of how many layers and which rank."""

TARGETS = {"q_proj": (576, 576), "v_proj": (576, 192)}
"""Adapted layers by name: ``d_in`` and ``d_out``."""

READING = "safetensors, every value read once"


def folders_case(adapters: int, layers: int) -> Case:
    """The mean of the factors and the best rank-16 product of random adapters, in fp32."""
    home = TemporaryDirectory(prefix="fedcore-bench-")
    folders = [Path(home.name) / f"client-{n:03}" for n in range(adapters)]
    for n, folder in enumerate(folders):
        _write(folder, layers, torch.Generator().manual_seed(n))
    files = [folder / "adapter_model.safetensors" for folder in folders]
    size = sum(file.stat().st_size for file in files)
    # Two modules of mean width a layer.
    width = sum(sum(sizes) for sizes in TARGETS.values()) // (2 * len(TARGETS))
    flops = {
        "fedit": 3 * size / 4,
        "product_svd": product_flops(adapters, layers * len(TARGETS), RANK, width),
    }
    ours = {
        f"aggregate {method}": Ours(
            partial(_aggregated, home, folders, method),
            bytes=size + size // adapters,
            flops=flops[method],
            against=(READING,),
            backend="torch",
        )
        for method in ("fedit", "product_svd")
    }
    sizes = f"adapters of SmolLM-135M, N={adapters} L={layers * len(TARGETS)} r={RANK}"
    return Case(sizes, torch.float32, ours, {READING: Other(partial(_read, files))})


def _aggregated(home: TemporaryDirectory[str], folders: list[Path], method: str) -> object:
    out = Path(home.name) / "out"
    return aggregate(folders, method=method, out=out, overwrite=True, compare=False)


def _read(files: list[Path]) -> list[torch.Tensor]:
    return [tensor.sum() for file in files for tensor in load_file(str(file)).values()]


def _write(folder: Path, layers: int, random: torch.Generator) -> None:
    folder.mkdir()
    tensors = {}
    for layer in range(layers):
        for name, (d_in, d_out) in TARGETS.items():
            path = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, d_in, generator=random)
            tensors[f"{path}.lora_B.weight"] = torch.randn(d_out, RANK, generator=random)
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": [*TARGETS]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
