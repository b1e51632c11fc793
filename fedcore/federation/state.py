"""Everything a federation needs to continue: the state between rounds, on disk and in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
from torch import Tensor

from fedcore.data.folders import OWN_LIMIT, delete_file, read_object, replace_folder, write_text
from fedcore.data.low_rank import LowRank, accumulated, packed, unpacked
from fedcore.data.peft_files import read_tensors, write_tensors
from fedcore.errors import FedcoreError
from fedcore.federation.seals import ORIGIN, SEAL, check_files, check_seal, sealed
from fedcore_kernels.layout import FactorLayout

PerClient = Mapping[str, Mapping[str, Tensor]]
"""Client id to named tensors."""

RESUMABLE_STATES = 2
"""The newest states keep what clients hold, and only they can be resumed from."""

CLIENTS_FILE = "clients.safetensors"

_NAME = re.compile(r"round-([0-9]+)")

HELD = "held"
"""What a client of lower rank started its last round from, ``(P,)``."""

PERSONAL_PREFIX, TOLD_PREFIX = "personal:", "told:"
"""Rows of a client's own that it has not received yet, and what it sent of its data once."""

_FIELDS = {
    "round": int,
    "layout": list,
    "has_private": bool,
    "versions": dict,
    "client_versions": dict,
    "traffic": dict,
    "record": dict,
}


@dataclass(frozen=True)
class ServerState:
    """The state after ``round`` completed rounds.

    Attributes:
        round: rounds completed, which is the index of the next one.
        layout: the layout of the global row.
        row: ``(P,)`` the global adapter and dense tensors.
        simulated_clients: what clients that this process simulates keep to themselves (optimiser
            state, factors of their own), so that a run can be resumed; empty in a deployment.
        held_for_clients: what the server holds for a client: the start of its last round where its
            rank is lower (:data:`HELD`), values of its own that wait for it, what it sent of its
            data.
        residual: module to the low-rank update of its base weight that the rounds so far add up to.
        residual_sizes: numbers in the increment of each round that had one, by round.
        versions: slot name to the round that last changed it; clients download what is newer than
            what they hold.
        client_versions: client id to the round up to which it holds everything.
        traffic: bytes so far, by direction and category, summed over clients.
        record: what was measured in the last round.
        origin: hashes of what the run began from, by kind; empty where nothing is known of it.
        agreed: what clients say of their adapters and base, as JSON, where the server does not know
            it and compares them with each other.
        repeating: clients whose uploads repeat what their broadcast announced.
    """

    round: int
    layout: FactorLayout
    row: Tensor
    simulated_clients: PerClient = field(default_factory=dict)
    held_for_clients: PerClient = field(default_factory=dict)
    residual: Mapping[str, LowRank] = field(default_factory=dict)
    residual_sizes: Mapping[int, int] = field(default_factory=dict)
    versions: Mapping[str, int] = field(default_factory=dict)
    client_versions: Mapping[str, int] = field(default_factory=dict)
    traffic: Mapping[str, int] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)
    agreed: Mapping[str, Any] = field(default_factory=dict)
    repeating: tuple[str, ...] = ()

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
        *,
        reported: Sequence[str] = (),
        silent: Sequence[str] = (),
        residual: Mapping[str, LowRank] | None = None,
        held_for_clients: PerClient | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> ServerState:
        """The state one round later.

        Args:
            row: ``(P,)`` the next global row.
            changed: its slots that are new.
            reported: clients that replied, so they hold the state that this round started from.
            silent: clients that took part and did not reply: what they hold is unknown, so they
                download everything the next time.
            residual: the increment of the base weights, if any.
            held_for_clients: in place of what the server held so far.
            record: what was measured in the round.
        """
        increment = residual or {}
        size = sum(part.numel for part in increment.values())
        sizes = {**self.residual_sizes, **({self.round: size} if size else {})}
        versions = {**self.versions, **{slot.name: self.round for slot in changed}}
        seen = {client: v for client, v in self.client_versions.items() if client not in silent}
        seen |= dict.fromkeys(reported, self.round - 1)
        return replace(
            self,
            round=self.round + 1,
            row=row,
            held_for_clients=(
                self.held_for_clients if held_for_clients is None else held_for_clients
            ),
            residual=accumulated(self.residual, increment),
            residual_sizes=sizes,
            versions=versions,
            client_versions=seen,
            record=self.record if record is None else record,
        )


def statistics_of(state: ServerState, client: str) -> dict[str, Tensor]:
    """What ``client`` sent of its data in an earlier round, by name."""
    return _with_prefix(state, client, TOLD_PREFIX)


def personal_of(state: ServerState, client: str) -> dict[str, Tensor]:
    """Values of its own that wait for ``client``, by the names that its transport gave them."""
    return _with_prefix(state, client, PERSONAL_PREFIX)


def _with_prefix(state: ServerState, client: str, prefix: str) -> dict[str, Tensor]:
    tensors = state.held_for_clients.get(client, {})
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def write_state(state: ServerState, folder: Path) -> Path:
    """Write ``state`` as ``folder/round-NNNN``; the folder appears whole or not at all.

    Raises:
        FedcoreError: it cannot be written; what was there before is still there.
    """
    target = folder / f"round-{state.round:04d}"
    # A run that was killed after its last write and resumed writes an equal state again.
    with replace_folder(target) as new:
        write_tensors({"row": state.row}, new / "server.safetensors")
        if state.residual:
            write_tensors(packed(state.residual), new / "residual.safetensors")
        clients = _by_client(state)
        if clients:
            flat = {
                f"{_escaped(client)}/{name}": tensor
                for client, named in sorted(clients.items())
                for name, tensor in named.items()
            }
            write_tensors(flat, new / CLIENTS_FILE)
        about = sealed(_about(state), new)
        write_text(json.dumps(about, sort_keys=True) + "\n", new / "state.json")
    return target


def _about(state: ServerState) -> dict[str, Any]:
    """What ``state.json`` says."""
    about = {
        "round": state.round,
        "layout": [
            [slot.module, slot.factor, slot.rows, slot.width, slot.shape] for slot in state.layout
        ],
        "has_private": bool(state.simulated_clients or state.held_for_clients),
        "residual_modules": sorted(state.residual),
        "residual_sizes": [[round, size] for round, size in sorted(state.residual_sizes.items())],
        "versions": dict(state.versions),
        "client_versions": dict(state.client_versions),
        "traffic": dict(state.traffic),
        "record": dict(state.record),
        ORIGIN: dict(state.origin),
    }
    # Where no message carries announcements there is nothing to remember of them.
    if state.agreed:
        about["agreed"] = dict(state.agreed)
    if state.repeating:
        about["repeating"] = list(state.repeating)
    return about


def read_about(folder: Path) -> dict[str, Any]:
    """What ``state.json`` of a state says, its record among it.

    Raises:
        FedcoreError: it is missing, malformed, not what was written, or of another round than the
            folder's name says.
    """
    file = folder / "state.json"
    try:
        # A loss that diverged is a measured value: it may be NaN.
        about = read_object(file, "state.json", _FIELDS, limit=OWN_LIMIT, finite=False)
        check_seal(about)
        if round_of(folder) not in (None, about["round"]):
            raise FedcoreError(f"state.json is of round {about['round']}: it was exchanged")
    except FedcoreError as error:
        raise FedcoreError(f"cannot read the state in {folder}: {error}") from None
    return about


def read_state(folder: Path, *, clients: bool = True) -> ServerState:
    """Read what :func:`write_state` wrote.

    Args:
        clients: read what is held by client, too, which only the newest states have; a state read
            without it shows the global adapter and cannot be continued.

    Raises:
        FedcoreError: a file is missing, malformed, or not the one that was written, naming it.
    """
    about = read_about(folder)
    by_client = clients and about["has_private"]
    try:
        if by_client and not (folder / CLIENTS_FILE).is_file():
            raise FedcoreError(
                f"{CLIENTS_FILE} is missing, which only the newest {RESUMABLE_STATES} states keep"
            )
        if SEAL in about:
            check_files(about, folder, without=None if by_client else CLIENTS_FILE)
        layout = FactorLayout.build(
            [(m, f, rows, width) for m, f, rows, width, shape in about["layout"] if shape is None],
            [(m, tuple(shape)) for m, _, _, _, shape in about["layout"] if shape is not None],
        )
        row = read_tensors(folder / "server.safetensors", "state")["row"]
        simulated: dict[str, dict[str, Tensor]] = {}
        held_for_clients: dict[str, dict[str, Tensor]] = {}
        if by_client:
            for key, tensor in read_tensors(folder / CLIENTS_FILE, "state").items():
                stored, _, name = key.partition("/")
                client = unquote(stored)
                part = held_for_clients if _is_held(name) else simulated
                part.setdefault(client, {})[name] = tensor
        # States of runs without one were written before there was a residual.
        residual_modules = about.get("residual_modules", [])
        parts = read_tensors(folder / "residual.safetensors", "state") if residual_modules else {}
        state = ServerState(
            round=about["round"],
            layout=layout,
            row=row,
            simulated_clients=simulated,
            held_for_clients=held_for_clients,
            residual=unpacked(parts),
            residual_sizes=dict(about.get("residual_sizes", [])),
            versions=about["versions"],
            client_versions=about["client_versions"],
            traffic=about["traffic"],
            record=about["record"],
            origin=about.get(ORIGIN, {}),
            agreed=dict(about.get("agreed", {})),
            repeating=tuple(about.get("repeating", ())),
        )
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise FedcoreError(f"cannot read the state in {folder}: {error}") from error
    if row.shape != (layout.size,) or not bool(torch.isfinite(row).all()):
        raise FedcoreError(f"the state in {folder} holds a row that does not fit its layout")
    return state


def round_of(folder: Path) -> int | None:
    """The round that a state's folder is named after; None where it is not named so."""
    named = _NAME.fullmatch(folder.name)
    return int(named[1]) if named else None


def state_folders(folder: Path) -> dict[int, Path]:
    """Round to folder of every complete state below ``folder``, in order of the rounds."""
    numbered = ((round_of(path), path) for path in folder.glob("round-*"))
    return {
        round: path
        for round, path in sorted((r, p) for r, p in numbered if r is not None)
        if (path / "state.json").is_file()
    }


def latest_state(folder: Path) -> Path | None:
    """The newest complete state below ``folder``, if any."""
    return next(reversed(state_folders(folder).values()), None)


def prune_clients(folder: Path, keep: int) -> None:
    """Delete the clients' tensors of all but the newest ``keep`` states.

    The global row of every round stays; only the newest states can be resumed from.
    """
    for path in list(state_folders(folder).values())[:-keep]:
        file = path / CLIENTS_FILE
        # Nobody reads it again: what somebody else put in its place must not end a run.
        if file.is_symlink() or not file.is_dir():
            delete_file(file)


def _by_client(state: ServerState) -> dict[str, dict[str, Tensor]]:
    """Both kinds of tensors by client, as one file holds them: their names tell them apart."""
    clients = {client: dict(named) for client, named in state.simulated_clients.items()}
    for client, named in state.held_for_clients.items():
        clients.setdefault(client, {}).update(named)
    return clients


def _escaped(client: str) -> str:
    """A client's id without slashes, of which the first in a key ends it."""
    return client.replace("%", "%25").replace("/", "%2F")


def _is_held(name: str) -> bool:
    return name == HELD or name.startswith((PERSONAL_PREFIX, TOLD_PREFIX))
