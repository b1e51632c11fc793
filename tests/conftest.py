"""Settings of every test."""

from __future__ import annotations

import os

from hypothesis import settings

from tests.processes import ONE_THREAD

# Before torch and NumPy are loaded, which read it then, and handed on to every child.
os.environ.update(ONE_THREAD)

# Examples are judged by what they compute, never by how long a busy machine takes.
settings.register_profile("fedcore", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("fedcore")
