"""One adapter as people know it: module path to named factors, with scaling and rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import sqrt
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fedcore.checks import count, flag, number
from fedcore.data.patterns import first_match
from fedcore.data.peft_keys import CORE, parse_key
from fedcore.data.rows import absorb_scalings, rank_and_width, row_dtype, tensor_in_row
from fedcore.errors import FedcoreError
from fedcore_kernels.layout import FactorLayout, FactorSlot

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_PAIRS = {"lora": ("A", "B"), "gram": ("A",), "tri": ("A", "B", "R")}


# No scaling in use is near it, and fp32 factors of ordinary size survive being multiplied by it.
_LARGEST = 1e30


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
        keys: tensor name (``module.factor`` or the dense name) to the key it was read under.
    """

    family: str
    factors: Mapping[str, Mapping[str, Tensor]]
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    scaling: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        factors = {module: _frozen(named) for module, named in self.factors.items()}
        object.__setattr__(self, "factors", _frozen(factors))
        for name in ("dense", "constants", "scaling", "config", "keys"):
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

        Raises:
            FedcoreError: a factor without its partner, a core that is not square, a rank that the
                configuration does not declare, tensors of more than two axes, an integer or complex
                dtype, or no tensor.
        """
        state = cls.from_tensors(tensors, name=name)
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
        factors: dict[str, dict[str, Tensor]] = {}
        dense: dict[str, Tensor] = {}
        constants: dict[str, Tensor] = {}
        keys: dict[str, str] = {}
        families: set[str] = set()
        for key, tensor in tensors.items():
            meaning = parse_key(key)
            if tensor.dtype not in _DTYPES:
                raise FedcoreError(
                    f"{name}: {key} has dtype {tensor.dtype}; a float dtype is needed: fp64, fp32, "
                    "fp16 or bf16"
                )
            if not tensor.numel():
                raise FedcoreError(f"{name}: {key} has shape {tuple(tensor.shape)} and no value")
            plain = meaning.role == "dense"
            full_name = meaning.module if plain else f"{meaning.module}.{meaning.factor}"
            if full_name in keys:
                raise FedcoreError(f"{name}: {key} and {keys[full_name]} name the same tensor")
            keys[full_name] = key
            if plain:
                dense[full_name] = tensor
                continue
            families.add(meaning.family)
            if meaning.role == "constant":
                constants[full_name] = tensor
            else:
                if tensor.dim() != 2:
                    shape = tuple(tensor.shape)
                    raise FedcoreError(f"{name}: {key} has shape {shape}; a factor has two axes")
                factors.setdefault(meaning.module, {})[meaning.factor] = tensor
        if not tensors:
            raise FedcoreError(f"{name}: the adapter holds no tensor")
        if len(families) > 1:
            raise FedcoreError(f"{name}: mixes adapter families {sorted(families)}")
        family = families.pop() if families else "none"
        for module, named in factors.items():
            _check_pair(name, family, module, named)
        return cls(family, factors, dense, constants, keys=keys)

    def to_peft(self) -> dict[str, Tensor]:
        """The state dict under the keys it was read under."""
        out = {}
        for module, named in self.factors.items():
            for factor, tensor in named.items():
                out[self.keys[f"{module}.{factor}"]] = tensor
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


def declared_rank_and_scaling(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and scaling that ``config`` declares for ``module`` (patterns as PEFT matches them).

    ``alpha / r`` for plain LoRA, ``alpha / sqrt(r)`` with ``use_rslora``. A pattern matches the
    whole module path or what follows one of its dots, see :mod:`~fedcore.data.patterns`.

    Raises:
        FedcoreError: ``r`` or ``lora_alpha`` is missing or not positive, or a pattern is not
            understood.
    """
    rank = _declared(config, "rank_pattern", module, "r")
    alpha = _declared(config, "alpha_pattern", module, "lora_alpha")
    owner = f"module {module} in the adapter's configuration"
    rank = count(owner, "r", rank, least=1, most=_LARGEST)
    alpha = number(owner, "lora_alpha", alpha, least=1 / _LARGEST, most=_LARGEST)
    rooted = flag(owner, "use_rslora", config.get("use_rslora") or False)
    return rank, alpha / sqrt(rank) if rooted else alpha / rank


def _declared(config: Mapping[str, Any], patterns: str, module: str, default: str) -> Any:
    """The value of the first of the ``patterns`` that matches ``module``, else of ``default``."""
    declared = config.get(patterns) or {}
    if not isinstance(declared, Mapping):
        raise FedcoreError(f"{patterns} is {declared!r:.60}; a mapping of patterns is needed")
    if not all(isinstance(pattern, str) for pattern in declared):
        raise FedcoreError(f"{patterns} is {declared!r:.60}; its keys are patterns of module paths")
    keys = tuple(declared)
    try:
        place = first_match(keys, module)
    except FedcoreError as error:
        raise FedcoreError(f"{patterns}: {error}") from None
    return config.get(default) if place is None else declared[keys[place]]


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
