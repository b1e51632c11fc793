"""Import paths of fedcore 0.1 that stand in its pages and in files that it wrote, for one release.

``import fedcore.engines.files`` gives :mod:`fedcore.transports.folders` itself, loaded on first
use, so both paths have the same objects. Apps that ``fedcore flower-app`` wrote keep working; new
code imports the paths on the right of :data:`MOVED`. ``fedcore.data.ServerState`` is the one alias
elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "fedcore.engines.choice": "fedcore.transports.choice",
    "fedcore.engines.compare": "fedcore.experiments.run",
    "fedcore.engines.files": "fedcore.transports.folders",
    "fedcore.engines.flower": "fedcore.transports.flower",
    "fedcore.engines.flower.app_folder": "fedcore.transports.flower.apps",
    "fedcore.engines.flower.apps": "fedcore.transports.flower.apps",
    "fedcore.engines.flower.secure_sums": "fedcore.transports.flower.secure_aggregation",
    "fedcore.engines.local": "fedcore.experiments.run",
    "fedcore.engines.nvflare": "fedcore.transports.nvflare",
    "fedcore.engines.observer": "fedcore.experiments.observer",
    "fedcore.engines.trials": "fedcore.experiments.trials",
    "fedcore.methods.hadamard_combination": "fedcore.methods.lora.flora_na.hadamard",
    "fedcore.privacy.audit": "fedcore.audit.attack",
    "fedcore.privacy.gradient_matching": "fedcore.audit.gradient_matching",
    "fedcore.privacy.picture_quality": "fedcore.audit.image_quality",
}
"""Old path to the module that took its place."""


class _Moved(MetaPathFinder, Loader):
    """Finds an old path and puts the module that took its place under it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for the old paths alone."""
        return ModuleSpec(fullname, self, is_package=True) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Replace the empty ``module``; importlib returns what ``sys.modules`` holds afterwards."""
        sys.modules[module.__name__] = import_module(MOVED[module.__name__])


def __getattr__(name: str) -> ModuleType:
    """``from fedcore.engines import local``."""
    if f"{__name__}.{name}" in MOVED:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


sys.meta_path.insert(0, _Moved())
