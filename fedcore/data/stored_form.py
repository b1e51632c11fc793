"""How the tensors of an adapter stand in a file, where they are not the tensors themselves.

A low-rank update of a matrix is two matrices. PEFT stores some updates differently: AdaLoRA keeps
the rows of ``A`` and their sizes apart, a convolution's factors have the axes of its kernel, and
the factors of all experts of a parameter stand in one pair. Here each becomes ordinary pairs when
it is read, one per expert, and goes back into its form when it is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fedcore.data.adapter_kind import Tensors, role_of
from fedcore.data.peft_keys import PREFIX, ends_with, parse_key, unwrapped
from fedcore.errors import FedcoreError

_EXPERT = re.compile(r"\[\d+\]$")


@dataclass(frozen=True)
class StoredForm:
    """One factor or dense tensor, as a function of what the file holds under ``keys``.

    Attributes:
        keys: in the file; the second of two is that of AdaLoRA's sizes.
        axes: of a convolution's factor, those that one axis stands for here.
        expert: which of ``experts``, whose factors stand in one tensor.
        experts: how many there are; 0 for an ordinary tensor.
        factor: ``"A"`` or ``"B"``; empty for a dense tensor.
    """

    keys: tuple[str, ...]
    factor: str = ""
    axes: tuple[int, ...] = ()
    expert: int = 0
    experts: int = 0

    @property
    def plain(self) -> bool:
        """Whether the file holds the tensor itself."""
        return len(self.keys) == 1 and not self.axes and not self.experts

    def read(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The tensor, from those that the file holds."""
        tensor = stored[self.keys[0]]
        if len(self.keys) > 1:
            return tensor * stored[self.keys[1]]
        if self.axes:
            return tensor.flatten(1)
        if not self.experts:
            return tensor
        if self.factor == "A":
            return tensor.view(self.experts, -1, tensor.shape[1])[self.expert]
        # The expert is the fastest of the two indices that B's second axis stands for.
        return tensor.view(tensor.shape[0], -1, self.experts)[:, :, self.expert]


def stacked_experts(factor: str, tensors: list[Tensor]) -> Tensor:
    """The factors of all experts in one tensor: ``(E r, d_in)`` or ``(d_out, r E)``."""
    if factor == "A":
        return torch.cat(tensors)
    return torch.stack(tensors, dim=2).flatten(1)


def shaped(form: StoredForm, tensor: Tensor) -> Tensor:
    """A factor of a convolution with the axes of its kernel, at the rank that it has."""
    leading = tensor.shape[:1] if form.factor == "A" else tensor.shape
    return tensor.reshape(*leading, *form.axes)


@dataclass(frozen=True)
class NamedTensor:
    """One tensor of an adapter by its name.

    Attributes:
        role: what it is to an average.
        family: of the adapter, empty for dense tensors.
        module: path of the adapted module, or the full name of a dense tensor.
        factor: empty for dense tensors.
        key: what it is written under.
        form: how the file holds it.
    """

    role: Tensors
    family: str
    module: str
    factor: str
    key: str
    form: StoredForm

    @property
    def name(self) -> str:
        """``module.factor``, or the dense tensor's name."""
        return f"{self.module}.{self.factor}" if self.factor else self.module


def name_tensors(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, name: str
) -> dict[str, NamedTensor]:
    """Every tensor of an adapter by its name, in the order of the file.

    Args:
        tensors: by PEFT's keys; only shapes are looked at, values may be absent (meta tensors).
        config: the adapter's, None where it is not known.
        name: what to call the adapter in errors.

    Raises:
        FedcoreError: naming the tensor: it is not on the list of what an adapter may hold, two keys
            mean the same, or its shape does not fit its place.
    """
    _check_wrapped(tensors, name)
    singular = {parse_key(key).module: key for key in tensors if parse_key(key).role == "singular"}
    by_name: dict[str, NamedTensor] = {}
    taken: dict[str, str] = {}
    try:
        for key, tensor in tensors.items():
            role = role_of(key, config)
            if role in ("singular", "unused"):
                continue
            for named in _parts(key, role, tensor, config, singular):
                if named.name in by_name:
                    raise FedcoreError(f"{key} and {taken[named.name]} name the same tensor")
                by_name[named.name], taken[named.name] = named, key
        _check_singular(by_name, singular, tensors)
        _check_kernels(by_name)
    except FedcoreError as error:
        raise FedcoreError(f"{name}: {error}") from None
    return by_name


def _parts(
    key: str,
    role: Tensors,
    tensor: Tensor,
    config: Mapping[str, Any] | None,
    singular: Mapping[str, str],
) -> Iterable[NamedTensor]:
    """The tensors that one tensor of the file stands for: one, or one per expert."""
    meaning = parse_key(key)
    module, factor, family = meaning.module, meaning.factor, meaning.family
    form = StoredForm((key,), factor)
    clean = unwrapped(key)
    if role != "factor":
        yield NamedTensor(role, family, module, factor, clean, form)
        return
    if family == "lora" and factor in ("A", "B"):
        experts = _experts(module, tensor, factor, config)
        if experts:
            for e in range(experts):
                part = StoredForm((key,), factor, expert=e, experts=experts)
                yield NamedTensor(role, family, f"{module}[{e}]", factor, clean, part)
            return
        if module in singular:
            clean = f"{PREFIX}{module}.lora_{factor}.weight"
            if factor == "A":
                form = StoredForm((key, singular[module]), factor)
        elif tensor.dim() in (3, 4, 5):
            form = StoredForm((key,), factor, _kernel_axes(key, factor, tensor))
    if tensor.dim() != 2 and not form.axes:
        raise FedcoreError(f"{key} has shape {tuple(tensor.shape)}; a factor has two axes")
    yield NamedTensor(role, family, module, factor, clean, form)


def _kernel_axes(key: str, factor: str, tensor: Tensor) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    axes = shape[1:] if factor == "A" else shape[2:]
    if factor == "B" and prod(axes) != 1:
        raise FedcoreError(
            f"{key} has shape {shape}; B of a convolution's adapter has a kernel of size 1"
        )
    return axes


def _experts(module: str, tensor: Tensor, factor: str, config: Mapping[str, Any] | None) -> int:
    """How many experts share this factor; 0 where ``module`` holds no targeted parameter."""
    targets = (config or {}).get("target_parameters") or ()
    owner = re.sub(r"(\.base_layer)+$", "", module)
    if not any(ends_with(owner, str(target).rpartition(".")[0]) for target in targets):
        return 0
    rank = (config or {}).get("r")
    rows = tensor.shape[0 if factor == "A" else -1]
    if tensor.dim() != 2 or type(rank) is not int or rank < 1 or rows % rank:
        raise FedcoreError(
            f"{module}.{factor} has shape {tuple(tensor.shape)}, which is not a number of experts "
            f"times the rank {rank!r:.20} of the configuration"
        )
    return int(rows // rank)


def _check_singular(
    by_name: Mapping[str, NamedTensor], singular: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    for module, key in singular.items():
        factor = by_name.get(f"{module}.A")
        if factor is None:
            raise FedcoreError(f"{key} stands without {module}.lora_A")
        rank, shape = tensors[factor.form.keys[0]].shape[0], tuple(tensors[key].shape)
        if shape != (rank, 1):
            raise FedcoreError(f"{key} has shape {shape}, expected {(rank, 1)}")


def _check_kernels(by_name: Mapping[str, NamedTensor]) -> None:
    for named in by_name.values():
        partner = by_name.get(f"{named.module}.{'B' if named.factor == 'A' else 'A'}")
        if named.form.axes and (partner is None or not partner.form.axes):
            raise FedcoreError(f"{named.key} has the axes of a convolution, its partner has not")


def _check_wrapped(tensors: Mapping[str, Tensor], name: str) -> None:
    inner = f"{PREFIX}module."
    if tensors and all(key.startswith(inner) for key in tensors):
        first = next(iter(tensors))
        raise FedcoreError(
            f"{name}: every key begins with {inner} ({first}), as if PEFT had been put around a "
            "DistributedDataParallel model, so that PEFT finds none of them in the model itself; "
            "save the adapter of model.module"
        )


def expert_module(module: str) -> str:
    """The module that holds the experts of ``module``, which is the path itself for all others."""
    return _EXPERT.sub("", module)
