"""The tuner that puts tri-factor layers into a base model."""

from __future__ import annotations

from fedcore.tuners.shared.tuner import ShapeCheckedTuner
from fedcore.tuners.tri.layer import TriLayer


class TriModel(ShapeCheckedTuner):
    """PEFT's tuner for :class:`TriConfig`; made by ``get_peft_model`` and ``PeftModel``.

    Raises:
        FedcoreError: as :class:`ShapeCheckedTuner`.
    """

    prefix = "tri_"
    tuner_layer_cls = TriLayer
