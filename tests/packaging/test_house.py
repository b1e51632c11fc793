"""The rooms: no circles, few entries, one home for a name, and the import paths of 0.1."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from fedcore import engines

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "fedcore": ROOT / "fedcore",
    "fedcore_kernels": ROOT / "kernels/fedcore_kernels",
    "fedcore_theory": ROOT / "theory/fedcore_theory",
}
NAMED_EXCEPTION = ("fedcore.data", "fedcore.federation.state")
"""The alias of fedcore.data.ServerState, which the import contract names too."""

TWICE = {
    "aggregate": "fedcore.aggregate, and the command that calls it",
    "start": "an engine's module offers it, as transports.choice.Engine says",
    "resume": "an engine's module offers it, as transports.choice.Engine says",
}
"""Public names that stand in two rooms, and why."""


def modules() -> dict[str, Path]:
    """Module name to file, of all three packages."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            found[name] = file
    return found


def imports_of(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules that a module imports anywhere, inside functions and for types alone too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # A name may be a module of its package, or stand in the package itself.
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                targets.append(inner if inner in known else node.module)
        for target in targets:
            if target in known and target != name and (name, target) != NAMED_EXCEPTION:
                yield target


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            part = []
            while not part or part[-1] != node:
                part.append(stack.pop())
            if len(part) > 1:
                found.append(sorted(part))

    sys.setrecursionlimit(10_000)
    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def test_imports_have_no_circle() -> None:
    known = modules()
    graph = {name: set(imports_of(name, file, known)) for name, file in known.items()}
    assert circles(graph) == []


def test_a_circle_would_be_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_methods_are_sorted_into_few_rooms() -> None:
    entries = [p for p in (ROOT / "fedcore/methods").iterdir() if p.name != "__pycache__"]
    assert len(entries) <= 12, sorted(p.name for p in entries)


def public_definitions(file: Path) -> Iterator[str]:
    """Names of classes and functions that a module defines for others."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        is_definition = isinstance(node, ast.ClassDef | ast.FunctionDef)
        if is_definition and not node.name.startswith("_"):
            yield node.name


def test_a_public_name_is_defined_in_one_room() -> None:
    rooms: dict[str, set[str]] = defaultdict(set)
    for name, file in modules().items():
        if name.startswith("fedcore."):
            for public in public_definitions(file):
                rooms[public].add(name.split(".")[1])
    twice = {public: sorted(where) for public, where in rooms.items() if len(where) > 1}
    unexplained = {public: where for public, where in twice.items() if public not in TWICE}
    assert not unexplained, "defined in two rooms: make them one, or say why in TWICE"
    assert not set(TWICE) - set(twice), "no longer defined twice: take it out of TWICE"


OF_0_1 = {
    "fedcore.data": ["ServerState"],
    "fedcore.engines.compare": ["run_trials"],
    "fedcore.engines.files": ["FileServer"],
    "fedcore.engines.flower": ["FedLoRA", "from_arrays", "to_arrays"],
    "fedcore.engines.flower.app_folder": ["write_app"],
    "fedcore.engines.flower.apps": ["client_app", "configured_recipe", "server_app"],
    "fedcore.engines.flower.secure_sums": ["SecureFedLoRA", "named_tensors", "upload_arrays"],
    "fedcore.engines.local": ["start", "resume"],
    "fedcore.engines.observer": ["Observer"],
    "fedcore.engines.trials": ["check_sources"],
    "fedcore.methods": ["Broadcast", "METHODS", "create_method", "describe_methods"],
    "fedcore.methods.hadamard_combination": ["hadamard_combination"],
    "fedcore.merging": ["aggregate", "Aggregated"],
    "fedcore.privacy": ["SecureSum"],
    "fedcore.privacy.accounting": ["Spending", "epsilon"],
    "fedcore.privacy.audit": ["run_audit"],
    "fedcore.privacy.gradient_matching": ["match_gradient"],
    "fedcore.privacy.picture_quality": [],
    "fedcore.recipes": ["load_recipe"],
    "fedcore.reports.reading": ["read_run"],
    "fedcore.training.models": ["load_classifier"],
    "fedcore.training.trainer_client": ["FederatedClient"],
    "fedcore.tuners": ["GramConfig", "TriConfig", "export_lora", "apply_sb"],
    "fedcore.tuners.lora_factors": ["lora_factors"],
}
"""Import paths that stand in the pages of 0.1 or in files that it wrote; nvflare's has a test of
its own, beside the stand-in."""


@pytest.mark.parametrize("path", OF_0_1)
def test_documented_paths_of_0_1_give_the_same_objects(path: str) -> None:
    old = import_module(path)
    moved = import_module(engines.MOVED.get(path, path))
    for name in OF_0_1[path]:
        assert getattr(old, name) is getattr(moved, name)
    if path in engines.MOVED:
        assert old is moved


def test_every_alias_leads_somewhere() -> None:
    known = modules()
    assert set(engines.MOVED.values()) <= set(known)
    assert not set(engines.MOVED) & set(known)


def test_the_old_paths_are_lazy() -> None:
    code = (
        "import sys, fedcore, fedcore.engines\n"
        "rooms = ('fedcore.experiments', 'fedcore.transports', 'fedcore.audit')\n"
        "assert not any(name.startswith(rooms) for name in sys.modules)\n"
        "from fedcore.engines import observer\n"
        "import fedcore.experiments.observer\n"
        "assert observer is fedcore.experiments.observer\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
