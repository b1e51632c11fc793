"""How an upload travels: a row of numbers as bytes and back.

Padding between tensors is not sent. Every codec is a pair of pure functions on the CPU with a size
that follows from the layout alone, so that traffic can be stated before anything is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedcore.data.validation import check_row
from fedcore.errors import FedcoreError, unknown_name
from fedcore_kernels.layout import FactorLayout


@dataclass(frozen=True)
class Encoded:
    """What is sent: the codec's name, which is the tag of the number format, and the bytes."""

    codec: str
    payload: bytes

    def __len__(self) -> int:
        return len(self.payload)


class Codec(Protocol):
    """One number format of the wire."""

    @property
    def name(self) -> str:
        """What recipes and :func:`find_codec` call it."""

    def bytes(self, layout: FactorLayout) -> int:
        """The exact length of every payload of this layout."""

    def encode(self, row: Tensor, layout: FactorLayout) -> Encoded:
        """``row (P,)``, floating point, as bytes.

        Raises:
            FedcoreError: another size or dtype, or a value that the format cannot hold.
        """

    def decode(self, encoded: Encoded, layout: FactorLayout) -> Tensor:
        """The row ``(P,)`` fp32; its padding is zero.

        Raises:
            FedcoreError: another codec's payload, or one of another length.
        """


@dataclass(frozen=True)
class Fp32:
    """Every number as it is: 4 bytes. Rows of fp64 are rounded once."""

    name: str = "fp32"

    def bytes(self, layout: FactorLayout) -> int:
        """4 bytes per number."""
        return 4 * layout.numel

    def encode(self, row: Tensor, layout: FactorLayout) -> Encoded:
        """The bits of fp32, little-endian; NaN and infinity pass, for the server to refuse."""
        numbers = _numbers(row, layout).to(torch.float32).numpy()
        return Encoded(self.name, numbers.astype("<f4", copy=False).tobytes())

    def decode(self, encoded: Encoded, layout: FactorLayout) -> Tensor:
        """The same bits."""
        payload = _payload(self, encoded, layout)
        return _row(np.frombuffer(payload, "<f4").astype(np.float32), layout)


@dataclass(frozen=True)
class Bf16:
    """Rounded to the nearest bf16, ties to even: 2 bytes, a relative error of at most 2^-8.

    Rows that hold bf16 numbers come back bit by bit. They travel as 16-bit integers, since NumPy
    and the frameworks that carry its arrays know no bf16.
    """

    name: str = "bf16"

    def bytes(self, layout: FactorLayout) -> int:
        """2 bytes per number."""
        return 2 * layout.numel

    def encode(self, row: Tensor, layout: FactorLayout) -> Encoded:
        """The upper half of fp32's bits, rounded; beyond 3.39e38 infinite, as NaN passes."""
        short = _numbers(row, layout).to(torch.float32).to(torch.bfloat16)
        bits = short.view(torch.int16).numpy()
        return Encoded(self.name, bits.astype("<i2", copy=False).tobytes())

    def decode(self, encoded: Encoded, layout: FactorLayout) -> Tensor:
        """The rounded numbers, in fp32."""
        bits = np.frombuffer(_payload(self, encoded, layout), "<i2").astype(np.int16)
        return _row(torch.from_numpy(bits).view(torch.bfloat16).float().numpy(), layout)


@dataclass(frozen=True)
class Int8:
    """Blocks of 64 numbers as ``round(127 x / absmax)`` and an fp32 scale: 1.06 bytes per number.

    ``|x - decoded| <= absmax / 254`` in every block, up to fp32 rounding: relative to the block's
    largest number, so that small ones beside it are lost. Blocks do not cross tensors; the last one
    of a tensor may be short. Zeros stay zeros. Scales below fp32's range are lost with their block:
    the error is then at most 2e-43.
    """

    name: str = "int8"
    block: int = 64

    def bytes(self, layout: FactorLayout) -> int:
        """One byte per number and four per block."""
        return layout.numel + 4 * sum(-(-slot.numel // self.block) for slot in layout)

    def encode(self, row: Tensor, layout: FactorLayout) -> Encoded:
        """All scales, tensor by tensor, and then all integers.

        Raises:
            FedcoreError: also where a number is NaN or infinite in fp32, which no scale can hold.
        """
        flat = _checked(row, layout).to(torch.float32)
        problem = check_row(flat, layout)
        if problem:
            raise FedcoreError(f"codec {self.name}: {problem}")
        scales, codes = [torch.empty(0)], [torch.empty(0, dtype=torch.int8)]
        for piece in _pieces(flat, layout):
            missing = -piece.numel() % self.block
            blocks = torch.nn.functional.pad(piece, (0, missing)).view(-1, self.block).double()
            scale = (blocks.abs().amax(1) / 127).float()
            exact = scale.double()[:, None]
            code = torch.where(exact > 0, blocks / exact, 0.0).round().clamp(-127, 127)
            scales.append(scale)
            codes.append(code.to(torch.int8).flatten()[: piece.numel()])
        head = torch.cat(scales).numpy().astype("<f4", copy=False)
        return Encoded(self.name, head.tobytes() + torch.cat(codes).numpy().tobytes())

    def decode(self, encoded: Encoded, layout: FactorLayout) -> Tensor:
        """Scale times integer, in fp32.

        Raises:
            FedcoreError: also where a scale is negative, NaN or infinite.
        """
        payload = _payload(self, encoded, layout)
        split = len(payload) - layout.numel
        scales = np.frombuffer(payload[:split], "<f4").astype(np.float32)
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise FedcoreError(f"codec {self.name}: a scale is negative or not finite")
        codes = np.frombuffer(payload[split:], np.int8).astype(np.float32)
        sizes = [slot.numel for slot in layout]
        counts = [-(-size // self.block) for size in sizes]
        lengths = [
            min(self.block, size - self.block * i)
            for size, count in zip(sizes, counts, strict=True)
            for i in range(count)
        ]
        return _row(codes * np.repeat(scales, lengths), layout)


CODECS: tuple[Codec, ...] = (Fp32(), Bf16(), Int8())
"""All codecs, from the most exact to the smallest."""


def find_codec(name: str) -> Codec:
    """The codec of that name.

    Raises:
        FedcoreError: one line with the nearest valid names.

    Example:
        >>> layout = FactorLayout.build([("q", "A", 2, 32)])
        >>> [codec.bytes(layout) for codec in CODECS], find_codec("int8").name
        ([256, 128, 68], 'int8')
    """
    for codec in CODECS:
        if codec.name == name:
            return codec
    raise unknown_name("codec", name, [codec.name for codec in CODECS])


def codec_error(row: Tensor, decoded: Tensor) -> float:
    """``||row - decoded|| / ||row||`` in fp64: 0 for a zero row that stayed zero, else inf."""
    exact = row.to(torch.float64)
    gap = float((exact - decoded.to(torch.float64)).norm())
    size = float(exact.norm())
    if size == 0:
        return inf if gap else 0.0
    return gap / size


def _checked(row: Tensor, layout: FactorLayout) -> Tensor:
    """``row`` on the CPU, if it is a row of ``layout``."""
    if row.shape != (layout.size,) or not row.dtype.is_floating_point:
        raise FedcoreError(
            f"row is {row.dtype} {tuple(row.shape)}; pass a floating-point row ({layout.size},)"
        )
    return row.detach().cpu().contiguous()


def _pieces(row: Tensor, layout: FactorLayout) -> Iterator[Tensor]:
    return (row[slot.offset : slot.offset + slot.numel] for slot in layout)


def _numbers(row: Tensor, layout: FactorLayout) -> Tensor:
    """The numbers of ``row`` without padding, in row order."""
    checked = _checked(row, layout)
    return torch.cat([*_pieces(checked, layout), checked[:0]])


def _payload(codec: Codec, encoded: Encoded, layout: FactorLayout) -> bytes:
    """The bytes, if they are this codec's and of the layout's length."""
    if encoded.codec != codec.name:
        raise FedcoreError(f"an upload of codec {encoded.codec!r} was given to codec {codec.name}")
    expected = codec.bytes(layout)
    if len(encoded.payload) != expected:
        raise FedcoreError(
            f"codec {codec.name}: the payload has {len(encoded.payload)} bytes, this layout needs "
            f"{expected}"
        )
    return encoded.payload


def _row(numbers: np.ndarray, layout: FactorLayout) -> Tensor:
    row = torch.zeros(layout.size, dtype=torch.float32)
    values, start = torch.from_numpy(numbers), 0
    for slot in layout:
        row[slot.offset : slot.offset + slot.numel] = values[start : start + slot.numel]
        start += slot.numel
    return row
