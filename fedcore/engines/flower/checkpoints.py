"""The states that a strategy leaves on disk, one a round."""

from __future__ import annotations

from pathlib import Path

from fedcore.data.server_state import (
    ServerState,
    latest_state,
    prune_private,
    read_state,
    write_state,
)
from fedcore.errors import FedcoreError

_RESUMABLE_STATES = 2


def begin(folder: Path | None, resume: bool, fresh: ServerState) -> ServerState:
    """The state to go on from: the newest in ``folder``, else ``fresh``, which is then written.

    Raises:
        FedcoreError: there are states and ``resume`` was not asked for, there is no folder to
            resume from, or the states are of another adapter.
    """
    if folder is None:
        if resume:
            raise FedcoreError("resume needs checkpoint_dir, the folder to resume from")
        return fresh
    newest = latest_state(folder)
    if newest is None:
        save(fresh, folder)
        return fresh
    if not resume:
        raise FedcoreError(f"{folder} holds states already; pass resume=True or another folder")
    found = read_state(newest)
    if found.layout != fresh.layout:
        raise FedcoreError(f"the state in {newest} is of another adapter than initial_arrays")
    return found


def save(state: ServerState, folder: Path | None) -> None:
    """Write ``state``, whole or not at all; a folder of None keeps nothing."""
    if folder is not None:
        write_state(state, folder)
        prune_private(folder, _RESUMABLE_STATES)
