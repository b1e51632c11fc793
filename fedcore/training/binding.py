"""The one model in memory, seen as a flat row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedcore.data.adapter_kind import is_embedding_copy
from fedcore.data.peft_keys import parse_key
from fedcore.data.rows import rank_and_width, row_dtype, tensor_in_row
from fedcore.errors import FedcoreError
from fedcore_kernels.layout import FactorLayout


@dataclass(frozen=True)
class ModelBinding:
    """Which parameter of a model each slot of a row is.

    However many clients there are, one model exists: a client is loaded by copying its row into
    these parameters and read back the same way.

    Attributes:
        layout: every factor of the adapter, trained or not, and every trained dense tensor.
        parameters: slot name to the model's parameter.
        constants: name to tensor that no client may change (initial factors, stored frames, frozen
            embeddings that PEFT saves beside their adapter).
    """

    layout: FactorLayout
    parameters: Mapping[str, nn.Parameter]
    constants: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> ModelBinding:
        """Bind the adapter of ``model`` and every parameter that requires a gradient.

        Frozen factors are bound too: clients hold them as broadcast, and say so by their digest.

        Raises:
            FedcoreError: nothing trains.
        """
        factors, dense, parameters = [], [], {}
        constants: dict[str, Tensor] = {}
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise FedcoreError("the model has no trained parameter to federate")
        once = dict(model.named_parameters())
        for key, parameter in model.named_parameters(remove_duplicate=False):
            # PEFT writes a tied module that it saves whole under both of its names.
            if key not in once and ".modules_to_save." not in key:
                continue
            meaning = parse_key(key)
            if meaning.role != "factor" and not parameter.requires_grad:
                if is_embedding_copy(meaning.module):
                    constants[meaning.module] = parameter
                continue
            if meaning.role == "factor":
                size = rank_and_width(meaning.factor, parameter)
                factors.append((meaning.module, meaning.factor, *size))
                parameters[f"{meaning.module}.{meaning.factor}"] = parameter
            else:
                dense.append((meaning.module, tuple(parameter.shape)))
                parameters[meaning.module] = parameter
        for key, buffer in model.named_buffers():
            meaning = parse_key(key)
            if meaning.role == "constant":
                constants[f"{meaning.module}.{meaning.factor}"] = buffer
        return cls(FactorLayout.build(factors, dense), parameters, constants)

    @torch.no_grad()
    def load(self, row: Tensor, layout: FactorLayout | None = None) -> None:
        """Copy ``row`` into the model's parameters."""
        part = self.layout if layout is None else layout
        for slot in part:
            self.parameters[slot.name].copy_(tensor_in_row(row, part, slot.name))

    @torch.no_grad()
    def read(self, layout: FactorLayout | None = None, out: Tensor | None = None) -> Tensor:
        """The model's parameters as a row of ``layout``, written into ``out`` if given.

        A new row is fp64 where any bound parameter is, otherwise fp32, whatever ``layout`` names:
        the parts of one adapter have one dtype, as :meth:`AdapterState.to_row` has it.
        """
        part = self.layout if layout is None else layout
        dtype = row_dtype(self.parameters.values())
        row = torch.zeros(part.size, dtype=dtype) if out is None else out.zero_()
        for slot in part:
            tensor_in_row(row, part, slot.name).copy_(self.parameters[slot.name])
        return row

    def trained(self, factors: Iterable[str]) -> dict[str, nn.Parameter]:
        """Freeze every factor that is not named and return what trains, dense tensors included."""
        named = set(factors)
        trained = {}
        for slot in self.layout:
            parameter = self.parameters[slot.name]
            trains = slot.dense or slot.factor in named
            parameter.requires_grad_(trains)
            parameter.grad = None
            if trains:
                trained[slot.name] = parameter
        return trained
