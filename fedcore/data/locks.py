"""Locks of the operating system, which end with the process that holds them, however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where folders cannot be locked and nothing is swept.
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
"""What a process that works in a folder locks there, for as long as it works."""


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Wait for the lock of ``folder``; False where folders cannot be locked."""
    handle = lock(folder, wait=True)
    try:
        yield handle is not None
    finally:
        unlock(handle)


def lock(path: Path, *, wait: bool) -> int | None:
    """A descriptor that locks ``path`` until it is unlocked; None where that is not possible.

    Raises:
        BlockingIOError: another process or thread has locked it, and ``wait`` is false.
    """
    if fcntl is None:
        return None
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return None
    try:
        able = lock_descriptor(handle, wait=wait)
    except BaseException:
        os.close(handle)
        raise
    if not able:
        os.close(handle)
    return handle if able else None


def lock_descriptor(handle: int, *, wait: bool) -> bool:
    """Lock what ``handle`` is open on; False where the file system has no locks.

    Raises:
        BlockingIOError: another process or thread has locked it, and ``wait`` is false.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def unlock(handle: int | None) -> None:
    """Release what :func:`lock` or :func:`lock_descriptor` locked, and close it."""
    if handle is None:
        return
    # Explicitly: a child process that was forked meanwhile shares the descriptor.
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)
