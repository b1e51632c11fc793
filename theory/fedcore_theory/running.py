"""Runs checks side by side, one process per core."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from fedcore_theory.catalog import chosen_checks
from fedcore_theory.check import Check, Measured, Outcome


@dataclass(frozen=True)
class Result:
    """A check, what it measured, and how long that took in seconds."""

    check: Check[Any]
    outcome: Outcome
    seconds: float

    def row(self) -> dict[str, Any]:
        """A flat record of it; ``measured`` and ``bound`` are of what the check is about."""
        first = self.outcome.measured[0]
        return {
            "id": self.check.id,
            "claim": self.check.claim,
            "source": self.check.source,
            "verdict": self.check.verdict,
            **_numbers(first),
            "holds": self.outcome.holds,
            "samples": self.outcome.samples,
            "excludes": self.outcome.excludes,
            "also": [{**_numbers(one), "holds": one.holds} for one in self.outcome.measured[1:]],
            "seconds": self.seconds,
        }


def _numbers(one: Measured) -> dict[str, Any]:
    """What JSON can hold of them; a number that is not finite is null."""
    finite = one.value if math.isfinite(one.value) else None
    bound = list(one.bound) if isinstance(one.bound, tuple) else one.bound
    return {"what": one.what, "measured": finite, "relation": one.relation, "bound": bound}


def run_checks(
    checks: Sequence[Check[Any]],
    repetitions: int | None = None,
    *,
    processes: int | None = None,
    done: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Run shipped checks and return their results in the order of ``checks``.

    Args:
        checks: of :func:`fedcore_theory.catalog.all_checks`, by whose ids processes find them.
        repetitions: cases of each; its own number by default.
        processes: as many as there are cores by default; 1 runs all in this process.
        done: called with every result as it arrives.
    """
    workers = min(len(checks), processes or _cores())
    arriving = _here(checks, repetitions) if workers < 2 else _apart(checks, repetitions, workers)
    results = {}
    for result in arriving:
        results[result.check.id] = result
        if done is not None:
            done(result)
    return [results[check.id] for check in checks]


def _cores() -> int:
    """The cores that this process may use, where the system reports them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _here(checks: Sequence[Check[Any]], repetitions: int | None) -> Iterator[Result]:
    for check in checks:
        yield Result(check, *_run(check.id, repetitions))


def _apart(checks: Sequence[Check[Any]], repetitions: int | None, workers: int) -> Iterator[Result]:
    # A forked child would inherit torch's threads in whatever state they are.
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawned, initializer=_one_thread) as pool:
        running = {pool.submit(_run, check.id, repetitions): check for check in checks}
        try:
            for finished in as_completed(running):
                yield Result(running[finished], *finished.result())
        finally:
            pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)


def _run(name: str, repetitions: int | None) -> tuple[Outcome, float]:
    (check,) = chosen_checks([name])
    began = time.perf_counter()
    outcome = check.run(repetitions)
    return outcome, time.perf_counter() - began
