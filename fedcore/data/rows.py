"""Tensors and rows: an adapter's tensors as one flat row of a layout, and back.

A row holds every factor as ``rank x width``: ``A`` and the core ``R`` as PEFT has them, ``B``
transposed. A client whose rank in a module is below the layout's fills the leading rows of its
factors, of the core the leading block; what lies beyond is zero. Rows are aggregated with their
scalings absorbed, so that a row's factors alone give the update of the base weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedcore.data.peft_keys import CORE, LORA_BIAS, TRANSPOSED_FACTORS, ends_with, parse_key
from fedcore.errors import FedcoreError
from fedcore_kernels.layout import FactorLayout, FactorSlot

Ranks = Mapping[str, int]
"""Module path to rank."""

SCALE_POWER: Mapping[str, Mapping[str, float]] = {
    "lora": {"B": 1.0},
    "gram": {"A": 0.5},
    "tri": {"R": 1.0},
    "none": {},
}
"""How a factor takes up its scaling: updates are ``s B A``, ``s left A^T A right``, ``s B R A``."""


def _resized(layout: FactorLayout, ranks: Ranks) -> FactorLayout:
    """``layout`` with other ranks, by slot name; a core is as wide as it is high."""
    return FactorLayout.build(
        [
            (
                slot.module,
                slot.factor,
                ranks[slot.name],
                ranks[slot.name] if slot.factor == CORE else slot.width,
            )
            for slot in layout.factor_slots
        ],
        [(slot.module, slot.shape) for slot in layout.dense_slots if slot.shape is not None],
    )


def _check_frozen(key: str, tensor: Tensor, expected: Tensor) -> None:
    if not torch.equal(tensor, expected.to(tensor.dtype)):
        raise FedcoreError(f"{key} is frozen in this round and differs from the broadcast")


def slot_name(key: str) -> str:
    """The slot that ``key`` names, by any spelling of PEFT's, or as the slot's own name."""
    meaning = parse_key(key)
    return f"{meaning.module}.{meaning.factor}" if meaning.factor else meaning.module


def rank_and_width(factor: str, tensor: Tensor) -> tuple[int, int]:
    """Rank and width of a factor that is given in PEFT's orientation."""
    rows, columns = tensor.shape
    return (columns, rows) if factor in TRANSPOSED_FACTORS else (rows, columns)


def row_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The dtype of a row that holds ``tensors``: fp64 where any of them is, otherwise fp32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def layout_at_ranks(layout: FactorLayout, ranks: Ranks | None) -> FactorLayout:
    """The layout of what a client of these ranks has; ``layout`` itself if they are None."""
    if ranks is None:
        return layout
    return _resized(
        layout, {slot.name: min(slot.rows, ranks[slot.module]) for slot in layout.factor_slots}
    )


def widest_layout(layout: FactorLayout, ranks: Iterable[Ranks]) -> FactorLayout:
    """The tensors of ``layout``, each module at the largest of ``ranks`` and of its own rank.

    Args:
        ranks: one mapping per adapter; it may lack modules of the layout.
    """
    adapters = list(ranks)
    return _resized(
        layout,
        {
            slot.name: max([slot.rows, *(rank_of.get(slot.module, 0) for rank_of in adapters)])
            for slot in layout.factor_slots
        },
    )


def tensor_in_row(row: Tensor, layout: FactorLayout, name: str, rank: int | None = None) -> Tensor:
    """The part of ``row (P,)`` that holds the tensor ``name``, a view in PEFT's orientation.

    Args:
        rank: of an adapter that has less than the layout's rank in this module.
    """
    slot = layout.by_name[name]
    view = layout.view(row, slot)
    if slot.dense:
        return view
    if rank is not None and rank < slot.rows:
        view = view[:rank, :rank] if slot.factor == CORE else view[:rank]
    return view.T if slot.factor in TRANSPOSED_FACTORS else view


def tensors_from_row(
    row: Tensor, layout: FactorLayout, ranks: Ranks | None = None
) -> dict[str, Tensor]:
    """Slot name to a copy of the tensor in ``row (P,)``, without what lies beyond ``ranks``."""
    return {
        slot.name: tensor_in_row(row, layout, slot.name, slot.rows).clone(
            memory_format=torch.contiguous_format
        )
        for slot in layout_at_ranks(layout, ranks)
    }


def check_shapes(
    shapes: Mapping[str, Sequence[int]],
    layout: FactorLayout,
    ranks: Ranks | None = None,
    held: Mapping[str, Tensor] | None = None,
) -> None:
    """Refuse what declares other tensors than a row of ``layout`` is made of, unread.

    Args:
        shapes: key to declared shape.
        ranks, held: as :func:`row_from_tensors` has them.

    Raises:
        FedcoreError: a tensor is missing, unexpected, named twice or of another shape.
    """
    expected = layout_at_ranks(layout, ranks)
    seen: set[str] = set()
    for key, shape in shapes.items():
        name = slot_name(key)
        if name in seen:
            raise FedcoreError(f"{key} names {name}, which another key names too")
        seen.add(name)
        if name in expected.by_name:
            wanted = _shape(expected.by_name[name])
        elif name in (held or {}):
            wanted = tuple((held or {})[name].shape)
        else:
            raise FedcoreError(f"unexpected tensor {key}")
        if tuple(shape) != wanted:
            raise FedcoreError(f"{key} has shape {tuple(shape)}, expected {wanted}")
    missing = [slot.name for slot in expected if slot.name not in seen]
    if missing:
        raise FedcoreError(f"{missing[0]} is missing")


def _shape(slot: FactorSlot) -> tuple[int, ...]:
    """The shape of a slot's tensor in PEFT's orientation."""
    if slot.shape is not None:
        return tuple(slot.shape)
    transposed = slot.factor in TRANSPOSED_FACTORS
    return (slot.width, slot.rows) if transposed else (slot.rows, slot.width)


def row_from_tensors(
    tensors: Mapping[str, Tensor],
    layout: FactorLayout,
    ranks: Ranks | None = None,
    held: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The row ``(P,)`` of ``layout`` that holds ``tensors``; what lies beyond ``ranks`` is zero.

    It is fp64 where any tensor is, otherwise fp32. Values are not looked at.

    Args:
        tensors: by any spelling of PEFT's keys, in PEFT's orientation.
        held: slot name to what else may come along, if it is equal: factors that nobody trained.

    Raises:
        FedcoreError: a tensor is missing, unexpected, named twice, of another shape or not
            floating point; or it is frozen and has changed.
    """
    check_shapes({key: tensor.shape for key, tensor in tensors.items()}, layout, ranks, held)
    expected = layout_at_ranks(layout, ranks)
    row = torch.zeros(layout.size, dtype=row_dtype(tensors.values()))
    for key, tensor in tensors.items():
        name = slot_name(key)
        if not tensor.is_floating_point():
            raise FedcoreError(f"{key} has dtype {tensor.dtype}; a float dtype is needed")
        slot = expected.by_name.get(name)
        if slot is None:
            _check_frozen(key, tensor, (held or {})[name])
        else:
            tensor_in_row(row, layout, name, slot.rows).copy_(tensor)
    return row


def absorb_scalings(
    row: Tensor,
    layout: FactorLayout,
    family: str,
    scaling: Mapping[str, float],
    *,
    inverse: bool = False,
) -> None:
    """Multiply the factors of ``row (P,)`` in place by their share of each module's ``scaling``.

    Args:
        scaling: module to a positive number.
        inverse: divide instead, for the way down.
    """
    for group in layout.groups:
        power = SCALE_POWER[family].get(group.factor, 0.0)
        scales = [scaling[module] ** (-power if inverse else power) for module in group.modules]
        # Adapters have one scaling for all modules as a rule: one product per group, not per slot.
        if len(set(scales)) > 1:
            for view, scale in zip(group.view(row).unbind(), scales, strict=True):
                view.mul_(scale)
        elif scales[0] != 1.0:
            group.view(row).mul_(scales[0])
    for slot in layout.dense_slots:
        # A bias beside B is a part of the update and scaled as all of it is.
        if ends_with(slot.name, LORA_BIAS):
            scale = scaling[slot.name.removesuffix(f".{LORA_BIAS}")]
            layout.view(row, slot).mul_(1 / scale if inverse else scale)
