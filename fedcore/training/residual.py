"""A frozen low-rank update of base weights, applied beside them and never merged into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedcore.data.low_rank import LowRank
from fedcore.data.peft_keys import parse_key
from fedcore.errors import FedcoreError


class FrozenResidual:
    """Adds ``s x inner^T outer`` to what adapted layers give, for the modules that have a residual.

    ``s`` is the layer's own scaling: like the factors in a row, a residual is relative to it. The
    base weights stay as they are, so a quantised or half-precision base loses nothing of it and
    the update can be exchanged between rounds.

    Args:
        model: a model wrapped by PEFT.
        modules: the adapted modules, by the names that a layout gives them.

    Raises:
        FedcoreError: the model has no module of such a name.
    """

    def __init__(self, model: nn.Module, modules: tuple[str, ...]) -> None:
        self._layers = _adapted_layers(model, modules)
        self._handles: list[RemovableHandle] = []

    def load(self, parts: Mapping[str, LowRank]) -> None:
        """Replace the residual by ``parts``, module to factors; an empty mapping removes it."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for module, part in parts.items():
            layer = self._layers[module]
            weight = next(layer.parameters())
            on_device = LowRank(*(factor.to(weight.device) for factor in part))
            scaling: float = layer.scaling["default"]  # type: ignore[index,assignment]
            self._handles.append(layer.register_forward_hook(_adding(on_device, scaling)))


def _adding(part: LowRank, scaling: float) -> Any:
    def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs[0].to(part.inner.dtype)
        return output + (scaling * (x @ part.inner.T) @ part.outer).to(output.dtype)

    return hook


def _adapted_layers(model: nn.Module, modules: tuple[str, ...]) -> dict[str, nn.Module]:
    named = {parse_key(f"{name}.weight").module: layer for name, layer in model.named_modules()}
    layers = {}
    for module in modules:
        layer = named.get(f"{module}.weight")
        if layer is None:
            raise FedcoreError(f"the model has no module {module} to carry a residual")
        layers[module] = layer
    return layers
