"""Tensors of a test on the device where kernels run, laid out in memory as they were made."""

from __future__ import annotations

import torch
from torch import Tensor


def placed(value: Tensor, device: torch.device) -> Tensor:
    """``value`` on ``device`` with its strides and offset; gaps between its rows come along."""
    if value.device == device:
        return value
    storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return storage.to(device).as_strided(value.shape, value.stride(), value.storage_offset())
