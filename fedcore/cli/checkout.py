"""Packages of the repository that no wheel brings, found where fedcore runs from a checkout."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import fedcore
from fedcore.errors import FedcoreError


def checkout_module(package: str, module: str) -> Any:
    """The ``module`` of the top-level folder ``package`` beside the code of fedcore.

    The folder is bound by its path and not looked up on ``sys.path``, so that nothing else of the
    same name can take its place.

    Raises:
        FedcoreError: fedcore does not run from a checkout, as when it was installed from a wheel.
    """
    root = Path(fedcore.__file__).resolve().parents[1]
    folder = root / package
    if not (folder / f"{module}.py").is_file():
        raise FedcoreError(
            f"{package} is not part of the installed package; run this from a checkout, "
            "with pip install --editable '.[test]' in the repository's folder"
        )
    loaded = sys.modules.get(package)
    if loaded is None or str(folder) not in getattr(loaded, "__path__", ()):
        spec = ModuleSpec(package, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        sys.modules[package] = module_from_spec(spec)
    return import_module(f"{package}.{module}")
