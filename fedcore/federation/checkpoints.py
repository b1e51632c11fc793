"""Which of the states in a folder a federation continues from, and the next one beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from fedcore.errors import FedcoreError
from fedcore.federation.seals import SEAL
from fedcore.federation.state import (
    RESUMABLE_STATES,
    ServerState,
    prune_clients,
    read_about,
    read_state,
    round_of,
    state_folders,
    write_state,
)


def begin(folder: Path | None, resume: bool, fresh: ServerState) -> ServerState:
    """The state to continue from: the newest in ``folder``, else ``fresh``, which is then written.

    Raises:
        FedcoreError: there are states and ``resume`` is false, there is no folder to resume from,
            or the newest state is damaged, or of another adapter.
    """
    if folder is None:
        if resume:
            raise FedcoreError("resume needs checkpoint_dir, the folder to resume from")
        return fresh
    if state_folders(folder) and not resume:
        raise FedcoreError(f"{folder} holds states already; pass resume=True or another folder")
    state = newest_or(fresh, folder)
    if state is fresh:
        save(fresh, folder)
    return state


def newest_or(fresh: ServerState, folder: Path | None) -> ServerState:
    """The newest state in ``folder``; ``fresh`` where there is none.

    Raises:
        FedcoreError: the state is damaged, or of another adapter than ``fresh``.
    """
    if folder is None:
        return fresh
    with offering_newest_good(folder, lambda round: f"delete the later ones in {folder}"):
        state = read_newest(folder)
    if state is None:
        return fresh
    if state.layout != fresh.layout:
        raise FedcoreError(
            f"the newest state in {folder} is of another adapter than the one that the run starts "
            "from; pass that adapter or another folder"
        )
    return state


def read_newest(folder: Path) -> ServerState | None:
    """The newest state below ``folder``; None where there is none.

    Raises:
        FedcoreError: it is damaged, or was and is gone.
    """
    states = state_folders(folder)
    _check_complete(folder, states)
    return read_state(states[max(states)]) if states else None


@contextmanager
def offering_newest_good(folder: Path, offer: Callable[[int], str]) -> Iterator[None]:
    """Errors inside also say which of the states in ``folder`` one can continue from.

    Args:
        offer: from that state's round to what a user does to continue from it.

    Raises:
        FedcoreError: in place of one without the offer.
    """
    try:
        yield
    except FedcoreError as error:
        good = newest_good(state_folders(folder))
        if good is None:
            raise
        message = f"{error}; the newest good state is that of round {good}: {offer(good)}"
        raise FedcoreError(message) from error


def newest_good(states: Mapping[int, Path]) -> int | None:
    """The latest of ``states``, round to folder, that can be continued from; None of none.

    The records before it are good, too: what ``state.json`` says in all earlier states.
    """
    recorded: list[int] = []
    for round, path in states.items():
        if recorded and round != recorded[-1] + 1:
            break
        try:
            read_about(path)
        except FedcoreError:
            break
        recorded.append(round)
    for round in reversed(recorded):
        try:
            read_state(states[round])
        except FedcoreError:
            continue
        return round
    return None


def _check_complete(folder: Path, states: Mapping[int, Path]) -> None:
    """Refuse states of which something is gone that was there.

    A state appears whole, so no folder can lack its ``state.json``; and once one is sealed, those
    after it are.
    """
    latest = max(states, default=-1)
    for path in folder.glob("round-*"):
        round = round_of(path)
        if round is None or round <= latest or not path.is_dir():
            continue
        if any(path.iterdir()):
            raise FedcoreError(f"cannot read the state in {path}: state.json is missing")
    for before, after in pairwise(list(states.values())[-2:]):
        if SEAL in read_about(before) and SEAL not in read_about(after):
            raise FedcoreError(f"cannot read the state in {after}: state.json has lost its hashes")


def save(state: ServerState, folder: Path | None) -> None:
    """Write ``state``, whole or not at all; a folder of None keeps nothing.

    Raises:
        FedcoreError: it cannot be written, or the folder holds a state of this round or a later
            one, which is of another process.
    """
    if folder is not None:
        check_newest(state.round - 1, folder)
        write_state(state, folder)
        prune_clients(folder, RESUMABLE_STATES)


def check_newest(round: int, folder: Path) -> None:
    """Refuse to continue after ``round`` in a folder that holds later states already.

    Raises:
        FedcoreError: naming the latest.
    """
    latest = max(state_folders(folder), default=round)
    if latest > round:
        raise FedcoreError(
            f"{folder} holds the state of round {latest} already, which something else has "
            "written: resume from it, or pass another folder"
        )
