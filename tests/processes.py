"""The threads of this process and of every process that a test starts.

Sums are added in another order on several threads, so a test that compares bits needs one number
of them everywhere, whatever the processor; small problems are faster on one.
"""

from __future__ import annotations


def thread_limits(count: int) -> dict[str, str]:
    """Environment variables that hold torch and NumPy's BLAS to ``count`` threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    # A thread that waits and spins takes the core that another one needs.
    return {**dict.fromkeys(names, str(count)), "OMP_WAIT_POLICY": "PASSIVE"}


ONE_THREAD = thread_limits(1)
"""Set for all tests by their conftest; named again by those that pass on nothing else of it."""
