"""The configuration of a tri-factor adapter, as it stands in ``adapter_config.json``."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from fedcore.checks import choice, count, flag, number
from fedcore.errors import FedcoreError
from fedcore.tuners.shared.registration import extend_peft_type

STARTS_AT_ZERO = {"lora": "B", "ce": "B", "random": "R", "xs": None, "sb": None}
"""Each initialisation and the factor that it leaves at zero, so that the model starts as the base
model; a zero factor that is not trained keeps the update at zero for ever."""

_CORE_ONLY = ("random", "xs", "sb")


@dataclass
class TriConfig(PeftConfig):
    """A tri-factor adapter: ``W = W0 + s B R A`` with a core ``R (r x r)`` between two bases.

    Attributes:
        r: the rank; ``A`` is ``r x in``, ``R`` is ``r x r``, ``B`` is ``out x r``.
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
        init: how the factors start, see below.
        init_seed: with the module's path, it determines whatever is drawn.
        train_A, train_R, train_B: which factors train; by default all of them for ``"lora"`` and
            ``"ce"``, the core alone for the others.
        fan_in_fan_out: recorded for readers of the file; the layer's type decides.
        module_shapes: module path to ``[out, in]``; filled in when the layers are made.

    The starts, with ``W0 = U S V^T`` cut at rank r:

    ======== ============================ ============================== ======================
    init     A                            R                              B
    ======== ============================ ============================== ======================
    lora     uniform, as ``LoraConfig``   I                              0
    ce       N(0, 1e-6)                   I                              0
    random   orthonormal rows             0                              orthonormal columns
    xs       ``S_r V_r^T``                N(0, 1e-10)                    ``U_r``
    sb       left for :func:`~fedcore.tuners.tri.lora_sb.apply_sb` to set from a statistic
    ======== ============================ ============================== ======================

    (the second argument of N is the variance). ``"xs"`` is LoRA-XS (arXiv 2405.17604), ``"sb"``
    LoRA-SB (arXiv 2411.19557), ``"ce"`` the start of CE-LoRA (arXiv 2503.23869).

    Raises:
        FedcoreError: naming the field, its value and what to pass; also where nothing trains, or
            the factor that starts at zero does not, since such an adapter has no gradient for ever.
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
    init: str = "lora"
    init_seed: int = 0
    train_A: bool | None = None
    train_R: bool | None = None
    train_B: bool | None = None
    fan_in_fan_out: bool = False
    module_shapes: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("TRI")
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
        count("", "init_seed", self.init_seed, least=0)
        choice("", "init", self.init, STARTS_AT_ZERO)
        if self.bias != "none":
            raise FedcoreError(
                f"bias is {self.bias!r}; a tri-factor adapter trains none, pass 'none'"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise FedcoreError("layers_pattern is set without layers_to_transform; pass both")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise FedcoreError(
                "layers_to_transform cannot be combined with target_modules given as one string; "
                "pass a list of names or put the layer indices into the expression"
            )
        self._resolve_training()

    @property
    def trains(self) -> tuple[str, ...]:
        """The factors that train, of ``("A", "R", "B")``."""
        return tuple(factor for factor in "ARB" if getattr(self, f"train_{factor}"))

    def _resolve_training(self) -> None:
        for factor in "ARB":
            name = f"train_{factor}"
            if getattr(self, name) is None:
                setattr(self, name, factor == "R" or self.init not in _CORE_ONLY)
            flag("", name, getattr(self, name))
        if not self.trains:
            raise FedcoreError("train_A, train_R and train_B are all false; nothing would train")
        zero = STARTS_AT_ZERO[self.init]
        if zero is not None and zero not in self.trains:
            raise FedcoreError(
                f"init {self.init!r} starts with {zero} = 0 and train_{zero} is false; the update "
                f"s B R A and all its gradients would be zero for ever. Pass train_{zero}=True, or "
                "init='xs' or 'random' to train the core alone"
            )
