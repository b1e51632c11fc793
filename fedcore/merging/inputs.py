"""Adapters, weights and dtypes as a caller may give them, under names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedcore.data.validation import check_weight
from fedcore.errors import FedcoreError, unknown_name
from fedcore.merging.sources import Adapter

Adapters = Sequence[Adapter] | Mapping[str, Adapter]
Weights = Sequence[float] | Mapping[str, float]

DTYPES: Mapping[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
"""What an adapter can be written in."""


def named_adapters(adapters: Adapters) -> dict[str, Adapter]:
    """Adapters by their client id; folders of a sequence go by their path.

    Raises:
        FedcoreError: there is none, or a folder is named twice.
    """
    if isinstance(adapters, str | Path) or not isinstance(adapters, Mapping | Sequence):
        raise FedcoreError(
            f"adapters is a {type(adapters).__name__}; pass a sequence of folders, or a mapping of "
            "client ids to folders"
        )
    found: dict[str, Adapter] = {}
    if isinstance(adapters, Mapping):
        found = {str(name): adapter for name, adapter in adapters.items()}
    else:
        for place, adapter in enumerate(adapters, start=1):
            folder = isinstance(adapter, str | Path)
            name = str(Path(adapter)) if folder else f"adapter {place}"  # type: ignore[arg-type]
            if name in found:
                raise FedcoreError(f"{name} is given twice; weight it instead")
            found[name] = adapter
    if not found:
        raise FedcoreError("no adapters were given")
    return found


def weights_by_name(weights: Weights | None, names: Sequence[str]) -> dict[str, float]:
    """The weight of each of ``names``; equal ones unless given.

    Raises:
        FedcoreError: another number of weights than adapters, an unknown or missing name, a weight
            that is negative or not finite, or nothing but zeros.
    """
    if weights is None:
        return dict.fromkeys(names, 1.0)
    if isinstance(weights, Mapping):
        given = {_as_named(str(key), names): value for key, value in weights.items()}
        for name in names:
            if name not in given:
                raise FedcoreError(f"weights has no entry for {name}")
    elif isinstance(weights, Sequence) and not isinstance(weights, str):
        if len(weights) != len(names):
            raise FedcoreError(f"weights has {len(weights)} entries for {len(names)} adapters")
        given = dict(zip(names, weights, strict=True))
    else:
        raise FedcoreError(f"weights is a {type(weights).__name__}; pass a list or a mapping")
    for name, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        try:
            problem = check_weight(value) if number else f"its weight is {value!r:.60}, no number"
        except OverflowError:
            problem = "its weight is too large; weights are finite"
        if problem:
            raise FedcoreError(f"{name}: {problem}")
    if not any(given.values()):
        raise FedcoreError("the weights of all adapters are zero")
    return {name: float(given[name]) for name in names}


def parse_dtype(dtype: Any) -> torch.dtype | None:
    """A torch dtype from its name or itself; None stays None.

    Raises:
        FedcoreError: no dtype in which adapters are written.
    """
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise unknown_name("dtype", str(dtype), DTYPES)
    return DTYPES[dtype]


def _as_named(key: str, names: Sequence[str]) -> str:
    """``key`` or the folder that it spells otherwise."""
    for name in (key, str(Path(key))):
        if name in names:
            return name
    raise unknown_name("adapter in weights", key, names)
