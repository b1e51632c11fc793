"""A transformer's layers, found by structure, and what leaves one of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def find_layers(model: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The name and the list of a model's transformer layers.

    It is the longest ``ModuleList`` of at least two items that share one class and that stands
    in no other such list (so that the experts of a layer are never taken for layers); the first
    in module order when several are equally long. None if there is no such list.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if not nested and len({type(item) for item in module}) == 1:
            lists[name] = module
    if not lists:
        return None
    longest = max(lists, key=lambda name: len(lists[name]))
    return longest, lists[longest]


def _is_adapted(layer: nn.Module) -> bool:
    # Adapters change between rounds even where their parameters are frozen in this one. PEFT is
    # loaded whenever a model has PEFT layers, so it need not be imported to recognise them.
    tuners, other = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    kinds = (
        getattr(tuners, "BaseTunerLayer", None),
        getattr(other, "AuxiliaryTrainingWrapper", None),
    )
    known = tuple(kind for kind in kinds if kind is not None)
    return any(isinstance(module, known) for module in layer.modules())


def frozen_length(layers: nn.ModuleList, trained: Collection[nn.Parameter]) -> int:
    """How many of the first ``layers`` hold no adapter and none of the ``trained`` parameters."""
    wanted = {id(parameter) for parameter in trained}
    for i, layer in enumerate(layers):
        if _is_adapted(layer) or any(id(parameter) in wanted for parameter in layer.parameters()):
            return i
    return len(layers)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for the whole model; on leaving every module has the mode it had before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Captured(Exception):
    """Ends a forward pass; carries what left a layer."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def capture(model: nn.Module, layer: nn.Module, ids: Tensor, mask: Tensor) -> Any:
    """What leaves ``layer`` in a forward pass of ``model``; nothing after it is computed.

    A tensor or a tuple, as the layer returns it; None if the pass does not reach the layer.
    """

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        raise _Captured(output)

    handle = layer.register_forward_hook(stop)
    try:
        model(input_ids=ids, attention_mask=mask)
    except _Captured as captured:
        return captured.output
    finally:
        handle.remove()
    return None


def capture_input(run: Callable[[], Any], module: nn.Module) -> Tensor | None:
    """What enters ``module`` first in a forward pass that ``run`` makes; nothing after it is
    computed. None if the pass does not reach it, or it takes no tensor.
    """

    def stop(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        raise _Captured(inputs)

    handle = module.register_forward_pre_hook(stop)
    try:
        run()
    except _Captured as captured:
        return first_tensor(captured.output)
    finally:
        handle.remove()
    return None


def first_tensor(output: Any) -> Tensor | None:
    """The hidden states in what a layer returned, or the logits in what a model returned."""
    first = output if isinstance(output, Tensor) else output[0] if output else None
    return first if isinstance(first, Tensor) else None


@contextmanager
def requiring_grad(parameters: Collection[nn.Parameter]) -> Iterator[None]:
    """Gradients on for ``parameters`` and in this context; the flags are put back on leaving."""
    flags = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        with torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
