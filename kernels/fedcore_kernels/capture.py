"""Whether a CUDA graph is being captured, when no value on the device can be read."""

from __future__ import annotations

import torch
from torch import Tensor


def capturing(*tensors: Tensor) -> bool:
    """Whether a tensor is on a CUDA device whose current stream records a CUDA graph."""
    return any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing()


def reads_values(*tensors: Tensor) -> str | None:
    """The obstacle of a body that reads values on the host: a capture in progress."""
    return "it reads values, which a CUDA graph capture forbids" if capturing(*tensors) else None
