"""Rows as adapters travel: tensors by PEFT's keys, in PEFT's orientation, at a client's ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedcore.data.peft_keys import CORE, TRANSPOSED_FACTORS, parse_key
from fedcore.errors import FedcoreError
from fedcore_kernels.layout import FactorLayout, FactorSlot

Ranks = Mapping[str, int]
"""Module path to rank."""


def slot_name(key: str) -> str:
    """The slot that ``key`` names, by any spelling of PEFT's, or as the slot's own name."""
    meaning = parse_key(key)
    return f"{meaning.module}.{meaning.factor}" if meaning.factor else meaning.module


def at_ranks(layout: FactorLayout, ranks: Ranks | None) -> FactorLayout:
    """The layout of what a client of these ranks holds; ``layout`` itself without any."""
    if ranks is None:
        return layout
    factors = []
    for slot in layout.factor_slots:
        rank = min(slot.rows, ranks[slot.module])
        # A core is as wide as it is high.
        factors.append(
            (slot.module, slot.factor, rank, rank if slot.factor == CORE else slot.width)
        )
    dense = [(slot.module, slot.shape) for slot in layout.dense_slots if slot.shape is not None]
    return FactorLayout.build(factors, dense)


def tensors_from_row(
    row: Tensor, layout: FactorLayout, ranks: Ranks | None = None
) -> dict[str, Tensor]:
    """Slot name to tensor of ``row (P,)``, without what lies beyond the client's rank."""
    return {
        slot.name: _turned(slot, _leading(slot, layout.view(row, layout.by_name[slot.name])))
        .contiguous()
        .clone()
        for slot in at_ranks(layout, ranks)
    }


def row_from_tensors(
    tensors: Mapping[str, Tensor],
    layout: FactorLayout,
    ranks: Ranks | None = None,
    held: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The row ``(P,)`` of ``layout``; what lies beyond the client's rank is zero.

    It is fp64 where any tensor is, otherwise fp32. Values are not looked at.

    Args:
        tensors: by any spelling of PEFT's keys, in PEFT's orientation.
        held: slot name to what else may come along, if it is equal: factors that nobody trained.

    Raises:
        FedcoreError: a tensor is missing, named twice, not asked for, of another shape, no floating
            point, or frozen and changed.
    """
    own = at_ranks(layout, ranks)
    row = torch.zeros(layout.size, dtype=_widest(tensors.values()))
    seen: set[str] = set()
    for key, tensor in tensors.items():
        name = slot_name(key)
        if name in seen:
            raise FedcoreError(f"{key} names {name}, which another key names too")
        seen.add(name)
        if not tensor.is_floating_point():
            raise FedcoreError(f"{key} has dtype {tensor.dtype}; a float dtype is needed")
        slot = own.by_name.get(name)
        if slot is None:
            _check_held(key, tensor, (held or {}).get(name))
            continue
        view = _turned(slot, _leading(slot, layout.view(row, layout.by_name[name])))
        if tensor.shape != view.shape:
            raise FedcoreError(
                f"{key} has shape {tuple(tensor.shape)}, {tuple(view.shape)} was asked for"
            )
        view.copy_(tensor)
    missing = [slot.name for slot in own if slot.name not in seen]
    if missing:
        raise FedcoreError(f"{missing[0]} is missing")
    return row


def _check_held(key: str, tensor: Tensor, expected: Tensor | None) -> None:
    if expected is None:
        raise FedcoreError(f"{key} was not asked for")
    if tensor.shape != expected.shape or not torch.equal(tensor, expected.to(tensor.dtype)):
        raise FedcoreError(f"{key} is frozen in this round and differs from the broadcast")


def _turned(slot: FactorSlot, view: Tensor) -> Tensor:
    return view.T if slot.factor in TRANSPOSED_FACTORS else view


def _leading(slot: FactorSlot, view: Tensor) -> Tensor:
    """The part of a slot's view that a client of the rank of ``slot`` holds."""
    if slot.shape is not None:
        return view
    return view[: slot.rows, : slot.rows] if slot.factor == CORE else view[: slot.rows]


def _widest(tensors: Iterable[Tensor]) -> torch.dtype:
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32
