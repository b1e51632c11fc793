"""The lowest versions that pyproject.toml promises, and whether the package works on them.

``python -m tests.packaging.lowest EXTRA ...`` prints one constraint per requirement of the package
and of those extras, each pinned to its lower bound, for ``pip install --constraint``.
``python tests/packaging/lowest.py FOLDER``, in an environment that was installed by them, imports
the package, merges two adapters by ``fedcore aggregate``, and runs a tiny job by ``fedcore run``.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[(?P<extras>[^]]*)\])?(?P<bounds>[^;]*)")
_LOWEST = re.compile(r"(?:>=|==)\s*([0-9][0-9A-Za-z.]*)")


def lowest_versions(project: dict[str, Any], extras: Sequence[str]) -> dict[str, str]:
    """Package to lower bound, of a ``[project]`` table and of its ``extras``.

    Raises:
        ValueError: a requirement has no lower bound and is bounded nowhere else.
    """
    versions: dict[str, str] = {}
    for name, bounds in _requirements(project, extras):
        lowest = _LOWEST.search(bounds)
        if lowest is not None:
            versions[name] = max(versions.get(name, ""), lowest[1], key=_parts)
        elif not bounds:
            raise ValueError(f"{name} has no lower bound")
    return versions


def _requirements(project: dict[str, Any], extras: Sequence[str]) -> Iterator[tuple[str, str]]:
    optional = project["optional-dependencies"]
    for text in [*project["dependencies"], *(t for extra in extras for t in optional[extra])]:
        found = _REQUIREMENT.fullmatch(text.strip())
        assert found is not None, text
        if found["name"] == project["name"]:
            inner = [extra.strip() for extra in (found["extras"] or "").split(",")]
            yield from _requirements({**project, "dependencies": []}, inner)
        else:
            yield found["name"].lower(), found["bounds"].strip()


def _parts(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def constraints(extras: Sequence[str]) -> str:
    """``name==version`` lines."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (f"{name}=={version}" for name, version in lowest_versions(project, extras).items())
    return "\n".join(lines) + "\n"


def try_installed(folder: Path) -> None:
    """Import, aggregate and run with what is installed beside this interpreter."""
    sys.path.insert(0, str(ROOT))
    import fedcore
    from fedcore.data.peft_files import write_adapter
    from fedcore.recipes import to_toml
    from tests.experiments.jobs import tiny_recipe
    from tests.property.adapters import lora_state

    command = str(Path(sys.executable).with_name("fedcore"))
    for number in range(2):
        write_adapter(lora_state(number), folder / f"adapter-{number}")
    recipe = folder / "recipe.toml"
    settings = {"method.name": "florg", "rounds": 1, "clients": 2, "training.steps": 1}
    recipe.write_text(to_toml(tiny_recipe(folder, **settings)), encoding="utf-8")
    adapters = [str(folder / f"adapter-{number}") for number in range(2)]
    for arguments in (
        ["--help"],
        ["methods"],
        ["aggregate", *adapters, "--out", str(folder / "merged")],
        ["run", str(recipe), "--out", str(folder / "run")],
        ["run", "--resume", str(folder / "run")],
    ):
        print("fedcore", *arguments, flush=True)
        subprocess.run([command, *arguments], check=True, cwd=folder)
    for file in ("merged/adapter_model.safetensors", "run/summary.json", "run/report.html"):
        assert (folder / file).stat().st_size, file
    print("fedcore", fedcore.__version__, "works on the lowest versions")


if __name__ == "__main__":
    if len(sys.argv) == 2 and Path(sys.argv[1]).is_dir():
        try_installed(Path(sys.argv[1]).resolve())
    else:
        print(constraints(sys.argv[1:]), end="")
