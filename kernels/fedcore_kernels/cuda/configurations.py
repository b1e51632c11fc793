"""Block sizes and warps of the kernels, read from one data file per architecture.

``configurations/sm_90.json`` maps a kernel's name to its settings; a setting may depend on the bits
of the uploads and on the rank, in that order. Values in the files were chosen from compiled code
(registers, spills, shared memory) and belong to a card, not to a result: no setting changes what an
operation means.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import resources
from typing import Any

import torch

KNOWN = (80, 90, 100)
"""Architectures with a file of their own; others take the nearest older one."""

_forced: ContextVar[int | None] = ContextVar("fedcore_kernels_architecture", default=None)


@contextmanager
def for_architecture(architecture: int) -> Iterator[None]:
    """Use the settings of ``architecture`` inside the block, whatever card is there."""
    token = _forced.set(architecture)
    try:
        yield
    finally:
        _forced.reset(token)


def architecture(device: torch.device) -> int:
    """The architecture whose settings a launch on ``device`` takes."""
    forced = _forced.get()
    if forced is not None:
        return forced
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max((known for known in KNOWN if known <= 10 * major + minor), default=KNOWN[0])


@cache
def _table(arch: int) -> dict[str, Any]:
    file = resources.files("fedcore_kernels.cuda") / "configurations" / f"sm_{arch}.json"
    settings: dict[str, Any] = json.loads(file.read_text())
    return settings


def configuration(kernel: str, device: torch.device, *keys: int) -> dict[str, int]:
    """Settings of ``kernel`` on ``device``; ``keys`` are sizes it depends on.

    A level of the file has one entry per size; the smallest entry that is not smaller than the
    key is taken, the largest where all are smaller.
    """
    level = _table(architecture(device))[kernel]
    for key in keys:
        sizes = sorted(int(size) for size in level)
        level = level[str(next((size for size in sizes if size >= key), sizes[-1]))]
    return dict(level)
