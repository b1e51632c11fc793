"""What the public operations accept, checked once where data enters.

Values of ``updates`` are not scanned for NaN: that costs a pass over the largest array of a round
and belongs to whoever receives the uploads. ``client_weights.py`` checks the weights in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedcore_kernels.errors import KernelInputError

ArrayLike = Any
"""A tensor, a NumPy array, or nested sequences of numbers."""


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums of ``dtype`` are kept and returned in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensor(name: str, value: ArrayLike, axes: Sequence[str], batch: bool = False) -> Tensor:
    """``value`` as a floating-point tensor with the named ``axes``, none of them empty.

    With ``batch`` any number of axes may stand in front of the named ones.

    Raises:
        KernelInputError: wrong number of axes, an empty axis, or a dtype that is not floating.
    """
    result = torch.as_tensor(value)
    wanted = f"({'..., ' if batch else ''}{', '.join(axes)}{',' if len(axes) == 1 else ''})"
    if not result.dtype.is_floating_point:
        raise KernelInputError(
            f"{name} has dtype {result.dtype}; pass float64, float32, bfloat16 or float16"
        )
    if result.dim() < len(axes) or (result.dim() > len(axes) and not batch):
        raise KernelInputError(f"{name} has shape {tuple(result.shape)}; pass {wanted}")
    for axis, size in zip(axes, result.shape[-len(axes) :], strict=True):
        if size < 1:
            shape = tuple(result.shape)
            raise KernelInputError(f"{name} has shape {shape}: {axis} is 0; pass {wanted}")
    return result


def same_size(name: str, value: Tensor, axis: int, size: int, meaning: str) -> None:
    """Raise unless ``value`` has ``size`` entries along ``axis``, which is ``meaning``.

    Raises:
        KernelInputError: naming the argument, its shape and the size expected.
    """
    if value.shape[axis] != size:
        shape = tuple(value.shape)
        raise KernelInputError(f"{name} has shape {shape}; axis {axis} must be {size}, {meaning}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors are on one device.

    Raises:
        KernelInputError: naming both arguments and their devices.
    """
    if value.device != other.device:
        raise KernelInputError(
            f"{name} is on {value.device} and {other_name} on {other.device}; pass one device"
        )


def fraction(name: str, value: float) -> float:
    """``value`` as a float in [0, 1).

    Raises:
        KernelInputError: outside of that range, or NaN.
    """
    if not 0 <= value < 1:
        raise KernelInputError(f"{name} is {value}; pass a number in [0, 1)")
    return float(value)
