"""How much of the processor others used while something was measured.

A call on several threads waits at the end of every parallel region for the thread that has to share
its core. With others on half of two cores a mean of 6 ms was seen to take 170 ms, while a call of
one region took its usual time: on a busy machine ratios are wrong as well, not times alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

TOLERATED = 0.05
"""Share of the processor used by others beyond which a measurement is not to be quoted."""


@dataclass(frozen=True)
class Usage:
    """Processor seconds so far: of everything, of everything but idling, and of this process."""

    total: float
    used: float
    own: float

    def others_until(self, later: Usage) -> float:
        """The share of the processor, 0 to 1, that others used from here to ``later``."""
        total = later.total - self.total
        others = (later.used - self.used) - (later.own - self.own)
        return min(1.0, max(0.0, others / total)) if total > 0 else 0.0


def usage(stat: Path = Path("/proc/stat"), ticks: float = 100.0) -> Usage | None:
    """The usage so far; ``None`` where the system does not report it."""
    try:
        fields = stat.read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    counts = [int(field) / ticks for field in fields]
    total, idle = sum(counts), counts[3] + counts[4]
    return Usage(total, total - idle, time.process_time())


def describe_others(before: Usage | None, after: Usage | None) -> str:
    """One sentence about the others, with a warning where they were too many."""
    if before is None or after is None:
        return "How much of the processor others used is not known."
    share = before.others_until(after)
    sentence = f"Others used {100 * share:.0f}% of the processor."
    if share <= TOLERATED:
        return sentence
    return (
        f"{sentence} NOT TO BE QUOTED: neither times nor ratios hold on a busy machine; "
        "measure again."
    )
