"""What a damaged input may cost at most: computing time of this process, and memory."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SECONDS = 5.0
"""Of this process alone: a busy machine takes nothing of them."""

_STATUS, _PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _resident(which: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(which))


def _stop(number: int, frame: FrameType | None) -> None:
    raise AssertionError(f"it computed for {SECONDS:g} s")


@contextmanager
def bounded(input_bytes: int) -> Iterator[None]:
    """The body computes for 5 s at most, in three times the input and 64 MiB of memory.

    Memory is measured where Linux tells a process its peak.

    Raises:
        AssertionError: it did not.
    """
    measured = _PEAK.exists()
    if measured:
        _PEAK.write_text("5")
        before = _resident("VmRSS")
    old = signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, old)
    if measured:
        grown = _resident("VmHWM") - before
        allowed = 3 * input_bytes + (64 << 20)
        assert grown <= allowed, f"{grown >> 20} MiB of an input of {input_bytes} bytes"


def size_of(*places: Path) -> int:
    """Bytes of all regular files under ``places``, links left alone."""
    files = (file for place in places for file in [place, *place.rglob("*")])
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())
