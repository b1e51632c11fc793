"""Grams of a stack of factors and products with it.

A *stack* is the view ``(N, L, r, k)`` of one group of factors: client, module, rank, width. Its
rows under each other form ``F = [sqrt(w_1) A_1; ...; sqrt(w_N) A_N]`` of ``m = N r`` rows for each
module. All products are accumulated in fp64, so neither TF32 settings nor autocast touch them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.client_weights import client_weights
from fedcore_kernels.dispatch import register
from fedcore_kernels.library.operation import call
from fedcore_kernels.rows import working_copies

STACK_AXES = ("N", "L", "r", "k")


def row_scale(root: Tensor, stack: Tensor) -> Tensor:
    """``root (N,)`` once for every row of a module's stack: (m,)."""
    return root.repeat_interleave(stack.shape[2])


def check_pair(left: checks.ArrayLike, right: checks.ArrayLike) -> tuple[Tensor, Tensor]:
    """``left`` (N, L, r, p) and ``right`` (N, L, r, q) as matching tensors.

    Raises:
        KernelInputError: a wrong shape, dtype or device.
    """
    first = checks.tensor("left", left, ("N", "L", "r", "p"))
    second = checks.tensor("right", right, ("N", "L", "r", "q"))
    checks.same_device("right", second, "left", first)
    for axis, meaning in enumerate(("clients", "modules", "rank")):
        checks.same_size("right", second, axis, first.shape[axis], f"the {meaning} of left")
    return first, second


def _gram_body(stack: Tensor, root: Tensor) -> Tensor:
    scale = row_scale(root, stack)
    weights = scale[:, None] * scale
    return torch.cat([(rows @ rows.mT) * weights for _, rows in working_copies(stack)])


def _cross_gram_body(stack: Tensor, reference: Tensor) -> Tensor:
    wide = reference.double()
    products = torch.cat([wide[part] @ rows.mT for part, rows in working_copies(stack)])
    return products.unflatten(-1, (stack.shape[0], stack.shape[2]))


def _apply_cores_body(stack: Tensor, cores: Tensor) -> Tensor:
    wide = cores.double().flatten(-2)
    dtype = checks.accumulator(stack.dtype)
    return torch.cat([(wide[part] @ rows).to(dtype) for part, rows in working_copies(stack)])


register("gram", "torch", _gram_body)
register("cross_gram", "torch", _cross_gram_body)
register("apply_cores", "torch", _apply_cores_body)


def gram(stack: checks.ArrayLike, weights: checks.ArrayLike | None = None) -> Tensor:
    """The dual Gram ``G = F F^T`` of every module, ``F = [sqrt(w_1) A_1; ...]``.

    Its non-zero eigenvalues are those of ``sum_n w_n A_n^T A_n`` (k x k), which is never formed.

    Args:
        stack: (N, L, r, k) floating point, any strides.
        weights: (N,) normalised to sum 1; without them every client counts 1 (not 1/N).

    Returns:
        (L, m, m) fp64, symmetric, m = N r in client-major order.

    Raises:
        KernelInputError: a wrong shape or dtype, or unusable weights.

    Cost: reads N L r k numbers; 2 L m^2 k flops.

    Example:
        >>> gram([[[[1.0, 2.0]]], [[[3.0, 0.0]]]])
        tensor([[[5., 3.],
                 [3., 9.]]], dtype=torch.float64)
    """
    uploads = checks.tensor("stack", stack, STACK_AXES)
    counts = None if weights is None else client_weights(weights, uploads.shape[0])
    grams: Tensor = call("gram", uploads, counts)
    return grams


def cross_gram(stack: checks.ArrayLike, reference: checks.ArrayLike) -> Tensor:
    """The products ``reference A_n^T`` of every module and client.

    Args:
        stack: (N, L, r, k) floating point, any strides.
        reference: (L, q, k) floating point.

    Returns:
        (L, q, N, r) fp64.

    Raises:
        KernelInputError: a wrong shape, dtype or device.

    Cost: reads N L r k + L q k numbers; 2 N L r q k flops.

    Example:
        >>> cross_gram([[[[1.0, 2.0]]], [[[3.0, 0.0]]]], [[[1.0, 1.0]]])
        tensor([[[[3.],
                  [3.]]]], dtype=torch.float64)
    """
    uploads = checks.tensor("stack", stack, STACK_AXES)
    other = checks.tensor("reference", reference, ("L", "q", "k"))
    checks.same_device("reference", other, "stack", uploads)
    checks.same_size("reference", other, 0, uploads.shape[1], "the modules of stack")
    checks.same_size("reference", other, 2, uploads.shape[3], "the width of stack")
    products: Tensor = call("cross_gram", uploads, other)
    return products


def apply_cores(cores: checks.ArrayLike, stack: checks.ArrayLike) -> Tensor:
    """Combine the clients' factors: ``sum_n cores_n A_n`` for every module.

    Args:
        cores: (L, p, N, r) floating point.
        stack: (N, L, r, k) floating point, any strides.

    Returns:
        (L, p, k), accumulated in fp64; fp32 unless ``stack`` is fp64.

    Raises:
        KernelInputError: a wrong shape, dtype or device.

    Cost: reads N L r k numbers; 2 N L r p k flops.

    Example:
        >>> apply_cores([[[[2.0], [1.0]]]], [[[[1.0, 2.0]]], [[[3.0, 0.0]]]])
        tensor([[[5., 4.]]])
    """
    uploads = checks.tensor("stack", stack, STACK_AXES)
    factors = checks.tensor("cores", cores, ("L", "p", "N", "r"))
    checks.same_device("cores", factors, "stack", uploads)
    checks.same_size("cores", factors, 0, uploads.shape[1], "the modules of stack")
    checks.same_size("cores", factors, 2, uploads.shape[0], "the clients of stack")
    checks.same_size("cores", factors, 3, uploads.shape[2], "the rank of stack")
    combined: Tensor = call("apply_cores", factors, uploads)
    return combined
