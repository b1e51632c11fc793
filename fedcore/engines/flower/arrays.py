"""Tensors as Flower's ArrayRecord and back, without loss, bf16 included.

Flower's arrays are NumPy's, which know no bf16. Such a tensor travels as the 16-bit integers of its
bits, under its key with the tag ``:bf16`` at the end.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedcore.errors import FedcoreError

BF16_TAG = ":bf16"
"""The end of the key under which a bf16 tensor travels as int16."""


def to_arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """A state dict as an ArrayRecord; the order of its keys is kept.

    Raises:
        FedcoreError: a key that ends with the tag of bf16 by itself.
    """
    found = {}
    for key, tensor in tensors.items():
        if key.endswith(BF16_TAG):
            raise FedcoreError(f"{key!r} ends with {BF16_TAG!r}, which marks tensors of bf16")
        values = tensor.detach().cpu().contiguous()
        if values.dtype == torch.bfloat16:
            found[key + BF16_TAG] = Array(values.view(torch.int16).numpy())
        else:
            found[key] = Array(values.numpy())
    return ArrayRecord(found)


def from_arrays(record: ArrayRecord) -> dict[str, Tensor]:
    """The state dict that :func:`to_arrays` made a record of, bit by bit.

    Raises:
        FedcoreError: naming the key of an array that cannot be read.
    """
    found: dict[str, Tensor] = {}
    for key, array in record.items():
        name = key.removesuffix(BF16_TAG)
        if name in found:
            raise FedcoreError(f"{name} is there twice, once as bf16")
        try:
            values = torch.from_numpy(np.array(array.numpy()))
        except (TypeError, ValueError, OSError, EOFError) as error:
            raise FedcoreError(f"{key} cannot be read: {error}") from error
        if key != name:
            if values.dtype != torch.int16:
                raise FedcoreError(f"{key} holds {values.dtype}; bf16 travels as int16")
            values = values.view(torch.bfloat16)
        found[name] = values
    return found
