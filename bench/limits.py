"""What the machine can do at most: the roofs under which an operation is judged.

Measured in the same run as the operations, with the same clock, so that a percentage of them means
the same on a busy machine as on a quiet one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.timing import Clock, cache_bytes, take_turns

# The copied buffer in last-level caches: large enough that none of it is left from the last repeat.
_CACHES = 4
_CPU_SIDE, _CUDA_SIDE = 1536, 8192


@dataclass(frozen=True)
class Limits:
    """Bytes and floating-point operations per second.

    Attributes:
        copy: of ``target.copy_(source)``, bytes read and bytes written both counted.
        read: of :func:`plain_read`.
        flops: of the fastest large square matrix product, by the dtype it is computed in.
    """

    copy: float
    read: float
    flops: dict[str, float]


def plain_read(values: Tensor) -> Tensor:
    """The largest 32-bit word of ``values``: one pass over its bytes and nothing else.

    Words are compared as integers, since subnormal numbers would slow floating-point sums down.
    """
    return values.view(torch.int32).amax()


def measure_limits(device: torch.device, clock: Clock, repeats: int) -> Limits:
    """Copy and read bandwidth of memory, and the peaks of fp32 and fp64 matrix products."""
    source = torch.ones(_CACHES * cache_bytes(device) // 4, device=device)
    target = torch.empty_like(source)
    side = _CUDA_SIDE if device.type == "cuda" else _CPU_SIDE
    single = torch.ones(side, side, device=device)
    double = single.double()
    timings = take_turns(
        {
            "copy": lambda: target.copy_(source),
            "read": lambda: plain_read(source),
            "float32": lambda: single @ single,
            "float64": lambda: double @ double,
        },
        clock,
        repeats,
    )
    seconds = {name: timing.seconds for name, timing in timings.items()}
    return Limits(
        copy=2 * source.nbytes / seconds["copy"],
        read=source.nbytes / seconds["read"],
        # A roof is what can be reached, so it is the fastest run that counts and not the median.
        flops={name: 2 * side**3 / min(timings[name].times) for name in ("float32", "float64")},
    )
