"""The fields that the configurations of all additive adapters have, as ``LoraConfig`` has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftConfig

from fedcore.checks import count, number
from fedcore.errors import FedcoreError


@dataclass
class AdditiveConfig(PeftConfig):
    """What places an adapter in a model and scales it.

    Attributes:
        r: the rank.
        target_modules: names, or a regular expression, or ``"all-linear"``, as in ``LoraConfig``.
        exclude_modules: targets to leave out, as in ``LoraConfig``.
        lora_alpha: ``s = lora_alpha / r``.
        use_rslora: ``s = lora_alpha / sqrt(r)`` instead.
        modules_to_save: modules trained and saved whole, usually the classification head.
        layers_to_transform: indices of the layers to adapt; all by default.
        layers_pattern: name of the list those indices count in.
        bias: only ``"none"``.
        rank_pattern: module pattern to its own ``r``.
        alpha_pattern: module pattern to its own ``lora_alpha``.
        fan_in_fan_out: recorded for readers of the file; the layer's type decides.
        module_shapes: module path to ``[out, in]``; filled in when the layers are made.

    Raises:
        FedcoreError: naming the field, its value and what to pass.
    """

    described: ClassVar[str] = "an additive adapter"
    """The name of an adapter of this configuration in errors."""

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: float = 8
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    module_shapes: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self.rank_pattern = dict(self.rank_pattern or {})
        self.alpha_pattern = dict(self.alpha_pattern or {})
        count("", "r", self.r, least=1)
        for pattern, rank in self.rank_pattern.items():
            count("", f"rank_pattern[{pattern!r}]", rank, least=1)
        number("", "lora_alpha", self.lora_alpha, above=0)
        for pattern, alpha in self.alpha_pattern.items():
            number("", f"alpha_pattern[{pattern!r}]", alpha, above=0)
        if self.bias != "none":
            raise FedcoreError(f"bias is {self.bias!r}; {self.described} trains none, pass 'none'")
        if self.layers_pattern and self.layers_to_transform is None:
            raise FedcoreError("layers_pattern is set without layers_to_transform; pass both")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise FedcoreError(
                "layers_to_transform cannot be combined with target_modules given as one string; "
                "pass a list of names or put the layer indices into the expression"
            )
