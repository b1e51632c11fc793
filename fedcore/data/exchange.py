"""What a server and its clients hand each other as folders.

A *broadcast* is a PEFT folder with the global adapter and ``broadcast.json``; where the method
updates base weights, ``residual.safetensors`` lies beside them, and where the server knows the base
model, ``base.json``. An *upload* holds what a client sends and no more, with ``upload.json``:
factors under their PEFT keys and the adapter's configuration, or ``statistics.safetensors`` where a
method sends something else than factors.
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

from fedcore.data.adapter_kind import config_problem, kind_of
from fedcore.data.adapter_state import AdapterState
from fedcore.data.announcement import (
    Announcement,
    broadcast_identity,
    fixed_tensors,
    scalings_of,
)
from fedcore.data.base_identity import BASE_FILE, BaseIdentity
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
        base: the base model that clients have to hold; None where it is not known.
        allow: parts of it that may differ.
        total_rounds: of the federation; None where the server does not know it.
    """

    adapter: AdapterState
    round: int
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    residual: Mapping[str, LowRank] = field(default_factory=dict)
    base: BaseIdentity | None = None
    allow: tuple[str, ...] = ()
    total_rounds: int | None = None

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
        return broadcast_identity(self.row, self.layout, self.adapter.constants, self.residual)

    @property
    def announcement(self) -> Announcement:
        """What its clients' uploads have to repeat."""
        return Announcement(
            self.round,
            self.identity,
            kind_of(self.adapter.config),
            self.adapter.scaling,
            self.base,
            self.allow,
            self.total_rounds,
        )

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
        kind, scaling, base: of its adapter and its base model, as :class:`Announcement` has them.
    """

    row: Tensor
    round: int
    examples: float
    frozen: str
    started_from: str
    flags: tuple[str, ...] = ()
    kind: Mapping[str, Any] = field(default_factory=dict)
    scaling: Mapping[str, float] = field(default_factory=dict)
    base: BaseIdentity | None = None

    @classmethod
    def of(
        cls, said: Announcement, row: Tensor, examples: float, frozen: str, flags: tuple[str, ...]
    ) -> UploadFolder:
        """The upload that says ``said``."""
        about = (said.kind, said.scaling, said.base)
        return cls(row, said.round, examples, frozen, said.broadcast, flags, *about)

    @property
    def said(self) -> Announcement:
        """What it repeats of its broadcast."""
        return Announcement(self.round, self.started_from, self.kind, self.scaling, self.base)


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
        } | _about_base(broadcast.base, new)
        if broadcast.allow:
            about["allow"] = list(broadcast.allow)
        if broadcast.total_rounds is not None:
            about["total_rounds"] = broadcast.total_rounds
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
    said = Announcement.from_json(about, label)
    broadcast = BroadcastFolder(
        adapter,
        about["round"],
        about["method"],
        about["options"],
        residual,
        _read_base(said.base, folder, label),
        said.allow,
        said.total_rounds,
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
        } | _about_base(upload.base, new)
        for name in ("kind", "scaling"):
            if value := getattr(upload, name):
                about[name] = dict(value)
        write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", new / UPLOAD_FILE)
    return folder


def read_upload(
    folder: Path, layout: FactorLayout, like: AdapterState, *, factors: bool, round: int
) -> UploadFolder:
    """Read what a client wrote by :func:`write_upload`.

    Args:
        like: the server's adapter.
        round: the round it has to be for: another one may have other tensors.

    Raises:
        FedcoreError: it is for another round, a file is missing, a link, malformed or too large, or
            a tensor is missing, unexpected or of another shape.
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
    said = Announcement.from_json(about, label)
    # Version 0.1 said neither.
    kind, scaling = said.kind or kind_of(like.config), said.scaling or like.scaling
    if factors:
        # What PEFT reads counts.
        config = read_object(folder / CONFIG_FILE, label, links=False)
        problem = config_problem(config)
        if problem:
            raise FedcoreError(problem)
        kind, scaling = kind_of(config), scalings_of(config, like.scaling)
    fields = {name: about[name] for name in _UPLOAD_FIELDS}
    fields["flags"] = tuple(map(str, about["flags"]))
    base = _read_base(said.base, folder, label)
    return UploadFolder(row, **fields, kind=kind, scaling=scaling, base=base)


def _about_base(base: BaseIdentity | None, folder: Path) -> dict[str, Any]:
    """What the JSON file of ``folder`` says of ``base``, whose entries have a file of their own."""
    if base is None:
        return {}
    if base.entries:
        base.save(folder)
    return {"base": base.brief.to_json()}


def _read_base(named: BaseIdentity | None, folder: Path, label: str) -> BaseIdentity | None:
    """The base that the JSON file of ``folder`` names, with its entries where they are there."""
    whole = BaseIdentity.read(folder, label)
    if whole is None:
        return named
    if named != whole.brief:
        raise FedcoreError(f"{label}: {BASE_FILE} is not of the base that is named beside it")
    return whole
