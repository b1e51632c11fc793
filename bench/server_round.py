"""Time a server round on the CPU and print one table: ``python -m bench.server_round``.

``ratio`` is the other's time over ours. The published step is timed on a few modules and scaled to
all of them, which its row says; its cost a module does not depend on the others.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.baselines.published_florg import published_florg
from bench.workloads import LLAMA_2_7B, ROBERTA_LARGE, Workload
from fedcore_kernels import chosen_backend, florg_round, weighted_mean


@dataclass(frozen=True)
class Row:
    """One measurement; ``bytes`` is what the operation must read and write at least."""

    op: str
    shape: str
    backend: str
    against: str
    seconds: float
    ratio: float
    bytes: int
    peak_bytes: float


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median wall time of ``call`` after one call to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_bytes(call: Callable[[], object]) -> float:
    """Memory that ``call`` takes beyond what is resident before it; NaN where Linux is missing."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def read(field: str) -> int:
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

    try:
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
        before = read("VmRSS")
        result = call()
        peak = read("VmHWM")
    except (OSError, AttributeError, StopIteration):
        return math.nan
    del result
    return float(max(0, peak - before))


def published_seconds(workload: Workload, modules: int) -> float:
    """Seconds of the published step for all modules, from a few of them."""
    updates, weights, previous = workload.data()
    (group,) = workload.layout.groups
    stack, before = group.view(updates), group.view(previous)
    start = time.perf_counter()
    for module in range(modules):
        published_florg(stack[:, module], weights, before[module])
    return (time.perf_counter() - start) / modules * workload.modules


def measure(workload: Workload, repeats: int, published_modules: int) -> list[Row]:
    """The mean against a matrix product; FLoRG against the published step and the mean."""
    updates, weights, previous = workload.data()
    layout = workload.layout
    shares = weights / weights.sum()
    moved = updates.nbytes + previous.nbytes
    calls: dict[str, Callable[[], object]] = {
        "weighted_mean": lambda: weighted_mean(updates, weights),
        "florg_round sketched": lambda: florg_round(updates, weights, previous, layout, "sketched"),
        "florg_round truncated": lambda: florg_round(updates, weights, previous, layout),
    }
    # Peaks first: later the allocator holds on to what earlier calls gave back.
    peaks = {name: peak_bytes(call) for name, call in calls.items()}
    seconds = {name: median_seconds(call, repeats) for name, call in calls.items()}
    published = f"published step ({published_modules} of {workload.modules} modules timed)"
    others = {
        "weights @ updates": median_seconds(lambda: shares @ updates, repeats),
        "weighted_mean": seconds["weighted_mean"],
        published: published_seconds(workload, published_modules),
    }
    pairs = [
        ("weighted_mean", "weights @ updates"),
        ("florg_round sketched", "weighted_mean"),
        ("florg_round sketched", published),
        ("florg_round truncated", published),
    ]
    return [
        Row(
            op,
            workload.shape,
            chosen_backend("weighted_mean", updates),
            against,
            seconds[op],
            others[against] / seconds[op],
            moved + (0 if op == "weighted_mean" else previous.nbytes),
            peaks[op],
        )
        for op, against in pairs
    ]


def table(rows: list[Row]) -> str:
    """The rows as a markdown table."""
    head = "| op | shape | backend | against | ms | ratio | MB moved | peak MB |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    lines += [
        f"| {row.op} | {row.shape} | {row.backend} | {row.against} | {1e3 * row.seconds:.2f} "
        f"| {row.ratio:.3g} | {row.bytes / 1e6:.1f} | {row.peak_bytes / 1e6:.1f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write the rows as JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.server_round", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="timed calls an operation")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--small", action="store_true", help="only the smaller model")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    rows = measure(ROBERTA_LARGE, chosen.repeats, published_modules=3)
    if not chosen.small:
        rows += measure(LLAMA_2_7B, chosen.repeats, published_modules=1)
    print(f"torch {torch.__version__}, {chosen.threads} threads, fp32 uploads\n")
    print(table(rows))
    print("\nratio: the other's time over ours. peak: beyond uploads and previous row.")
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
