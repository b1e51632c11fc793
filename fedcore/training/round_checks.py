"""What a client compares before and after a round of training, so that nothing fails silently."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fedcore.data.adapter_state import AdapterState
from fedcore.data.exchange import BroadcastFolder
from fedcore.errors import FedcoreError
from fedcore.methods.base import Method
from fedcore.training.binding import ModelBinding
from fedcore_kernels.layout import FactorLayout


def check_fits(
    binding: ModelBinding, own: AdapterState, broadcast: BroadcastFolder, method: Method
) -> None:
    """Refuse a broadcast that is not of this model's adapter.

    Raises:
        FedcoreError: the adapters' families, tensors, shapes, scalings or constants differ, the
            model trains a tensor that is not federated, or the residual is not of its layers.
    """
    theirs = broadcast.adapter
    if not own.family == theirs.family == method.family:
        raise FedcoreError(
            f"the model's adapter is of family {own.family!r}, the broadcast's {theirs.family!r}, "
            f"and {method.name} needs {method.family!r}"
        )
    mine = binding.layout.by_name
    for slot in broadcast.layout:
        if slot.name not in mine:
            raise FedcoreError(f"the broadcast holds {slot.name}, which the model does not train")
        own_slot = mine[slot.name]
        if (own_slot.rows, own_slot.width, own_slot.shape) != (slot.rows, slot.width, slot.shape):
            shapes = [list(s.shape or (s.rows, s.width)) for s in (own_slot, slot)]
            raise FedcoreError(
                f"{slot.name} is {shapes[0]} in the model and {shapes[1]} in the broadcast"
            )
    extra = [name for name in mine if name not in broadcast.layout.by_name]
    if extra:
        raise FedcoreError(
            f"the model trains {extra[0]}, which the broadcast lacks; freeze it, or start the "
            "federation from an adapter that saves it (modules_to_save)"
        )
    for module, scaling in own.scaling.items():
        if scaling != theirs.scaling[module]:
            raise FedcoreError(
                f"module {module} has scaling {scaling:g} in the model and "
                f"{theirs.scaling[module]:g} in the broadcast"
            )
    _check_constants(binding, own, theirs)
    _check_residual(broadcast)


def check_holds(
    binding: ModelBinding, row: Tensor, layout: FactorLayout, frozen: FactorLayout
) -> None:
    """Refuse frozen factors in a dtype that cannot hold the broadcast exactly.

    Raises:
        FedcoreError: naming the factor and its dtype.
    """
    for slot in frozen:
        values = layout.view(row, layout.by_name[slot.name])
        dtype = binding.parameters[slot.name].dtype
        if not torch.equal(values.to(dtype).to(values.dtype), values):
            raise FedcoreError(
                f"{slot.name} is frozen and the model's {dtype} cannot hold the broadcast's values;"
                " keep adapters in fp32 (autocast_adapter_dtype=True of get_peft_model)"
            )


def check_optimiser(binding: ModelBinding, trains: Iterable[str], optimiser: Any) -> None:
    """Refuse an optimiser, or gradient flags, that are not those of the round's plan.

    Args:
        trains: the factors that train; dense tensors do in any case.
        optimiser: whatever has ``param_groups``.

    Raises:
        FedcoreError: naming the parameter, or there is no optimiser to look at.
    """
    if optimiser is None:
        raise FedcoreError(
            "the Trainer shows its callbacks no optimiser, so nobody can see what it steps; "
            "sharded training (DeepSpeed, FSDP) is not supported"
        )
    trainable = set(trains)
    stepped = {id(p) for group in optimiser.param_groups for p in group["params"]}
    for slot in binding.layout:
        parameter = binding.parameters[slot.name]
        should = slot.dense or slot.factor in trainable
        if parameter.requires_grad != should:
            wrong = "is frozen" if should else "requires a gradient"
            raise FedcoreError(
                f"{slot.name} {wrong} against the round's plan; leave requires_grad as receive set "
                "it"
            )
        if (id(parameter) in stepped) != should:
            wrong = "does not step" if should else "steps the frozen"
            raise FedcoreError(
                f"the optimiser {wrong} {slot.name}: it was built before this round was received; "
                "make a new Trainer after receive"
            )


def _check_residual(broadcast: BroadcastFolder) -> None:
    slots = broadcast.layout.by_name
    for module, part in broadcast.residual.items():
        pair = [slots.get(f"{module}.{factor}") for factor in ("B", "A")]
        if None in pair:
            raise FedcoreError(f"the residual of {module}: the adapter has no such module")
        rows, columns = (slot.width for slot in pair if slot is not None)
        if (part.outer.shape[-1], part.inner.shape[-1]) != (rows, columns):
            raise FedcoreError(
                f"the residual of {module} is of a weight {part.outer.shape[-1]} x "
                f"{part.inner.shape[-1]}; the adapter's is {rows} x {columns}"
            )
        if not all(bool(factor.isfinite().all()) for factor in part):
            raise FedcoreError(f"the residual of {module} holds values that are not finite")


def _check_constants(binding: ModelBinding, own: AdapterState, theirs: AdapterState) -> None:
    advice = "load the model by PeftModel.from_pretrained(base, broadcast, is_trainable=True)"
    frames, expected = (s.config.get("frame_ids") or {} for s in (own, theirs))
    for module, frame in expected.items():
        if frames.get(module) != frame:
            raise FedcoreError(f"module {module} has another frame than the broadcast's; {advice}")
    for name, value in theirs.constants.items():
        constant = binding.constants.get(name)
        if constant is None or not torch.equal(constant.cpu().float(), value.float()):
            raise FedcoreError(f"{name} is not the broadcast's; {advice}")
    for name in own.constants:
        if name not in theirs.constants:
            raise FedcoreError(f"the broadcast lacks the constant {name}")
