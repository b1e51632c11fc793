"""The configuration of a tri-factor adapter, as it stands in ``adapter_config.json``."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.checks import choice, count, flag
from fedcore.errors import FedcoreError
from fedcore.tuners.shared.config import AdditiveConfig
from fedcore.tuners.shared.registration import extend_peft_type

STARTS_AT_ZERO = {"lora": "B", "ce": "B", "random": "R", "xs": None, "sb": None}
"""Each initialisation and the factor that it leaves at zero, so that the model starts as the base
model; a zero factor that is not trained keeps the update at zero for ever."""

_CORE_ONLY = ("random", "xs", "sb")


@dataclass
class TriConfig(AdditiveConfig):
    """A tri-factor adapter: ``W = W0 + s B R A`` with a core ``R (r x r)`` between two bases.

    ``A`` is ``r x in``, ``R`` is ``r x r``, ``B`` is ``out x r``. Beside the fields of
    :class:`~fedcore.tuners.shared.config.AdditiveConfig`:

    Attributes:
        init: how the factors start, see below.
        init_seed: with the module's path, it determines whatever is drawn.
        train_A, train_R, train_B: which factors train; by default all of them for ``"lora"`` and
            ``"ce"``, the core alone for the others.

    The starts, with ``W0 = U S V^T`` truncated to rank r:

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

    described = "a tri-factor adapter"

    init: str = "lora"
    init_seed: int = 0
    train_A: bool | None = None
    train_R: bool | None = None
    train_B: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("TRI")
        count("", "init_seed", self.init_seed, least=0)
        choice("", "init", self.init, STARTS_AT_ZERO)
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
