"""Where a run happened: versions, machine, commit, memory."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from fedcore.federation.records import Environment
from fedcore.recipes import Recipe

_PACKAGES = ("fedcore-lora", "torch", "transformers", "peft", "safetensors", "numpy")


@contextmanager
def recipe_threads(recipe: Recipe) -> Iterator[None]:
    """Compute on ``training.threads`` threads inside, where the recipe sets them.

    They are torch's and those of the BLAS of NumPy and SciPy. Both belong to the whole process, so
    the numbers from before are put back at the end.
    """
    threads, before = recipe.training.threads, torch.get_num_threads()
    if threads is None:
        yield
        return
    with threadpool_limits(threads, user_api="blas"):
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def describe_environment() -> Environment:
    """What results may depend on."""
    cuda = torch.cuda.is_available()
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        machine=platform.machine(),
        cpus=os.cpu_count(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if cuda else None,
        git_commit=git_commit(),
        versions={name: version for name in _PACKAGES if (version := _version(name))},
    )


def git_commit() -> str | None:
    """The commit of the checkout the package runs from, with ``+`` if it was changed; else None."""
    folder = Path(__file__).resolve().parent
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        inside = _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        dirty = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}{'+' * bool(dirty)}" if inside else None


def peak_memory_bytes() -> int:
    """The process's peak resident memory so far, plus the accelerator's peak allocation."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in kibibytes, macOS in bytes.
    peak *= 1 if sys.platform == "darwin" else 1024
    return peak + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
