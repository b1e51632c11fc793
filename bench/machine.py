"""Where and with what the timings were taken: the lines above every table."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fedcore.experiments.environment import git_commit


def describe_machine(device: torch.device) -> str:
    """Processor or card and driver, threads, versions, commit and date, in one line."""
    if device.type == "cuda":
        parts = [torch.cuda.get_device_name(device), f"driver {_driver()}"]
        parts += [f"CUDA {torch.version.cuda}"]
    else:
        cores = "core" if os.cpu_count() == 1 else "cores"
        parts = [f"{_processor()}, {os.cpu_count()} {cores}", f"{torch.get_num_threads()} threads"]
    parts += [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    parts += [f"triton {_version('triton')}", f"numpy {_version('numpy')}"]
    commit = git_commit()
    parts += [f"commit {commit}"] if commit else []
    return "; ".join([*parts, date.today().isoformat()])


def _processor() -> str:
    """The processor's own name where Linux reports it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.split()[0]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
