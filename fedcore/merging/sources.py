"""Where adapters come from: folders, PEFT state dicts, NumPy dicts, seen alike and read in parts.

A source knows the names, shapes and dtypes of its adapter from the start (its *outline*, an
:class:`~fedcore.data.adapter_state.AdapterState` whose tensors hold no values) and reads values
only when it is asked for named tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedcore.data.adapter_state import AdapterState
from fedcore.data.peft_files import open_adapter
from fedcore.data.tensor_file import TensorFile
from fedcore.errors import FedcoreError

Adapter = (
    str | Path | AdapterState | Mapping[str, Any] | tuple[Mapping[str, Any], Mapping[str, Any]]
)
"""One adapter as :func:`fedcore.aggregate` takes it: a PEFT folder, a state, a PEFT state dict
with its configuration under ``"config"``, or a pair of tensors or arrays and configuration."""


class _Store(Protocol):
    """Tensors by the keys they were written under."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]: ...

    def read_flat(self, name: str, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True)
class Source:
    """One adapter that is read in parts.

    Attributes:
        name: what to call it in errors and reports; distinct among the adapters of a call.
        outline: names, shapes, dtypes, scalings and configuration; its tensors hold no values.
    """

    name: str
    outline: AdapterState
    _store: _Store

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Module to rank."""
        return {module: self.outline.rank(module) for module in self.outline.factors}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The values of tensors by their full names, ``module.factor``.

        Raises:
            FedcoreError: the file cannot be read, or has changed since it was opened.
        """
        keys = {self.outline.keys[name]: name for name in names}
        return {keys[key]: tensor for key, tensor in self._store.read(keys).items()}

    def constants(self) -> dict[str, Tensor]:
        """The values of the tensors that never change."""
        return self.read(self.outline.constants)

    def dense(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a dense tensor, in row-major order."""
        return self._store.read_flat(self.outline.keys[name], start, stop)


def open_source(name: str, adapter: Adapter, budget: int, like: Source | None = None) -> Source:
    """Look at one adapter without reading its values.

    Args:
        like: an adapter that was opened before; one of the same tensors and configuration shares
            its outline.

    Raises:
        FedcoreError: naming the adapter: it is none of the accepted forms, its files are missing,
            malformed or larger than ``budget`` bytes, or its tensors do not fit its configuration.
    """
    if isinstance(adapter, str | Path):
        file, config = open_adapter(adapter, name=name, budget=budget)
        if like is not None and isinstance(like._store, TensorFile):
            known, outline = like._store.tensors, like.outline
            if known == file.tensors and outline.config == config:
                return Source(name, outline, file)
        shapes = {key: (stored.shape, stored.dtype) for key, stored in file.tensors.items()}
        return Source(name, _outline(name, shapes, config), file)
    if isinstance(adapter, AdapterState):
        tensors: Mapping[str, Any] = adapter.to_peft()
        config = dict(adapter.config)
    elif isinstance(adapter, tuple) and len(adapter) == 2:
        tensors, config = adapter[0], _mapping(name, adapter[1])
    elif isinstance(adapter, Mapping) and "config" in adapter:
        tensors = {key: value for key, value in adapter.items() if key != "config"}
        config = _mapping(name, adapter["config"])
    else:
        raise FedcoreError(
            f"{name}: an adapter is a {type(adapter).__name__}; pass a folder, an AdapterState, a "
            "PEFT state dict with its configuration under 'config', or a pair of both"
        )
    held = {key: _tensor(name, key, value) for key, value in _mapping(name, tensors).items()}
    shapes = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in held.items()}
    return Source(name, _outline(name, shapes, config), _Held(held))


@dataclass(frozen=True)
class _Held:
    """Tensors in memory."""

    tensors: Mapping[str, Tensor]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in names}

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name].reshape(-1)[start:stop]


def _outline(
    name: str,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    config: Mapping[str, Any],
) -> AdapterState:
    empty = {
        key: torch.empty(shape, dtype=dtype, device="meta")
        for key, (shape, dtype) in shapes.items()
    }
    return AdapterState.from_peft(empty, config, name=name)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise FedcoreError(
            f"{name}: tensors and configuration are mappings with names as keys, not "
            f"{type(value).__name__}"
        )
    return dict(value)


def _tensor(name: str, key: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.dtype.itemsize > 8:
        what = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
        raise FedcoreError(f"{name}: {key} is {what}; pass a tensor or an array of floats")
    native = value.astype(value.dtype.newbyteorder("="), copy=False)
    # Arrays that are read-only or not contiguous cannot be shared with torch.
    shared = native.flags.writeable and native.flags.c_contiguous
    return torch.from_numpy(native if shared else native.copy(order="C"))
