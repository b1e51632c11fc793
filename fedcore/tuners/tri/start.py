"""How the factors of a tri-factor adapter start."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedcore.data.seeding import derive_seed
from fedcore.errors import FedcoreError

CE_STD = 1e-3
"""Standard deviation of ``A`` in CE-LoRA."""
XS_STD = 1e-5
"""Standard deviation of the core in LoRA-XS."""


class TriFactors(NamedTuple):
    """``A (r, in)``, ``R (r, r)``, ``B (out, r)``."""

    A: Tensor
    R: Tensor
    B: Tensor


def initial_factors(
    init: str, seed: int, module: str, shape: tuple[int, int], rank: int, layer: nn.Module
) -> TriFactors:
    """What :class:`~fedcore.tuners.tri.config.TriConfig` calls ``init``, in fp32 on the CPU.

    Args:
        init: ``"lora"``, ``"ce"``, ``"random"`` or ``"xs"``.
        seed: with ``module``, it determines whatever is drawn.
        module: the layer's path in the base model.
        shape: ``(out, in)``.
        rank: r.
        layer: the base layer; ``"xs"`` reads its weight.

    Raises:
        FedcoreError: orthonormal bases of a rank above ``min(out, in)``, or ``"xs"`` on a weight
            that is quantised, not finite or on the meta device.

    Cost: a QR of ``out x r`` and ``in x r`` for ``"random"``, one SVD of ``W0`` in fp64 for
    ``"xs"``. Both may differ in the last bits from machine to machine: bases are drawn once, sent
    and stored, never drawn again.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "tri", init, module))
    out_features, in_features = shape
    if init in ("lora", "ce"):
        if init == "lora":
            uniform = torch.rand(rank, in_features, generator=generator)
            A = (2 * uniform - 1) / sqrt(in_features)
        else:
            A = CE_STD * torch.randn(rank, in_features, generator=generator)
        return TriFactors(A, torch.eye(rank), torch.zeros(out_features, rank))
    check_rank(rank, shape, module)
    if init == "random":

        def isometry(width: int) -> Tensor:
            gaussian = torch.randn(width, rank, generator=generator, dtype=torch.float64)
            return torch.linalg.qr(gaussian).Q.float().contiguous()

        B = isometry(out_features)
        return TriFactors(isometry(in_features).T.contiguous(), torch.zeros(rank, rank), B)
    u, s, vt = truncated_svd(_weight(layer, module), rank)
    core = XS_STD * torch.randn(rank, rank, generator=generator)
    return TriFactors((s[:, None] * vt).float(), core, u.float())


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``U_r (out, r)``, ``S_r (r,)``, ``V_r^T (r, in)`` of ``matrix (out, in)``, fp64, contiguous.

    The entry of largest modulus of each column of U is positive.
    """
    u, s, vt = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
    return (u * signs).contiguous(), s.contiguous(), (vt * signs.T).contiguous()


def check_rank(rank: int, shape: tuple[int, int], module: str) -> None:
    """Raise unless bases of this rank can be orthonormal.

    Raises:
        FedcoreError: naming the module, its shape and the rank.
    """
    if rank > min(shape):
        raise FedcoreError(
            f"module {module} is {shape[0]} x {shape[1]} (out x in); orthonormal bases need r <= "
            f"{min(shape)}, r is {rank}"
        )


def _weight(layer: nn.Module, module: str) -> Tensor:
    weight = layer.weight
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
        kind = getattr(weight, "dtype", type(weight).__name__)
        raise FedcoreError(
            f"module {module} has a weight of {kind}, whose singular vectors init 'xs' needs; "
            "pass init='random'"
        )
    if weight.is_meta or not bool(torch.isfinite(weight).all()):
        state = "on the meta device" if weight.is_meta else "not finite"
        raise FedcoreError(f"module {module} has a weight that is {state}; init 'xs' decomposes it")
    values = weight.detach().cpu()
    return values.T if isinstance(layer, Conv1D) else values
