"""Everything a federation needs to go on: the state between two rounds, on disk and in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcore.data.low_rank import LowRank, accumulated, packed, unpacked
from fedcore.data.peft_files import read_tensors, write_tensors, write_text
from fedcore.errors import FedcoreError
from fedcore_kernels.layout import FactorLayout

Private = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class ServerState:
    """The state after ``round`` completed rounds.

    Attributes:
        round: rounds completed, which is the index of the next one.
        layout: the layout of the global row.
        row: ``(P,)`` the global adapter and dense tensors.
        private: client id to named tensors that never leave the client (optimiser state, private
            factors); the local engine keeps them here so that a run can be resumed.
        residual: module to the low-rank update of its base weight that the rounds so far add up to.
        residual_sizes: numbers in the increment of each round that had one, by round.
        versions: slot name to the round that last changed it; clients download what is newer than
            what they hold.
        client_versions: client id to the round up to which it holds everything.
        traffic: bytes so far, by direction and category, summed over clients.
        record: what was measured in the last round.
    """

    round: int
    layout: FactorLayout
    row: Tensor
    private: Private = field(default_factory=dict)
    residual: Mapping[str, LowRank] = field(default_factory=dict)
    residual_sizes: Mapping[int, int] = field(default_factory=dict)
    versions: Mapping[str, int] = field(default_factory=dict)
    client_versions: Mapping[str, int] = field(default_factory=dict)
    traffic: Mapping[str, int] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    def stale_for(self, client_id: str) -> FactorLayout:
        """What ``client_id`` must download: the slots that changed since it last took part."""
        seen = self.client_versions.get(client_id, -2)
        names = (slot.name for slot in self.layout)
        return self.layout.part(name for name in names if self.versions.get(name, -1) > seen)

    def stale_residual(self, client_id: str) -> int:
        """Numbers that ``client_id`` must download to hold the residual: the increments that it
        missed, or the whole sum where that is smaller.
        """
        seen = self.client_versions.get(client_id, -2)
        missed = sum(size for round, size in self.residual_sizes.items() if round > seen)
        return min(missed, sum(part.numel for part in self.residual.values()))

    def advanced(
        self,
        row: Tensor,
        changed: FactorLayout,
        cohort: tuple[str, ...],
        private: Private,
        residual: Mapping[str, LowRank] | None = None,
    ) -> ServerState:
        """The state one round later: ``changed`` slots are new, ``cohort`` saw this state.

        ``residual`` is the increment of the base weights, if any.
        """
        increment = residual or {}
        size = sum(part.numel for part in increment.values())
        sizes = {**self.residual_sizes, **({self.round: size} if size else {})}
        versions = {**self.versions, **{slot.name: self.round for slot in changed}}
        seen = {**self.client_versions, **dict.fromkeys(cohort, self.round - 1)}
        return replace(
            self,
            round=self.round + 1,
            row=row,
            private=private,
            residual=accumulated(self.residual, increment),
            residual_sizes=sizes,
            versions=versions,
            client_versions=seen,
        )


def write_state(state: ServerState, folder: Path) -> Path:
    """Write ``state`` as ``folder/round-NNNN``; the folder appears whole or not at all."""
    target = folder / f"round-{state.round:04d}"
    temporary = folder / f".round-{state.round:04d}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_tensors({"row": state.row}, temporary / "server.safetensors")
    if state.residual:
        write_tensors(packed(state.residual), temporary / "residual.safetensors")
    if state.private:
        flat = {
            f"{client}/{name}": tensor
            for client, named in sorted(state.private.items())
            for name, tensor in named.items()
        }
        write_tensors(flat, temporary / "clients.safetensors")
    about = {
        "round": state.round,
        "layout": [
            [slot.module, slot.factor, slot.rows, slot.width, slot.shape] for slot in state.layout
        ],
        "has_private": bool(state.private),
        "residual_modules": sorted(state.residual),
        "residual_sizes": [[round, size] for round, size in sorted(state.residual_sizes.items())],
        "versions": dict(state.versions),
        "client_versions": dict(state.client_versions),
        "traffic": dict(state.traffic),
        "record": dict(state.record),
    }
    write_text(json.dumps(about, sort_keys=True) + "\n", temporary / "state.json")
    _sync_folder(temporary)
    # A folder left by a run that was killed after the rename is complete and equal: replace it.
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    _sync_folder(folder)
    return target


def read_state(folder: Path) -> ServerState:
    """Read what :func:`write_state` wrote.

    Raises:
        FedcoreError: a file is missing or malformed, naming it.
    """
    about_file = folder / "state.json"
    try:
        about = json.loads(about_file.read_text(encoding="utf-8"))
        layout = FactorLayout.build(
            [(m, f, rows, width) for m, f, rows, width, shape in about["layout"] if shape is None],
            [(m, tuple(shape)) for m, _, _, _, shape in about["layout"] if shape is not None],
        )
        row = read_tensors(folder / "server.safetensors", "state")["row"]
        private: dict[str, dict[str, Tensor]] = {}
        if about["has_private"]:
            for key, tensor in read_tensors(folder / "clients.safetensors", "state").items():
                client, _, name = key.partition("/")
                private.setdefault(client, {})[name] = tensor
        # States of runs without one were written before there was a residual.
        residual_modules = about.get("residual_modules", [])
        parts = read_tensors(folder / "residual.safetensors", "state") if residual_modules else {}
        state = ServerState(
            round=about["round"],
            layout=layout,
            row=row,
            private=private,
            residual=unpacked(parts),
            residual_sizes=dict(about.get("residual_sizes", [])),
            versions=about["versions"],
            client_versions=about["client_versions"],
            traffic=about["traffic"],
            record=about["record"],
        )
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise FedcoreError(f"cannot read the state in {folder}: {error}") from error
    if row.shape != (layout.size,) or not bool(torch.isfinite(row).all()):
        raise FedcoreError(f"the state in {folder} holds a row that does not fit its layout")
    return state


def read_record_of(folder: Path) -> Mapping[str, Any]:
    """What was measured in the last round of the state in ``folder``, without its tensors.

    Raises:
        FedcoreError: the file is missing or malformed, naming it.
    """
    file = folder / "state.json"
    try:
        record: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))["record"]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise FedcoreError(f"cannot read the record in {file}: {error}") from error
    return record


def latest_state(folder: Path) -> Path | None:
    """The newest complete state below ``folder``, if any."""
    found = sorted(path for path in folder.glob("round-*") if (path / "state.json").is_file())
    return found[-1] if found else None


def prune_private(folder: Path, keep: int) -> None:
    """Delete the clients' private tensors of all but the newest ``keep`` states.

    The global row of every round stays; only the newest states can be resumed from.
    """
    for path in sorted(folder.glob("round-*"))[:-keep]:
        (path / "clients.safetensors").unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
