"""Client weights: what is accepted, and the shares that bodies receive.

Shape and dtype are checked where the weights enter, their values where an operation runs, so that
``torch.compile`` sees no branch on data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels.capture import capturing
from fedcore_kernels.checks import ArrayLike
from fedcore_kernels.errors import KernelInputError


def client_weights(weights: ArrayLike, count: int) -> Tensor:
    """``weights`` as a tensor (count,) of real numbers; its values are not checked.

    Raises:
        KernelInputError: another shape than ``(count,)``, or a complex or boolean dtype.
    """
    # A plain list would become fp32, where counts above 2^24 lose their last digits.
    plain = isinstance(weights, list | tuple)
    values = torch.as_tensor(weights, dtype=torch.float64 if plain else None)
    if values.shape != (count,):
        raise KernelInputError(
            f"weights has shape {tuple(values.shape)}; pass ({count},), one weight per client"
        )
    if values.dtype.is_complex or values.dtype == torch.bool:
        raise KernelInputError(f"weights has dtype {values.dtype}; pass real numbers")
    return values


def normalised(weights: Tensor) -> Tensor:
    """``weights`` (N,) as fp64 shares that sum to 1, on their device, without reading a value."""
    wide = weights.double()
    # Divided by the largest first, so that their sum cannot overflow.
    scaled = wide / wide.max()
    return scaled / scaled.sum()


def shares(weights: Tensor, uploads: Tensor) -> Tensor:
    """Client ``weights`` (N,) as fp64 shares that sum to 1, on the CPU.

    While a CUDA graph is captured their values cannot be read: weights on the device are then
    normalised there, unchecked, and the shares stay on it.

    Raises:
        KernelInputError: an entry that is negative, NaN or infinite (with its index), no positive
            entry, or weights on the CPU while ``uploads`` are part of a capture.
    """
    if capturing(uploads):
        if not weights.is_cuda:
            raise KernelInputError(
                f"weights is on {weights.device} while a CUDA graph is captured; "
                f"pass a tensor on {uploads.device}, which a replay reads anew"
            )
        return normalised(weights)
    values = weights.detach().to("cpu", torch.float64)
    bad = ~(torch.isfinite(values) & (values >= 0))
    if bad.any():
        index = int(bad.nonzero()[0])
        raise KernelInputError(
            f"weights[{index}] is {values[index].item()}; pass finite weights that are not negative"
        )
    if not values.any():
        raise KernelInputError("weights are all zero; pass at least one positive weight")
    return normalised(values)


def root_shares(weights: Tensor, stack: Tensor) -> Tensor:
    """``sqrt(w_n)`` of the normalised ``weights``, fp64 (N,), on the device of ``stack``.

    Raises:
        KernelInputError: as :func:`shares`.
    """
    return shares(weights, stack).sqrt().to(stack.device)
