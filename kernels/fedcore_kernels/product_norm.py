"""The norm of a product of two thin factors, without the product and without cancellation.

``||left^T right||_F = ||R_l R_r^T||_F`` with ``left^T = Q_l R_l`` and ``right^T = Q_r R_r``: the
orthonormal parts do not change the norm. The usual ``tr(left left^T right right^T)`` squares first
and loses every relative digit of a small difference such as ``[B_1; -B_2]`` against ``[A_1; A_2]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.dispatch import register
from fedcore_kernels.library.operation import call


def _core(factor: Tensor) -> Tensor:
    wide = factor.double().mT
    if wide.shape[-2] <= wide.shape[-1]:
        return wide
    return torch.linalg.qr(wide, mode="r").R


def _torch_body(left: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(_core(left) @ _core(right).mT)


register("product_norm", "torch", _torch_body)


def product_norm(left: checks.ArrayLike, right: checks.ArrayLike) -> Tensor:
    """``||left^T right||_F`` with all arithmetic in fp64.

    Args:
        left: (..., m, p) floating point, for instance weighted ``B^T`` under each other.
        right: (..., m, q) floating point, leading axes equal to those of ``left``.

    Returns:
        (...) fp64.

    Raises:
        KernelInputError: a wrong shape, dtype or device.

    Cost: 2 m^2 (p + q) + m^3 flops; memory of the factors in fp64, never p x q.

    Example:
        >>> product_norm([[3.0, 0.0]], [[0.0, 4.0]])
        tensor(12., dtype=torch.float64)
    """
    first = checks.tensor("left", left, ("m", "p"), batch=True)
    second = checks.tensor("right", right, ("m", "q"), batch=True)
    checks.same_device("left", first, "right", second)
    checks.same_size("right", second, -2, first.shape[-2], "the rows of left")
    norm: Tensor = call("product_norm", first, second)
    return norm
