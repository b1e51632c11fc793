"""The configuration of a Gram adapter, as it stands in ``adapter_config.json``."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from fedcore.checks import choice, count, number
from fedcore.errors import FedcoreError
from fedcore.tuners.shared.frames import FRAME_KINDS
from fedcore.tuners.shared.registration import extend_peft_type


@dataclass
class GramConfig(PeftConfig):
    """A FLoRG adapter: ``W = W0 + s left (A^T A - A0^T A0) right`` with one trained matrix ``A``.

    Attributes:
        r: rows of ``A``.
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
        frame: ``"structured"`` (rebuilt from its recipe) or ``"qr"`` (dense, stored in the file).
        frame_seed: all clients of a federation share it.
        init_std: standard deviation of the initial ``A``; ``0.1 / sqrt(k)`` by default,
            ``k = min(out, in)``. With an offset ``A`` has to keep ``A0^T A0`` beside what it learns
            and has r rows for both, so a large start costs accuracy; a tiny one stalls SGD, whose
            step is proportional to ``A``. Fitting a rank-4 change with Adam (k = 768, r = 8,
            s = 2) left .68 of the loss at .001 and .003, .79 at .01, .99 at .02.
        init_seed: with the module's path, it determines the initial ``A``.
        offset: subtract the initial product, so that the model starts as the base model. ``A = 0``
            has no gradient, hence an adapter without offset starts away from the base model.
        fan_in_fan_out: recorded for readers of the file; the layer's type decides.
        module_shapes: module path to ``[out, in]``; filled in when the layers are made.
        frame_ids: module path to the identity of its frame; filled in when the layers are made.

    Raises:
        FedcoreError: naming the field, its value and what to pass.

    The update is symmetric positive semi-definite between the frames, less the initial one: about
    half of what LoRA of the same rank can express, for half of its traffic.
    """

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
    frame: str = "structured"
    frame_seed: int = 0
    init_std: float | None = None
    init_seed: int = 0
    offset: bool = True
    fan_in_fan_out: bool = False
    module_shapes: dict[str, list[int]] = field(default_factory=dict)
    frame_ids: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("GRAM")
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
        count("", "frame_seed", self.frame_seed, least=0)
        count("", "init_seed", self.init_seed, least=0)
        if self.init_std == 0:
            raise FedcoreError(
                "init_std is 0; A = 0 is a stationary point of A^T A and would never train; "
                "pass a positive number, offset=True makes the model start as the base model"
            )
        if self.init_std is not None:
            number("", "init_std", self.init_std, above=0)
        choice("", "frame", self.frame, FRAME_KINDS)
        if self.bias != "none":
            raise FedcoreError(f"bias is {self.bias!r}; a Gram adapter trains none, pass 'none'")
        if self.layers_pattern and self.layers_to_transform is None:
            raise FedcoreError("layers_pattern is set without layers_to_transform; pass both")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise FedcoreError(
                "layers_to_transform cannot be combined with target_modules given as one string; "
                "pass a list of names or put the layer indices into the expression"
            )
