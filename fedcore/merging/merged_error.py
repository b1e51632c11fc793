"""What an average of DoRA adapters loses, measured on the merged weights themselves.

DoRA's weight is ``m (W0 + s B A) / ||W0 + s B A||``, row by row, so the error of the products is
not that of the weights. With the base model's weights at hand the merged weights are compared
instead, a block of rows at a time: no matrix of a weight's size is formed.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import nan, sqrt
from pathlib import Path

import torch
from torch import Tensor

from fedcore.data.adapter_state import AdapterState
from fedcore.data.peft_keys import MAGNITUDE
from fedcore.data.tensor_file import TensorFile
from fedcore.errors import FedcoreError
from fedcore.merging.plan import Job

_BLOCK = 1 << 20
"""Numbers of a block of rows."""


def base_files(base: str | Path | None) -> list[Path]:
    """The weights of a base model that is a folder here; none for a name of a hub."""
    return sorted(Path(base).glob("*.safetensors")) if base and Path(base).is_dir() else []


def merged_error(job: Job, result: AdapterState, files: list[Path]) -> float:
    """``||mean of merged weights - merged result|| / ||mean of merged weights - base||``.

    Args:
        result: the aggregated DoRA adapter.
        files: of the base model's weights; names as in the adapters.

    Raises:
        FedcoreError: the base lacks a weight, or has another shape; an adapted layer is not linear.
    """
    weights = _base_weights(files)
    lost = moved = 0.0
    for module in job.first.outline.factors:
        if job.first.outline.config.get("fan_in_fan_out") or len(_magnitude(job, module)) != 1:
            raise FedcoreError(
                f"base: {module} is not a linear layer with rows per output, of which alone the "
                "error of merged DoRA weights is measured; leave base out"
            )
        parts = [_scaled(job, n, module) for n in range(len(job.sources))]
        named = result.factors[module]
        written = (
            named["B"].double() * result.scaling[module],
            named["A"].double(),
            result.dense[f"{module}.{MAGNITUDE}"].double(),
        )
        shares = (job.weights / job.weights.sum()).tolist()
        for rows, block in _blocks(weights, module, written[0].shape[0], written[1].shape[1]):
            mean = sum(
                (p * _merged(block, rows, *part) for p, part in zip(shares, parts, strict=True)),
                torch.zeros_like(block),
            )
            lost += float((mean - _merged(block, rows, *written)).square().sum())
            moved += float((mean - block).square().sum())
    return sqrt(lost / moved) if moved > 0 else nan


def _magnitude(job: Job, module: str) -> torch.Size:
    return job.first.outline.dense[f"{module}.{MAGNITUDE}"].shape


def _scaled(job: Job, n: int, module: str) -> tuple[Tensor, Tensor, Tensor]:
    source = job.sources[n]
    names = [f"{module}.B", f"{module}.A", f"{module}.{MAGNITUDE}"]
    outer, inner, magnitude = (source.read([name])[name].double() for name in names)
    return outer * source.outline.scaling[module], inner, magnitude


def _merged(base: Tensor, rows: slice, outer: Tensor, inner: Tensor, magnitude: Tensor) -> Tensor:
    updated = base + outer[rows] @ inner
    return updated * (magnitude[rows] / updated.norm(dim=1))[:, None]


def _base_weights(files: list[Path]) -> dict[str, TensorFile]:
    return {
        name: file
        for path in files
        for file in (TensorFile.open(path, "base", path.stat().st_size),)
        for name in file.tensors
    }


def _blocks(
    weights: dict[str, TensorFile], module: str, d_out: int, d_in: int
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a base weight in fp64, and which they are."""
    name = f"{module}.weight"
    if name not in weights:
        raise FedcoreError(f"base lacks {name}; pass the model that the adapters were trained on")
    shape = weights[name].tensors[name].shape
    if shape != (d_out, d_in):
        raise FedcoreError(f"base: {name} has shape {shape}, the adapters' has {(d_out, d_in)}")
    step = max(1, _BLOCK // d_in)
    for start in range(0, d_out, step):
        stop = min(start + step, d_out)
        flat = weights[name].read_flat(name, start * d_in, stop * d_in)
        yield slice(start, stop), flat.view(-1, d_in).double()
