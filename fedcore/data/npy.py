"""Arrays in NumPy's ``.npy`` format from somebody else: headers first, every claim bounded.

Layout of the format: ``\\x93NUMPY``, two bytes of version, the length of the header (two bytes,
from version 2 on four, little endian), a header that is a Python dictionary of ``descr``,
``fortran_order`` and ``shape``, then raw data. ``numpy.load`` believes a header and allocates what
it claims, and opens zip archives under the same name. Here the header is read by one fixed form,
in which NumPy writes it, and has to account for every byte that follows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fedcore.errors import FedcoreError

_MAGIC = b"\x93NUMPY"
_VERSIONS: Mapping[bytes, int] = {b"\x01\x00": 2, b"\x02\x00": 4, b"\x03\x00": 4}
"""Version to the bytes that hold the header's length."""

_LONGEST_HEADER = 4096
# No axis is longer than the bytes that are there, of which nobody has a million billion.
_AXIS = rb"[0-9]{1,15}"
_HEADER = re.compile(
    rb"\{'descr': '([<>=|][a-zA-Z][0-9]{0,2})', 'fortran_order': (True|False), "
    rb"'shape': \((|%s,|%s(?:, %s){1,7})\), \} *\n?" % (_AXIS, _AXIS, _AXIS)
)

DTYPES: Mapping[str, torch.dtype] = {
    "<f8": torch.float64,
    "<f4": torch.float32,
    "<f2": torch.float16,
    "<i8": torch.int64,
    "<i4": torch.int32,
    "<i2": torch.int16,
    "|i1": torch.int8,
    "|u1": torch.uint8,
}
"""The formats that are read, by their names in a header; bf16 travels as int16."""


@dataclass(frozen=True)
class NpyArray:
    """An array whose header was read and whose values were not.

    Attributes:
        dtype, shape: as the header says.
        begin: where its values begin in ``data``.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    data: bytes

    @classmethod
    def open(cls, data: bytes) -> NpyArray:
        """Read and check the header of a whole ``.npy`` file.

        Raises:
            FedcoreError: it is not one, its values are not numbers of :data:`DTYPES` in row-major
                order, or they are more or fewer than its shape needs.
        """
        size = _VERSIONS.get(data[6:8])
        if not data.startswith(_MAGIC) or size is None:
            raise FedcoreError("it is not an array in the .npy format; send it with to_arrays")
        begin = 8 + size + int.from_bytes(data[8 : 8 + size], "little")
        if begin > min(len(data), _LONGEST_HEADER):
            raise FedcoreError(f"its header ends at byte {begin} of {len(data)}")
        header = _HEADER.fullmatch(data[8 + size : begin])
        if header is None:
            raise FedcoreError("its header is not one that NumPy writes")
        descr, order, axes = (part.decode() for part in header.groups())
        dtype = DTYPES.get(descr)
        if dtype is None:
            raise FedcoreError(f"it has dtype {descr}; send one of {', '.join(DTYPES)}")
        if order == "True":
            raise FedcoreError("it is in column-major order; send it row by row, contiguous")
        shape = tuple(int(axis) for axis in axes.split(",") if axis)
        if prod(shape) * dtype.itemsize != len(data) - begin:
            raise FedcoreError(
                f"it has {len(data) - begin} bytes of values, its shape {shape} needs "
                f"{prod(shape) * dtype.itemsize}"
            )
        return cls(dtype, shape, begin, data)

    def tensor(self) -> Tensor:
        """The values, in memory of their own."""
        if not prod(self.shape):
            return torch.empty(self.shape, dtype=self.dtype)
        values = bytearray(memoryview(self.data)[self.begin :])
        return torch.frombuffer(values, dtype=self.dtype).view(self.shape)
