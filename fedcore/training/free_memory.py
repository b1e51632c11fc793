"""How many bytes a device has left."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on ``device``: those of the accelerator, or of the machine within
    the limit of its container. None where the system does not say it.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = [free for free in (_available(_MEMINFO), _left(_CGROUP)) if free is not None]
    return min(known) if known else None


def _available(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return sizes[0] if sizes else None


def _left(cgroup: Path) -> int | None:
    """Of a container's memory; None where it has no limit."""
    try:
        limit, used = ((cgroup / f"memory.{n}").read_text().strip() for n in ("max", "current"))
        return max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return None
