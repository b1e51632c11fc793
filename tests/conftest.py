"""Settings of every test."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import settings

from tests.processes import ONE_THREAD

# Before torch and NumPy are loaded, which read it then, and handed on to every child.
os.environ.update(ONE_THREAD)

# Examples are judged by what they compute, never by how long a busy machine takes.
settings.register_profile("fedcore", deadline=None, derandomize=True, print_blob=True)
# What `make check` tries of every property; `make test` tries all.
settings.register_profile("check", settings.get_profile("fedcore"), max_examples=8)
settings.load_profile("fedcore")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with the tiny model and texts for all tests of a process."""
    return tmp_path_factory.mktemp("home")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how long the tests of each folder took, the longest first."""
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                folder = str(Path(report.nodeid.partition("::")[0]).parent)
                seconds[folder] += report.duration
                counts[folder] += report.when == "call"
    if sum(counts.values()) > 100:
        terminalreporter.section("durations by folder, summed over processes")
        for folder in sorted(seconds, key=lambda name: -seconds[name]):
            line = f"{seconds[folder]:8.1f} s {counts[folder]:6d} tests  {folder}"
            terminalreporter.write_line(line)
