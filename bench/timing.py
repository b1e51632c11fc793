"""Medians of calls that take turns: the one place where time is taken.

Every repeat runs each call once, ours and the others' in turn, so that whatever else the machine
does meets them alike. Before a call is timed, a buffer of four times the last-level cache is read:
operands come from memory, as the uploads of a round do. It is read and not written, since dirty
lines would be written back inside the timed call.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]
Clock = Callable[[Call], float]
"""Runs a call once and returns the seconds it took."""

MINIMUM = 3
"""Repeats that every call gets, however slow it is."""

PATIENCE = 2.0
"""Seconds of timed calls after which a slow call is not repeated beyond the minimum."""

_COLD_FACTOR = 4
_CPU_CACHE_BYTES = 32 << 20


@dataclass(frozen=True)
class Timing:
    """The seconds of each repeat of one call, in the order they ran."""

    times: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self.times)

    @property
    def spread(self) -> float:
        """The interquartile range; 0 for a single repeat."""
        if len(self.times) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.times, n=4, method="inclusive")
        return high - low


def take_turns(calls: Mapping[str, Call], clock: Clock, repeats: int) -> dict[str, Timing]:
    """Time every call ``repeats`` times, one after the other in each repeat, after one warm-up.

    A call whose timed runs have taken :data:`PATIENCE` seconds stops after :data:`MINIMUM` of them
    (or after ``repeats``, if that is less).
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        clock(call)
    for _ in range(repeats):
        for name, call in calls.items():
            taken = times[name]
            if len(taken) < MINIMUM or sum(taken) < PATIENCE:
                taken.append(clock(call))
    return {name: Timing(tuple(taken)) for name, taken in times.items()}


def cache_bytes(device: torch.device) -> int:
    """The size of the last-level cache; 32 MiB where the system does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(path.read_text().strip().removesuffix("K")) << 10 for path in files]
    return max(sizes, default=_CPU_CACHE_BYTES)


def cold_clock(device: torch.device) -> Clock:
    """A clock for ``device`` that evicts the cache before every call."""
    words = _COLD_FACTOR * cache_bytes(device) // 4
    buffer = torch.zeros(words, dtype=torch.int32, device=device)
    timed = _cuda_seconds if device.type == "cuda" else _cpu_seconds

    def clock(call: Call) -> float:
        buffer.amax()
        return timed(call)

    return clock


def _cpu_seconds(call: Call) -> float:
    start = time.perf_counter()
    result = call()
    stop = time.perf_counter()
    # What was computed is given back outside of the timed span.
    del result
    return stop - start


def _cuda_seconds(call: Call) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / 1e3
