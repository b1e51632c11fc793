"""The configuration of a Gram adapter, as it stands in ``adapter_config.json``."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedcore.checks import choice, count, number
from fedcore.errors import FedcoreError
from fedcore.tuners.gram.frames import FRAME_KINDS
from fedcore.tuners.shared.config import AdditiveConfig
from fedcore.tuners.shared.registration import extend_peft_type


@dataclass
class GramConfig(AdditiveConfig):
    """A FLoRG adapter: ``W = W0 + s left (A^T A - A0^T A0) right`` with one trained matrix ``A``.

    ``r`` is the number of rows of ``A``. Beside the fields of
    :class:`~fedcore.tuners.shared.config.AdditiveConfig`:

    Attributes:
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
        frame_ids: module path to the identity of its frame; filled in when the layers are made.

    Raises:
        FedcoreError: naming the field, its value and what to pass.

    The update is symmetric positive semi-definite between the frames, less the initial one: about
    half of what LoRA of the same rank can express, for half of its traffic.
    """

    described = "a Gram adapter"

    frame: str = "structured"
    frame_seed: int = 0
    init_std: float | None = None
    init_seed: int = 0
    offset: bool = True
    frame_ids: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type("GRAM")
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
