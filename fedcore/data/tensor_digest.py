"""One hash of many tensors, of every byte or of samples that are read in no time."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256

import torch
from torch import Tensor

BLOCK = 1 << 16
"""Bytes of a sampled block."""


def digest_of_tensors(named: Iterable[tuple[str, Tensor]], *, blocks: int | None = None) -> str:
    """The SHA-256 of tensors by name, dtype, shape and bytes, in the order given.

    Args:
        named: on any device, of any dtype.
        blocks: of a tensor of more bytes, only so many blocks of 64 KiB count, the first and the
            last among them and the others evenly between; None for every byte.

    Example:
        >>> one = [("w", torch.ones(3))]
        >>> digest_of_tensors(one) == digest_of_tensors([("w", torch.ones(3).half())])
        False
    """
    total = sha256()
    for name, tensor in named:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for start, end in _spans(data.numel(), blocks):
            total.update(data[start:end].cpu().numpy().tobytes())
    return total.hexdigest()


def _spans(size: int, blocks: int | None) -> list[tuple[int, int]]:
    if blocks is None or size <= blocks * BLOCK:
        return [(0, size)]
    last = size - BLOCK
    return [(start, start + BLOCK) for start in (i * last // (blocks - 1) for i in range(blocks))]
