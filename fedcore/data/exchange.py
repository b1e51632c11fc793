"""What a server and its clients hand each other as folders.

A *broadcast* is a PEFT folder with the global adapter and ``broadcast.json``; where the method
updates base weights, ``residual.safetensors`` lies beside them. An *upload* holds what a client
sends and no more, with ``upload.json``: factors under their PEFT keys and the adapter's
configuration, or ``statistics.safetensors`` where a method sends something else than factors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcore.data.adapter_state import AdapterState
from fedcore.data.declared import declared_rank_and_scaling
from fedcore.data.folders import read_object, replace_folder, write_text
from fedcore.data.low_rank import LowRank, packed, unpacked
from fedcore.data.peft_files import (
    CONFIG_FILE,
    DEFAULT_BUDGET,
    WEIGHTS_FILE,
    read_adapter,
    write_adapter,
    write_tensors,
)
from fedcore.data.peft_keys import PREFIX
from fedcore.data.rows import check_shapes, row_from_tensors, tensors_from_row
from fedcore.data.tensor_file import TensorFile
from fedcore.data.validation import digest
from fedcore.errors import FedcoreError
from fedcore_kernels.layout import FactorLayout

BROADCAST_FILE = "broadcast.json"
UPLOAD_FILE = "upload.json"
RESIDUAL_FILE = "residual.safetensors"
STATISTICS_FILE = "statistics.safetensors"

# Of the header of an upload: its metadata, and a name, a dtype, a shape and two offsets per tensor.
_HEADER_BYTES, _ENTRY_BYTES = 1 << 16, 1 << 10

_UPLOAD_FIELDS = {
    "round": int,
    "examples": float,
    "frozen": str,
    "started_from": str,
    "flags": list,
}


@dataclass(frozen=True)
class BroadcastFolder:
    """What all clients of a round start from.

    Attributes:
        adapter: the global adapter; its factors are those of the model, scalings not absorbed.
        round: counted from 0.
        method, options: the name of the method and its hyper-parameters.
        residual: module to the low-rank update of its base weight.
    """

    adapter: AdapterState
    round: int
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    residual: Mapping[str, LowRank] = field(default_factory=dict)

    @cached_property
    def layout(self) -> FactorLayout:
        """The layout of the global row."""
        return self.adapter.layout()

    @cached_property
    def row(self) -> Tensor:
        """``(P,)`` the global row."""
        return self.adapter.to_row(self.layout)

    @cached_property
    def identity(self) -> str:
        """A hash of every tensor in it: clients say by it what they started from."""
        beside = packed(self.residual)
        fixed = fixed_tensors(self.adapter.constants)
        return digest(self.row, self.layout, [*fixed, *(beside[name] for name in sorted(beside))])

    def digest_of(self, part: FactorLayout) -> str:
        """The hash of the tensors in ``part`` and of the constants."""
        return digest(
            self.layout.gather(self.row, part), part, fixed_tensors(self.adapter.constants)
        )


@dataclass(frozen=True)
class UploadFolder:
    """One client's upload.

    Attributes:
        row: ``(P,)`` in the upload layout of the round.
        round: the round that the client trained for.
        examples: how many examples it trained on, its weight.
        frozen: digest of what it must not have changed, as it held it after training.
        started_from: identity of the broadcast that it started from.
        flags: trouble that the client half met.
    """

    row: Tensor
    round: int
    examples: float
    frozen: str
    started_from: str
    flags: tuple[str, ...] = ()


def fixed_tensors(constants: Mapping[str, Tensor]) -> list[Tensor]:
    """The constants in fp32 and in order of their names, so that equal values hash alike."""
    return [constants[name].detach().float() for name in sorted(constants)]


def write_broadcast(broadcast: BroadcastFolder, folder: Path) -> Path:
    """Write ``broadcast`` as ``folder``, which appears whole or not at all.

    Raises:
        FedcoreError: ``folder`` holds something else than a broadcast, or cannot be written; what
            was there before is still there.
    """
    with replace_folder(folder, BROADCAST_FILE) as new:
        write_adapter(broadcast.adapter, new)
        if broadcast.residual:
            write_tensors(packed(broadcast.residual), new / RESIDUAL_FILE)
        about = {
            "round": broadcast.round,
            "method": broadcast.method,
            "options": dict(broadcast.options),
            "identity": broadcast.identity,
        }
        write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", new / BROADCAST_FILE)
    return folder


def read_broadcast(folder: Path) -> BroadcastFolder:
    """Read what :func:`write_broadcast` wrote.

    Raises:
        FedcoreError: a file is missing or malformed, or the tensors are not those that were
            written.
    """
    label = str(folder)
    about = read_object(
        folder / BROADCAST_FILE, label, {"round": int, "method": str, "options": dict}
    )
    adapter = read_adapter(folder)
    residual = {}
    if (folder / RESIDUAL_FILE).is_file():
        try:
            stored = TensorFile.open(folder / RESIDUAL_FILE, label, DEFAULT_BUDGET)
            residual = unpacked(stored.read(stored.tensors))
        except KeyError as error:
            raise FedcoreError(f"{label}: {RESIDUAL_FILE} lacks {error}") from error
    broadcast = BroadcastFolder(
        adapter, about["round"], about["method"], about["options"], residual
    )
    if about.get("identity") != broadcast.identity:
        raise FedcoreError(f"{label}: its tensors are not those that {BROADCAST_FILE} announces")
    return broadcast


def write_upload(
    upload: UploadFolder, layout: FactorLayout, like: AdapterState, folder: Path, *, factors: bool
) -> Path:
    """Write ``upload``, a row of ``layout``; an earlier upload in ``folder`` is replaced.

    Args:
        like: the client's adapter, for its keys and configuration.
        factors: whether the row holds factors, which go under PEFT's keys.

    Raises:
        FedcoreError: ``folder`` holds something else than an upload, or cannot be written; what
            was there before is still there.
    """
    tensors = tensors_from_row(upload.row, layout)
    with replace_folder(folder, UPLOAD_FILE) as new:
        if factors:
            keyed = {like.keys.get(name, f"{PREFIX}{name}"): t for name, t in tensors.items()}
            partial = AdapterState(
                "none",
                {},
                dense=keyed,
                config={**like.config, "inference_mode": True},
                keys={key: key for key in keyed},
            )
            write_adapter(partial, new)
        else:
            write_tensors(tensors, new / STATISTICS_FILE)
        about = {
            "round": upload.round,
            "examples": upload.examples,
            "frozen": upload.frozen,
            "started_from": upload.started_from,
            "flags": list(upload.flags),
        }
        write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", new / UPLOAD_FILE)
    return folder


def read_upload(
    folder: Path, layout: FactorLayout, like: AdapterState, *, factors: bool, round: int
) -> UploadFolder:
    """Read what a client wrote by :func:`write_upload`.

    Args:
        like: the server's adapter; a client's scalings have to be its own.
        round: the round it has to be for: another one may have other tensors.

    Raises:
        FedcoreError: it is for another round, a file is missing, a link, malformed or too large, a
            tensor is missing, unexpected or of another shape, or a module's scaling differs.
    """
    label = "its upload"
    about = read_object(folder / UPLOAD_FILE, label, _UPLOAD_FIELDS, links=False)
    if about["round"] != round:
        raise FedcoreError(f"its upload is for round {about['round']}")
    file = folder / (WEIGHTS_FILE if factors else STATISTICS_FILE)
    if not os.path.lexists(file):
        raise FedcoreError(f"{file.name} is missing")
    header = _HEADER_BYTES + _ENTRY_BYTES * len(layout.slots)
    budget = layout.size * torch.float64.itemsize + header
    stored = TensorFile.open(file, label, budget, links=False)
    check_shapes({key: tensor.shape for key, tensor in stored.tensors.items()}, layout)
    row = row_from_tensors(stored.read(stored.tensors), layout)
    if factors:
        config = read_object(folder / CONFIG_FILE, label, links=False)
        for module in layout.modules:
            _, scaling = declared_rank_and_scaling(config, module)
            if scaling != like.scaling[module]:
                raise FedcoreError(
                    f"module {module} has scaling {scaling:g}, the server's is "
                    f"{like.scaling[module]:g}"
                )
    fields = {name: about[name] for name in _UPLOAD_FIELDS}
    return UploadFolder(row, **{**fields, "flags": tuple(map(str, about["flags"]))})
