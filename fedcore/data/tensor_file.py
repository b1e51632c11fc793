"""A safetensors file whose header is checked before any tensor is read.

Layout of the format: the length of the header (8 bytes, little endian), a JSON header that maps
each name to dtype, shape and byte offsets, then raw little-endian data. Everything that a header
declares is compared with the size of the file first, so that nothing is allocated for what is not
there. Tensors are read by position and not mapped: a file that is truncated while it is read gives
an error instead of a dead process, and read pages do not count as memory of the process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from fedcore.checks import is_integer
from fedcore.data.folders import distinct, open_regular
from fedcore.errors import FedcoreError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The dtypes of adapters, by their names in a header."""

_LENGTH = 8
_HEADER_LIMIT = 32 << 20
_AXES_LIMIT = 8


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of one tensor; ``begin`` and ``end`` are positions in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class TensorFile:
    """An open-on-demand safetensors file of float tensors.

    Attributes:
        path: the file.
        label: what to call it in errors, usually the client's id.
        tensors: name to what the header says, in the order of their data.
    """

    path: Path
    label: str
    tensors: Mapping[str, StoredTensor]
    _state: tuple[int, int, int]
    _links: bool = True

    @classmethod
    def open(cls, path: Path, label: str, budget: int, *, links: bool = True) -> TensorFile:
        """Read and check the header alone.

        Args:
            links: whether ``path`` may be a symbolic link.

        Raises:
            FedcoreError: the file is larger than ``budget`` bytes or cannot be read; its header is
                not a JSON object of distinct names, or declares a dtype that adapters do not have,
                an empty tensor, or data that do not fill the file exactly and once.
        """
        try:
            with open_regular(path, links=links) as file:
                state = _state(file.fileno())
                size = state[0]
                if size > budget:
                    raise FedcoreError(
                        f"{label}: {path} holds {size} bytes, more than the budget {budget}"
                    )
                length = int.from_bytes(file.read(_LENGTH), "little")
                if length > min(_HEADER_LIMIT, size - _LENGTH):
                    raise _malformed(path, label, f"its header declares {length} bytes of {size}")
                text = file.read(length)
            return cls(path, label, _parsed(text, size), state, links)
        except FedcoreError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise _malformed(path, label, str(error)) from error

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, each run of neighbours with one read.

        Raises:
            FedcoreError: the file has changed since its header was read.
        """
        wanted = sorted(names, key=lambda name: self.tensors[name].begin)
        runs: list[list[str]] = []
        end, dtype = -1, None
        for name in wanted:
            stored = self.tensors[name]
            # Of one dtype each, so that every tensor of a run is aligned.
            if stored.begin != end or stored.dtype != dtype:
                runs.append([])
            runs[-1].append(name)
            end, dtype = stored.end, stored.dtype
        spans = [(self.tensors[run[0]].begin, self.tensors[run[-1]].end) for run in runs]
        tensors = {}
        for run, data in zip(runs, self._bytes(spans), strict=True):
            flat = torch.frombuffer(data, dtype=self.tensors[run[0]].dtype)
            shapes = [self.tensors[name].shape for name in run]
            pieces = flat.split([prod(shape) for shape in shapes])
            for name, piece, shape in zip(run, pieces, shapes, strict=True):
                tensors[name] = piece.view(shape)
        return tensors

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a tensor in row-major order.

        Raises:
            FedcoreError: the file has changed since its header was read.
        """
        stored = self.tensors[name]
        first = stored.begin + start * stored.dtype.itemsize
        last = stored.begin + stop * stored.dtype.itemsize
        (data,) = self._bytes([(first, last)])
        return torch.frombuffer(data, dtype=stored.dtype)

    def _bytes(self, spans: list[tuple[int, int]]) -> list[bytearray]:
        blocks = []
        try:
            with open_regular(self.path, links=self._links) as file:
                if _state(file.fileno()) != self._state:
                    raise FedcoreError(f"{self.label}: {self.path} changed while it was read")
                for begin, end in spans:
                    data = bytearray(end - begin)
                    view, done = memoryview(data), 0
                    file.seek(begin)
                    while done < len(data):
                        count = file.readinto(view[done:])
                        if not count:
                            raise FedcoreError(
                                f"{self.label}: {self.path} changed while it was read"
                            )
                        done += count
                    blocks.append(data)
        except OSError as error:
            raise _malformed(self.path, self.label, str(error)) from error
        return blocks


def _state(descriptor: int) -> tuple[int, int, int]:
    """Size, time of the last change and identity of an open file."""
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _malformed(path: Path, label: str, reason: str) -> FedcoreError:
    return FedcoreError(f"{label}: cannot read {path}: {reason}")


@lru_cache(maxsize=4)
def _parsed(text: bytes, size: int) -> Mapping[str, StoredTensor]:
    """The tensors of a file of ``size`` bytes with this header, by their places.

    Adapters of one model have equal headers, of which one is parsed.

    Raises:
        ValueError: saying what is wrong.
        RecursionError: the header nests too deeply.
    """
    start = _LENGTH + len(text)
    entries = json.loads(text.decode("utf-8"), object_pairs_hook=distinct)
    if not isinstance(entries, dict):
        raise ValueError("its header is not a JSON object")
    tensors = {
        name: _entry(name, entry, start, size)
        for name, entry in entries.items()
        if name != "__metadata__"
    }
    ordered = sorted(tensors.items(), key=lambda item: item[1].begin)
    for (name, one), (other, after) in pairwise(ordered):
        if one.end != after.begin:
            raise ValueError(f"the data of {_short(name)} and {_short(other)} do not adjoin")
    first, last = (ordered[0][1].begin, ordered[-1][1].end) if ordered else (start, start)
    if first != start or last != size:
        raise ValueError(
            f"its tensors fill bytes {first - start} to {last - start} of {size - start} of data"
        )
    return MappingProxyType(dict(ordered))


def _entry(name: str, entry: Any, start: int, size: int) -> StoredTensor:
    if not name.isprintable():
        raise ValueError(f"{_short(name)} is not a printable name")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{_short(name)} needs dtype, shape and data_offsets and nothing else")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(
            f"{_short(name)} has dtype {_short(entry['dtype'])}; a float dtype is needed: "
            f"{', '.join(DTYPES)}"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    # Bounded first, so that products of what a header claims stay small numbers.
    if not _whole(shape, 1, size) or len(shape) > _AXES_LIMIT:
        raise ValueError(
            f"{_short(name)} has shape {_short(shape)}; axes are whole numbers from 1 to the "
            f"file's {size} bytes, {_AXES_LIMIT} of them at most"
        )
    if not _whole(offsets, 0, size - start) or len(offsets) != 2:
        raise ValueError(
            f"{_short(name)} has data_offsets {_short(offsets)} in {size - start} bytes of data"
        )
    begin, end = offsets
    if end - begin != prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{_short(name)} has {end - begin} bytes of data, its shape {_short(shape)} needs "
            f"{prod(shape) * dtype.itemsize}"
        )
    return StoredTensor(dtype, tuple(shape), start + begin, start + end)


def _whole(values: Any, least: int, most: int) -> bool:
    """Whether ``values`` is a list of integers from ``least`` to ``most``."""
    return isinstance(values, list) and all(
        is_integer(value) and least <= value <= most for value in values
    )


def _short(value: Any) -> str:
    """``value`` as an error may quote it, whatever a file holds there."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
