"""A program of a model's and its tests, in a process of its own with limits.

It limits what a mistake can do: an endless loop, a full memory or disk. It is not a jail: the
process reads files, opens connections and starts others. Code that may be hostile needs a
container, or a machine, in which all of fedcore runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from secrets import token_hex

from fedcore.errors import FedcoreError

CPU_SECONDS, MEMORY, FILE = 5, 512 << 20, 1 << 20
"""Limits of the process: seconds of computing, bytes of memory, bytes of a file that it writes."""

WALL_SECONDS = 10.0
"""How long it may take, waiting included."""

# Program and tests are compiled apart, so that an open string in one does not swallow the other.
_HARNESS = """
import json, os, resource, sys
cpu, memory, size, program, tests, nonce = json.load(sys.stdin)
for limit, most in (("CPU", cpu), ("AS", memory), ("FSIZE", size), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (most, most))
os_write, names = os.write, {"__name__": "__main__"}
exec(compile(program, "program", "exec"), names)
exec(compile(tests, "tests", "exec"), names)
os_write(1, nonce.encode())
"""


def passes(program: str, tests: str, seconds: float = WALL_SECONDS) -> bool:
    """Whether ``program`` runs and ``tests``, run after it in its names, raise nothing.

    They run by this Python without its packages (``-I -S``), without environment variables, in a
    session of their own and an empty folder that is deleted after. Only a number that is drawn
    anew, and printed once the tests are over, counts as success: leaving early with status 0 does
    not.

    Args:
        seconds: of waiting, after which the process and its group are killed.

    Raises:
        FedcoreError: the system has no limits of processes (Windows).
    """
    if os.name != "posix":
        raise FedcoreError("code is only run where processes have limits (Linux, macOS)")
    nonce = token_hex(16)
    request = json.dumps([CPU_SECONDS, MEMORY, FILE, program, tests, nonce])
    with tempfile.TemporaryDirectory() as folder:
        # Into a file, whose size is limited; a pipe would be read into this process.
        printed = Path(folder) / "printed"
        (Path(folder) / "work").mkdir()
        with open(printed, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _HARNESS],
                cwd=Path(folder) / "work",
                env={},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                process.communicate(request.encode(), timeout=seconds)
            except subprocess.TimeoutExpired:
                return False
            finally:
                # What it has started, too.
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return process.returncode == 0 and nonce.encode() in printed.read_bytes()
