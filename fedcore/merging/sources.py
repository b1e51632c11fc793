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
from fedcore.data.peft_keys import MAGNITUDE
from fedcore.data.rows import absorb_scalings, tensor_in_row
from fedcore.data.tensor_file import TensorFile
from fedcore.data.validation import check_row, check_state
from fedcore.errors import FedcoreError
from fedcore_kernels.layout import FactorLayout

Adapter = (
    str | Path | AdapterState | Mapping[str, Any] | tuple[Mapping[str, Any], Mapping[str, Any]]
)
"""One adapter as :func:`fedcore.aggregate` takes it: a PEFT folder, a state, a PEFT state dict
with its configuration under ``"config"``, or a pair of tensors or arrays and configuration."""

_SAME_FIELDS: Mapping[str, Any] = {
    "peft_type": None,
    "task_type": None,
    "fan_in_fan_out": False,
    "use_dora": False,
    "bias": "none",
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "use_qalora": False,
    "frame": None,
    "frame_seed": None,
    "frame_ids": None,
    "module_shapes": None,
    "offset": None,
}
"""Fields that change what the tensors mean, with the value that a missing one stands for."""

_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base weights as they are."""


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


def _target_problem(state: AdapterState) -> str | None:
    targets = state.config.get("target_modules")
    if not isinstance(targets, list | tuple | set | frozenset):
        return None
    for module in state.factors:
        # PEFT takes a name as the whole path or as its end.
        if not any(module == name or module.endswith(f".{name}") for name in targets):
            return f"module {module} is adapted and not among target_modules, so PEFT drops it"
    return None


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
        return self.outline.ranks

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
        """Elements ``start`` to ``stop`` of a dense tensor, in row-major order.

        Raises:
            FedcoreError: as :meth:`read`, or one of them is not finite.
        """
        values = self._store.read_flat(self.outline.keys[name], start, stop)
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
    in_memory = {key: _tensor(name, key, value) for key, value in _mapping(name, tensors).items()}
    shapes = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in in_memory.items()}
    return Source(name, _outline(name, shapes, config), _InMemory(in_memory))


def magnitudes(state: AdapterState) -> list[str]:
    """The dense tensors that are DoRA's magnitude vectors."""
    return [name for name in state.dense if MAGNITUDE in name.split(".")]


def adapter_problem(state: AdapterState) -> str | None:
    """What makes one adapter unfit for averaging, whatever the others are."""
    config = state.config
    if not state.factors:
        return "it holds no low-rank factor"
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        return (
            f"init_lora_weights is {start!r:.60}, which changes the base weights; convert the "
            "adapter first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for field in ("lora_bias", "target_parameters"):
        if config.get(field):
            return f"{field} is {config[field]!r:.60}, which is not supported"
    if bool(config.get("use_dora")) != bool(magnitudes(state)):
        return (
            f"use_dora is {config.get('use_dora')!r:.60} and {len(magnitudes(state))} tensors "
            "are magnitude vectors"
        )
    for module, named in state.factors.items():
        kinds = {"lora_embedding_" in state.keys[f"{module}.{factor}"] for factor in named}
        if len(kinds) > 1:
            return f"module {module} has one factor of an embedding and one of a linear layer"
    return _target_problem(state)


def mismatch(state: AdapterState, first: Source, layout: FactorLayout) -> str | None:
    """The first way in which an adapter does not fit ``first``, if any.

    Args:
        layout: the tensors of ``first`` at the largest rank of any adapter.
    """
    config, expected = state.config, first.outline.config
    if state.family != first.outline.family:
        return f"it is of family {state.family!r}, {first.name} of {first.outline.family!r}"
    mine, theirs = len(magnitudes(state)), len(magnitudes(first.outline))
    if bool(mine) != bool(theirs):
        return f"it holds {mine} DoRA magnitude vectors, {first.name} holds {theirs}"
    base, named = config.get("base_model_name_or_path"), expected.get("base_model_name_or_path")
    if base and named and base != named:
        return f"base_model_name_or_path is {base!r:.80}, that of {first.name} is {named!r:.80}"
    for field, default in _SAME_FIELDS.items():
        one, other = config.get(field) or default, expected.get(field) or default
        if one != other:
            return f"{field} is {one!r:.60}, that of {first.name} is {other!r:.60}"
    problem = check_state(state, layout, mixed_ranks=True)
    if problem:
        return problem
    offset = state.family == "gram" and config.get("offset", True)
    if offset and state.scaling != first.outline.scaling:
        return f"its scaling differs from that of {first.name}; the offset is common to all"
    return None


def check_same_constants(sources: Sequence[Source]) -> None:
    """Compare the tensors that never change, bit by bit.

    Raises:
        FedcoreError: naming the adapter and the first tensor that differs.
    """
    first, *others = sources
    if not first.outline.constants and not any(s.outline.constants for s in others):
        return
    expected = first.constants()
    for source in others:
        constants = source.constants()
        for name in sorted(expected.keys() | constants.keys()):
            both = name in expected and name in constants
            if not both or not torch.equal(expected[name], constants[name]):
                raise FedcoreError(
                    f"{source.name}: {name} differs from that of {first.name}; factors are "
                    "relative to it and must not be mixed"
                )
