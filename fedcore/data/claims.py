"""A folder that one process works in at a time."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedcore.data.folders import writing
from fedcore.data.locks import LOCK_FILE, lock_descriptor, unlock
from fedcore.errors import FedcoreError

_SHOWN = 80


@contextmanager
def claimed(folder: Path | None) -> Iterator[None]:
    """Work in ``folder`` alone, until the block ends or the process dies.

    The claim is a lock on ``folder/.lock``, which says whose it is and is deleted in the end. The
    operating system releases it with its process, so what a killed process leaves claims nothing;
    where a file system has no locks nobody is kept out.

    Args:
        folder: made where it is missing; None claims nothing.

    Raises:
        FedcoreError: another process or thread has claimed it, or it cannot be written.
    """
    if folder is None:
        yield
        return
    file = folder / LOCK_FILE
    with writing(file):
        folder.mkdir(parents=True, exist_ok=True)
        handle = _claim(folder, file)
    owner = os.getpid()
    try:
        yield
    finally:
        # A forked child leaves the claim to its parent.
        if os.getpid() == owner:
            with suppress(OSError):
                file.unlink()
            unlock(handle)


def _claim(folder: Path, file: Path) -> int:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            able = lock_descriptor(handle, wait=False)
            # Whoever had it may have deleted it between the two lines above.
            if not able or _is_open_on(handle, file):
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {platform.node()}\n".encode())
                return handle
        except BlockingIOError:
            owner = _owner(handle)
            os.close(handle)
            raise FedcoreError(
                f"{folder} is in use by {owner}: wait until it ends, or pass another folder"
            ) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_open_on(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _owner(handle: int) -> str:
    """What the file of a claim says, in one line that a terminal can show."""
    text = os.pread(handle, _SHOWN, 0).decode(errors="replace").strip()
    return text if text.isprintable() and text else "another process"
