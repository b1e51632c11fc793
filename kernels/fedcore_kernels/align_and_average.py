"""FedRot's rule: align each client's factors with the last broadcast, then average them.

For factors stored as rows (``A_n``, and ``B_n`` transposed) and the references broadcast at the
start of the round,

    X_n = sum over the factors used of factor_n reference^T,    O_n = soft_rotation(X_n, strength)

minimises the sum of ``||O_n^T factor_n - reference||_F^2`` over rotations at strength 1 and never
raises it at a lower one. ``(B_n O_n)(O_n^T A_n) = B_n A_n``: what a client learned does not change,
only which rows are averaged with which.

Reference: FedRot-LoRA, arXiv 2602.23638, which alternates between A and B; aligning both at once is
our own option.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.client_weights import client_weights
from fedcore_kernels.errors import KernelInputError
from fedcore_kernels.library.operation import call, without_gradient
from fedcore_kernels.soft_rotation import SoftRotation, soft_rotation
from fedcore_kernels.stacks import STACK_AXES, apply_cores, cross_gram
from fedcore_kernels.steps import EPS_REL


class Alignment(NamedTuple):
    """Averaged factors and the rotations they were averaged in.

    Attributes:
        factors: one mean (L, r, k) per stack: ``sum_n w_n O_n^T factor_n``.
        rotations: (N, L, r, r) fp64, determinant +1.
        rank: (N, L) int64, directions in which the references determine the rotation.
        fallbacks: (L,) int64, clients whose interpolant was singular and whose factors were not
            rotated.
    """

    factors: tuple[Tensor, ...]
    rotations: Tensor
    rank: Tensor
    fallbacks: Tensor


Arrays = Sequence[checks.ArrayLike]
References = Sequence[checks.ArrayLike | None]


def _check_sequence(name: str, value: object) -> None:
    if not isinstance(value, list | tuple):
        raise KernelInputError(f"{name} is a {type(value).__name__}; pass a list of arrays")


def _check_stacks(stacks: Arrays) -> list[Tensor]:
    """``stacks`` as tensors (N, L, r, k_i) of equal N, L and r."""
    _check_sequence("stacks", stacks)
    if not stacks:
        raise KernelInputError("stacks is empty; pass at least one stack (N, L, r, k)")
    tensors = [checks.tensor(f"stacks[{i}]", stack, STACK_AXES) for i, stack in enumerate(stacks)]
    for i, stack in enumerate(tensors):
        checks.same_device(f"stacks[{i}]", stack, "stacks[0]", tensors[0])
        for axis, meaning in enumerate(("clients", "modules", "rank")):
            size = tensors[0].shape[axis]
            checks.same_size(f"stacks[{i}]", stack, axis, size, f"the {meaning} of stacks[0]")
    return tensors


def _check_references(references: References, stacks: list[Tensor]) -> list[Tensor | None]:
    """``references`` as tensors (L, r, k_i) or ``None``, one per stack."""
    _check_sequence("references", references)
    if len(references) != len(stacks):
        raise KernelInputError(
            f"references has {len(references)} entries; pass {len(stacks)}, one per stack or None"
        )
    factors: list[Tensor | None] = []
    for i, (reference, stack) in enumerate(zip(references, stacks, strict=True)):
        if reference is None:
            factors.append(None)
            continue
        name = f"references[{i}]"
        rows = checks.tensor(name, reference, ("L", "r", "k"))
        checks.same_device(name, rows, f"stacks[{i}]", stack)
        for axis, meaning in enumerate(("modules", "rank", "width")):
            checks.same_size(name, rows, axis, stack.shape[axis + 1], f"the {meaning} of its stack")
        factors.append(rows)
    return factors


def _rotations(
    stacks: list[Tensor], references: list[Tensor | None], strength: float, eps_rel: float
) -> SoftRotation:
    clients, modules, rank, _ = stacks[0].shape
    total = torch.zeros(
        (clients, modules, rank, rank), dtype=torch.float64, device=stacks[0].device
    )
    for stack, reference in zip(stacks, references, strict=True):
        if reference is not None:
            # reference A_n^T is (L, q, N, r); X_n is its transpose.
            total = total + cross_gram(stack, reference).permute(2, 0, 3, 1)
    return soft_rotation(total, strength, eps_rel=eps_rel)


def rotations(
    stacks: Arrays, references: References, strength: float = 1.0, *, eps_rel: float = EPS_REL
) -> SoftRotation:
    """The rotations that align each client's factors with the references.

    A client calls it on its own factors (N = 1) before it uploads them, see :func:`rotate`.

    Args:
        stacks: the factors (N, L, r, k_i) of one module group, floating point, any strides: A, B
            transposed, or both.
        references: for each stack the factor (L, r, k_i) broadcast at the start of the round, or
            ``None`` for a stack that does not influence the rotation. With none at all, as in the
            first round, the rotations are the identity.
        strength: in [0, 1]; 0 gives the identity, 1 the full rotation.
        eps_rel: see :func:`soft_rotation`.

    Returns:
        :class:`SoftRotation` of shape (N, L, r, r).

    Raises:
        KernelInputError: a wrong shape, dtype or device, or a strength outside [0, 1].

    Example:
        >>> factor, reference = [[[[0.0, 1.0], [-1.0, 0.0]]]], [[[1.0, 0.0], [0.0, 1.0]]]
        >>> rotations([factor], [reference]).rotation[0, 0]
        tensor([[ 0.,  1.],
                [-1.,  0.]], dtype=torch.float64)
    """
    uploads = _check_stacks(stacks)
    before = _check_references(references, uploads)
    without_gradient("rotations", stacks=uploads, references=before)
    return _rotations(uploads, before, strength, eps_rel)


def rotate(stack: checks.ArrayLike, rotations: checks.ArrayLike) -> Tensor:
    """``O_n^T A_n`` for every client and module.

    Args:
        stack: (N, L, r, k) floating point, any strides.
        rotations: (N, L, r, r).

    Returns:
        (N, L, r, k), computed in fp64; fp32 unless ``stack`` is fp64.

    Raises:
        KernelInputError: a wrong shape, dtype or device.

    Example:
        >>> rotate([[[[1.0], [2.0]]]], [[[[0.0, -1.0], [1.0, 0.0]]]])[0, 0]
        tensor([[ 2.],
                [-1.]])
    """
    uploads = checks.tensor("stack", stack, STACK_AXES)
    turns = checks.tensor("rotations", rotations, ("N", "L", "r", "r"))
    checks.same_device("rotations", turns, "stack", uploads)
    for axis, meaning in enumerate(("clients", "modules", "rank", "rank")):
        checks.same_size(
            "rotations", turns, axis, uploads.shape[min(axis, 2)], f"the {meaning} of stack"
        )
    return (turns.double().mT @ uploads.double()).to(checks.accumulator(uploads.dtype))


def align_and_average(
    stacks: Arrays,
    references: References,
    weights: checks.ArrayLike,
    strength: float = 1.0,
    *,
    eps_rel: float = EPS_REL,
) -> Alignment:
    """Rotate every client's factors by its :func:`rotations` and average them.

    Args:
        stacks: the factors (N, L, r, k_i) of one module group, floating point, any strides: A, B
            transposed, or both. All are rotated alike and averaged.
        references: for each stack the factor (L, r, k_i) broadcast at the start of the round, or
            ``None`` for a stack that does not influence the rotation; plain means with none at all.
        weights: (N,) real numbers, normalised in fp64.
        strength: in [0, 1]; 0 gives plain means, 1 the full rotation.
        eps_rel: see :func:`soft_rotation`.

    Returns:
        :class:`Alignment`, each mean in fp32 unless its stack is fp64.

    Raises:
        KernelInputError: a wrong shape, dtype or device, a strength outside [0, 1], or unusable
            weights.

    Cost: reads every stack once to average it and once more if it has a reference; 4 N L r^2 k
    flops each, and N L problems of size r x r.

    Example:
        >>> quarter_turn, reference = [[[0.0, 1.0], [-1.0, 0.0]]], [[[1.0, 0.0], [0.0, 1.0]]]
        >>> align_and_average([[quarter_turn, reference]], [reference], [1, 1]).factors[0]
        tensor([[[1., 0.],
                 [0., 1.]]])
    """
    uploads = _check_stacks(stacks)
    before = _check_references(references, uploads)
    without_gradient("align_and_average", stacks=uploads, references=before)
    shares: Tensor = call("client_shares", uploads[0], client_weights(weights, uploads[0].shape[0]))
    turns = _rotations(uploads, before, strength, eps_rel)
    # sum_n cores_n A_n with cores_n = w_n O_n^T.
    cores = (shares[:, None, None, None] * turns.rotation).permute(1, 3, 0, 2)
    means = tuple(apply_cores(cores, stack) for stack in uploads)
    return Alignment(means, turns.rotation, turns.rank, turns.singular.sum(0))
