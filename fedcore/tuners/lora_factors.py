"""The plain LoRA pair that a Gram factor equals.

Without offset ``s left A^T A right`` is the pair ``B' = s left A^T``, ``A' = A right`` of rank r.
With offset ``s left (A^T A - A0^T A0) right`` has rank 2r. With ``D = A - A0`` it is written

    A^T A - A0^T A0 = D^T A + A0^T D:    B' = s [left D^T, left A0^T],    A' = [A right; D right]

and not as the difference of two pairs: the same product at the same cost, exactly zero at
``A = A0`` and, rounded to bf16, accurate relative to what was learned instead of to ``A0^T A0``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore.tuners.gram.frames import Frame


def lora_factors(
    A: Tensor, A0: Tensor | None, frame: Frame, scaling: float
) -> tuple[Tensor, Tensor]:
    """``lora_A (m, in)`` and ``lora_B (out, m)`` whose product, at scale 1, is the layer's update.

    ``m = 2r`` with an offset and ``r`` without. Differentiable in ``A``; computed in fp32, or fp64
    for fp64 factors, whatever autocast says.

    Args:
        A: ``(r, k)``, the trained factor.
        A0: ``(r, k)``, the initial factor, or None for an adapter without offset.
        frame: carries ``(m, k)`` to ``(m, in)`` and ``(m, out)``.
        scaling: ``alpha / r`` or ``alpha / sqrt(r)``.

    Cost: two transforms of ``m`` rows, ``O(m w log w)`` for a structured frame of width ``w``.
    """
    with torch.autocast(device_type=A.device.type, enabled=False):
        A = A.to(torch.promote_types(A.dtype, torch.float32))
        if A0 is None:
            toward_in, toward_out = A, A
        else:
            A0 = A0.to(A.dtype)
            moved = A - A0
            toward_in, toward_out = torch.cat([A, moved]), torch.cat([moved, A0])
        return frame.times_right(toward_in), (scaling * frame.times_left_t(toward_out)).T
