"""Where adapters come from: folders, PEFT state dicts, NumPy dicts, seen alike and read in parts.

A source knows the names, shapes and dtypes of its adapter from the start (its *outline*, an
:class:`~fedcore.data.adapter_state.AdapterState` whose tensors hold no values) and reads values
only when named tensors are read. Whether adapters can be averaged at all is seen in their
outlines: each by itself (:func:`adapter_problem`) and beside the first (:func:`mismatch`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedcore.data.adapter_state import AdapterState
from fedcore.data.peft_files import open_adapter
from fedcore.data.peft_keys import LORA_BIAS, ends_with
from fedcore.data.rows import absorb_scalings, tensor_in_row
from fedcore.data.stored_form import StoredForm, name_tensors
from fedcore.data.tensor_file import TensorFile
from fedcore.data.validation import check_row
from fedcore.errors import FedcoreError
from fedcore_kernels.layout import FactorLayout

Adapter = (
    str | Path | AdapterState | Mapping[str, Any] | tuple[Mapping[str, Any], Mapping[str, Any]]
)
"""One adapter as :func:`fedcore.aggregate` takes it: a PEFT folder, a state, a PEFT state dict
with its configuration under ``"config"``, or a pair of tensors or arrays and configuration."""

_PIECE = 1 << 22
"""Elements of a constant that are compared at a time."""


class _Store(Protocol):
    """Tensors by the keys they were written under."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]: ...

    def read_flat(self, name: str, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True)
class _InMemory:
    """Tensors that were passed themselves."""

    tensors: Mapping[str, Tensor]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in names}

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name].reshape(-1)[start:stop]


def _outline(
    name: str,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    config: Mapping[str, Any],
) -> tuple[AdapterState, dict[str, StoredForm]]:
    """An adapter without values, and how each of its tensors stands in the store."""
    empty = {
        key: torch.empty(shape, dtype=dtype, device="meta")
        for key, (shape, dtype) in shapes.items()
    }
    outline = AdapterState.from_peft(empty, config, name=name)
    return outline, {n: one.form for n, one in name_tensors(empty, config, name).items()}


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
    _forms: Mapping[str, StoredForm]

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Module to rank."""
        return self.outline.ranks

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The values of tensors by their full names, ``module.factor``.

        Raises:
            FedcoreError: the file cannot be read, or has changed since it was opened.
        """
        forms = {name: self._forms[name] for name in names}
        # Many experts share one tensor of the file.
        keys = dict.fromkeys(key for form in forms.values() for key in form.keys)
        stored = self._store.read(keys)
        return {name: form.read(stored) for name, form in forms.items()}

    def constant(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a tensor that never changes, in row-major order."""
        stop = min(stop, self.outline.constants[name].numel())
        return self._store.read_flat(self._forms[name].keys[0], start, stop)

    def constants(self) -> dict[str, Tensor]:
        """The values of the tensors that never change."""
        return self.read(self.outline.constants)

    def dense(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a dense tensor, in row-major order, scaling absorbed.

        Raises:
            FedcoreError: as :meth:`read`, or one of them is not finite.
        """
        values = self._store.read_flat(self._forms[name].keys[0], start, stop)
        if ends_with(name, LORA_BIAS):
            values = values * self.outline.scaling[name.removesuffix(f".{LORA_BIAS}")]
        bad = ~torch.isfinite(values)
        if bool(bad.any()):
            raise FedcoreError(
                f"{self.name}: {name} holds {int(bad.sum())} values that are not finite, such as "
                f"{values[bad][0].item()}"
            )
        return values

    def fill_row(self, layout: FactorLayout, row: Tensor) -> dict[str, Tensor]:
        """Write the factors that ``layout`` names into ``row (P,)``, scalings absorbed.

        What lies beyond the adapter's ranks, and between tensors, is left as it is.

        Returns:
            The factors by their full names, as they were read.

        Raises:
            FedcoreError: as :meth:`read`, or a value is not finite once the scaling is in it.
        """
        factors = self.read(slot.name for slot in layout)
        for slot in layout:
            part = tensor_in_row(row, layout, slot.name, self.ranks[slot.module])
            part.copy_(factors[slot.name])
        absorb_scalings(row, layout, self.outline.family, self.outline.scaling)
        problem = check_row(row, layout)
        if problem:
            raise FedcoreError(f"{self.name}: {problem}")
        return factors


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
                return Source(name, outline, file, like._forms)
        shapes = {key: (stored.shape, stored.dtype) for key, stored in file.tensors.items()}
        outline, forms = _outline(name, shapes, config)
        return Source(name, outline, file, forms)
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
    in_memory = {key: _tensor(name, key, value) for key, value in _mapping(name, tensors).items()}
    shapes = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in in_memory.items()}
    outline, forms = _outline(name, shapes, config)
    return Source(name, outline, _InMemory(in_memory), forms)


def check_same_constants(sources: Sequence[Source]) -> None:
    """Compare the tensors that never change, bit by bit and piece by piece.

    Raises:
        FedcoreError: naming the adapter and the first tensor that differs.
    """
    first, *others = sources
    expected = first.outline.constants
    for source in others:
        for name in sorted(expected.keys() | source.outline.constants.keys()):
            if not _same_constant(name, source, first):
                raise FedcoreError(
                    f"{source.name}: {name} differs from that of {first.name}; adapters are "
                    "relative to it and must not be mixed"
                )


def _same_constant(name: str, source: Source, first: Source) -> bool:
    one, other = (s.outline.constants.get(name) for s in (source, first))
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    pieces = [(start, start + _PIECE) for start in range(0, one.numel(), _PIECE)]
    return all(torch.equal(source.constant(name, *p), first.constant(name, *p)) for p in pieces)
