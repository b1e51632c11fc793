"""The memory a call takes beyond what is held before it."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from bench.timing import Call


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Peak memory of ``call`` on ``device`` beyond what is resident before it, result included.

    On the CPU it is the resident set that counts, in pages; ``None`` where the system does not
    report it. Memory that an earlier call returned to the allocator but not to the system hides a
    peak, so measure before anything is timed.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        resident = _status("VmRSS")
        result = call()
        peak = _status("VmHWM")
    except (OSError, AttributeError, StopIteration):
        return None
    del result
    return max(0, peak - resident)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
