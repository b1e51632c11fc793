"""One adapter as people know it: module path to named factors, with scaling and rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fedcore.data.adapter_kind import config_problem, kind
from fedcore.data.declared import as_lora_config, declared_rank_and_scaling
from fedcore.data.peft_keys import CORE
from fedcore.data.rows import absorb_scalings, rank_and_width, row_dtype, tensor_in_row
from fedcore.data.stored_form import NamedTensor, StoredForm, name_tensors, shaped, stacked_experts
from fedcore.errors import FedcoreError
from fedcore_kernels.layout import FactorLayout, FactorSlot

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_PAIRS = {"lora": ("A", "B"), "gram": ("A",), "tri": ("A", "B", "R")}


def _frozen(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(mapping))


@dataclass(frozen=True)
class AdapterState:
    """The tensors of one adapter, immutable, in PEFT's own orientation.

    Attributes:
        family: ``"lora"`` (factors ``A (r, d_in)`` and ``B (d_out, r)``), ``"gram"`` (factor
            ``A (r, k)``) or ``"tri"`` (``A (r, d_in)``, ``B (d_out, r)`` and the core
            ``R (r, r)``); ``"none"`` when only dense tensors are present.
        factors: module path to factor name to tensor.
        dense: tensors that travel whole: heads, norms, magnitudes.
        constants: tensors that never change and are compared, not averaged (a Gram adapter's
            initial factor, stored frames).
        scaling: module path to ``alpha / r`` or ``alpha / sqrt(r)``.
        config: the adapter's configuration, as read from ``adapter_config.json``.
        keys: tensor name (``module.factor`` or the dense name) to the key it is written under.
        forms: tensor name to how a file holds it, of factors that stand in a file in another form
            (convolutions, experts).
    """

    family: str
    factors: Mapping[str, Mapping[str, Tensor]]
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    scaling: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    forms: Mapping[str, StoredForm] = field(default_factory=dict)

    def __post_init__(self) -> None:
        factors = {module: _frozen(named) for module, named in self.factors.items()}
        object.__setattr__(self, "factors", _frozen(factors))
        for name in ("dense", "constants", "scaling", "config", "keys", "forms"):
            object.__setattr__(self, name, _frozen(getattr(self, name)))

    @classmethod
    def from_peft(
        cls,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        *,
        name: str = "adapter",
    ) -> AdapterState:
        """Read a PEFT state dict and its configuration.

        Args:
            tensors: keys as PEFT writes them, with or without ``base_model.model.`` and the
                adapter's name; order does not matter.
            config: the fields of ``adapter_config.json`` (``r``, ``lora_alpha``, ``rank_pattern``,
                ``alpha_pattern``, ``use_rslora``, ...).
            name: what to call the adapter in errors, usually the client's id.

        AdaLoRA is read as the plain LoRA that it is equal to, with the configuration of one; the
        factors of a convolution are matrices here, and each expert of a parameter is a module.

        Raises:
            FedcoreError: naming field or tensor: the configuration or a tensor is not on the list
                of :mod:`fedcore.data.adapter_kind`; a factor without its partner, a core that is
                not square, a rank that the configuration does not declare, factors of more than
                two axes, an integer or complex dtype, or no tensor.
        """
        problem = config_problem(config)
        if problem:
            raise FedcoreError(f"{name}: {problem}")
        state = cls._of(tensors, name_tensors(tensors, config, name), name)
        if kind(config) == "ADALORA":
            config, scaling = as_lora_config(config, state.ranks, name)
            return replace(state, scaling=scaling, config=config)
        scaling = {}
        for module in state.factors:
            rank = state.rank(module)
            try:
                declared, scaling[module] = declared_rank_and_scaling(config, module)
            except FedcoreError as error:
                raise FedcoreError(f"{name}: {error}") from None
            if declared != rank:
                raise FedcoreError(
                    f"{name}: module {module} has rank {rank}, its configuration says {declared}"
                )
        return replace(state, scaling=scaling, config=config)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], *, name: str = "adapter") -> AdapterState:
        """Read the tensors of an adapter whose configuration is not known: no scalings.

        Raises:
            FedcoreError: as :meth:`from_peft`, without what concerns the configuration.
        """
        return cls._of(tensors, name_tensors(tensors, None, name), name)

    @classmethod
    def _of(
        cls, tensors: Mapping[str, Tensor], named: Mapping[str, NamedTensor], name: str
    ) -> AdapterState:
        factors: dict[str, dict[str, Tensor]] = {}
        whole: dict[str, dict[str, Tensor]] = {"dense": {}, "constant": {}}
        for key, tensor in tensors.items():
            if tensor.dtype not in _DTYPES:
                raise FedcoreError(
                    f"{name}: {key} has dtype {tensor.dtype}; a float dtype is needed: fp64, fp32, "
                    "fp16 or bf16"
                )
            if not tensor.numel():
                raise FedcoreError(f"{name}: {key} has shape {tuple(tensor.shape)} and no value")
        for full_name, one in named.items():
            tensor = one.form.read(tensors)
            if one.role == "factor":
                factors.setdefault(one.module, {})[one.factor] = tensor
            else:
                # A copy of a frozen base weight is compared as every constant is, never averaged.
                whole["dense" if one.role == "dense" else "constant"][full_name] = tensor
        if not tensors:
            raise FedcoreError(f"{name}: the adapter holds no tensor")
        families = {one.family for one in named.values() if one.family}
        if len(families) > 1:
            raise FedcoreError(f"{name}: mixes adapter families {sorted(families)}")
        family = families.pop() if families else "none"
        for module, pair in factors.items():
            _check_pair(name, family, module, pair)
        keys = {full_name: one.key for full_name, one in named.items()}
        # AdaLoRA's form is left behind: what was read is written as plain LoRA.
        forms = {n: one.form for n, one in named.items() if one.form.axes or one.form.experts}
        return cls(family, factors, whole["dense"], whole["constant"], keys=keys, forms=forms)

    def to_peft(self) -> dict[str, Tensor]:
        """The state dict under the keys it was read under, wrappers' names left out."""
        out = {}
        experts: dict[str, list[Tensor]] = {}
        for module, named in self.factors.items():
            for factor, tensor in named.items():
                name = f"{module}.{factor}"
                key, form = self.keys[name], self.forms.get(name)
                if form is not None and form.experts:
                    experts.setdefault(key, []).append(tensor)
                    if len(experts[key]) == form.experts:
                        out[key] = stacked_experts(factor, experts[key])
                else:
                    out[key] = tensor if form is None else shaped(form, tensor)
        for tensors in (self.constants, self.dense):
            for name, tensor in tensors.items():
                out[self.keys[name]] = tensor
        return out

    def rank(self, module: str) -> int:
        """The rank of ``module``'s factors."""
        return rank_and_width(*next(iter(self.factors[module].items())))[0]

    @property
    def ranks(self) -> dict[str, int]:
        """Module to rank."""
        return {module: self.rank(module) for module in self.factors}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that all factors and dense tensors can be held in: fp32, or fp64 if any is."""
        factors = [tensor for named in self.factors.values() for tensor in named.values()]
        return row_dtype([*factors, *self.dense.values()])

    def layout(self) -> FactorLayout:
        """The layout of this adapter's own row."""
        return FactorLayout.build(
            [
                (module, factor, *rank_and_width(factor, tensor))
                for module, named in self.factors.items()
                for factor, tensor in named.items()
            ],
            [(name, tuple(tensor.shape)) for name, tensor in self.dense.items()],
        )

    def to_row(self, layout: FactorLayout, out: Tensor | None = None) -> Tensor:
        """This adapter as a row of ``layout`` (its tensors must be the layout's, exactly).

        A module of a lower rank than the layout's leaves the rest of its factors zero; nothing is
        scaled here. The row is fp64 where any tensor is, or ``out`` itself.
        """
        row = torch.zeros(layout.size, dtype=self.dtype) if out is None else out.zero_()
        for slot in layout:
            tensor, rank = self._tensor_and_rank(slot)
            tensor_in_row(row, layout, slot.name, rank).copy_(tensor)
        return row

    def with_row(self, row: Tensor, layout: FactorLayout) -> AdapterState:
        """A copy of this adapter with the tensors that ``layout`` names taken from ``row``.

        Ranks and dtypes stay this adapter's own; rows beyond a module's rank are left out.
        """
        factors = {module: dict(named) for module, named in self.factors.items()}
        dense = dict(self.dense)
        for slot in layout:
            before, rank = self._tensor_and_rank(slot)
            part = tensor_in_row(row, layout, slot.name, rank).to(before.dtype)
            tensor = part.clone(memory_format=torch.contiguous_format)
            if slot.dense:
                dense[slot.module] = tensor
            else:
                factors[slot.module][slot.factor] = tensor
        return replace(self, factors=factors, dense=dense)

    def _tensor_and_rank(self, slot: FactorSlot) -> tuple[Tensor, int | None]:
        if slot.dense:
            return self.dense[slot.module], None
        return self.factors[slot.module][slot.factor], self.rank(slot.module)


def adapter_from_row(row: Tensor, layout: FactorLayout, like: AdapterState) -> AdapterState:
    """A row of absorbed factors as an adapter with the scalings, ranks and keys of ``like``.

    The way down: what a cohort of adapters absorbed is divided by the receiver's own scaling, so
    that the adapter's update is the row's product.
    """
    unscaled = row.clone()
    absorb_scalings(unscaled, layout, like.family, like.scaling, inverse=True)
    return like.with_row(unscaled, layout)


def _check_pair(name: str, family: str, module: str, named: Mapping[str, Tensor]) -> None:
    missing = [factor for factor in _PAIRS[family] if factor not in named]
    if missing:
        raise FedcoreError(f"{name}: module {module} lacks factor {missing[0]}")
    if CORE in named and named[CORE].shape[0] != named[CORE].shape[1]:
        shape = tuple(named[CORE].shape)
        raise FedcoreError(f"{name}: module {module} has a core of shape {shape}; it is square")
    ranks = {factor: rank_and_width(factor, tensor)[0] for factor, tensor in named.items()}
    if len(set(ranks.values())) > 1:
        raise FedcoreError(f"{name}: module {module} has factors of different rank {ranks}")
