"""The command line as a reader has it: installed, or stood in for by the working tree."""

from __future__ import annotations

import os
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

from tests.docs.pages import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

_FOLDERS = (ROOT, ROOT / "kernels", ROOT / "theory")
_SCRIPTS = Path(sys.executable).parent


def stand_in(folder: Path) -> Path:
    """A folder that holds what an installation adds: metadata with its entry points."""
    about = folder / "fedcore_lora-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: fedcore-lora\nVersion: 0\n")
    lines = []
    for group, points in PYPROJECT["project"]["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def installed() -> bool:
    """Whether the command and the commands that others add to it are installed."""
    return (_SCRIPTS / "fedcore").exists() and bool(entry_points(group="fedcore.commands"))


def environment(folder: Path) -> dict[str, str]:
    """What a shell needs to find ``fedcore``; nothing is downloaded and nothing is coloured.

    Args:
        folder: where a stand-in may be written.
    """
    search, modules = [str(_SCRIPTS), os.environ["PATH"]], []
    if not installed():
        command = folder / "bin" / "fedcore"
        command.parent.mkdir(parents=True)
        code = "import sys; from fedcore.cli import main; sys.argv[0] = 'fedcore'; main()"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
        command.chmod(0o755)
        search.insert(0, str(command.parent))
        modules = [str(stand_in(folder / "site")), *map(str, _FOLDERS)]
        modules += filter(None, [os.environ.get("PYTHONPATH")])
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("PYTEST")},
        "PATH": os.pathsep.join(search),
        "PYTHONPATH": os.pathsep.join(modules),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
        "COLUMNS": "100",
        "TERM": "dumb",
        "NO_COLOR": "1",
    }
