from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fedcore_kernels

MODULES = sorted(module.name for module in pkgutil.iter_modules(fedcore_kernels.__path__))


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    module = importlib.import_module(f"fedcore_kernels.{name}")
    failures, _ = doctest.testmod(module)
    assert failures == 0


def test_the_example_of_the_readme() -> None:
    readme = Path(fedcore_kernels.__file__).parents[1] / "README.md"
    code = readme.read_text().split("```python\n")[1].split("```")[0]
    adapters = [np.full((2, 3), value, dtype=np.float32) for value in (1.0, 4.0)]
    names = {"adapters": adapters, "sample_counts": [20, 10]}
    exec(code, names)
    assert np.array_equal(names["mean"], np.full(6, 2.0, dtype=np.float32))


def test_every_public_function_has_an_example() -> None:
    functions = [getattr(fedcore_kernels, name) for name in fedcore_kernels.__all__]
    without = [
        function.__name__
        for function in functions
        if inspect.isfunction(function) and ">>>" not in function.__doc__
    ]
    assert without == []


def test_importing_needs_torch_alone() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import fedcore_kernels; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    kernels = Path(fedcore_kernels.__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=kernels,
    ).stdout.split()
    foreign = {name for name in found if name not in sys.stdlib_module_names}
    assert foreign == {"fedcore_kernels"}
