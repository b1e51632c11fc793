"""NVFlare's ``FLModel`` and the base classes of its components, as far as ours meet them.

Where NVFlare is installed its own classes are used; otherwise these, which have the same names,
arguments and defaults (2.9.0).
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import StrEnum
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class ParamsType(StrEnum):
    FULL = "FULL"
    DIFF = "DIFF"


class FLModel:
    def __init__(
        self,
        params_type: str | None = None,
        params: Any = None,
        optimizer_params: Any = None,
        metrics: dict[str, Any] | None = None,
        start_round: int | None = 0,
        current_round: int | None = None,
        total_rounds: int | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        if params_type is None and params is not None:
            params_type = ParamsType.FULL
        self.params_type = None if params_type is None else ParamsType(params_type)
        self.params, self.optimizer_params, self.metrics = params, optimizer_params, metrics
        self.start_round, self.current_round = start_round, current_round
        self.total_rounds, self.meta = total_rounds, meta or {}


class ModelAggregator(ABC):
    def __init__(self) -> None:
        self.fl_ctx = None
        self.warnings: list[str] = []

    @abstractmethod
    def accept_model(self, model: FLModel) -> None: ...

    @abstractmethod
    def aggregate_model(self) -> FLModel: ...

    @abstractmethod
    def reset_stats(self) -> None: ...

    def warning(self, message: str) -> None:
        self.warnings.append(message)


class ModelPersistor(ABC):
    def __init__(self, filter_id: str | None = None) -> None:
        self.filter_id = filter_id

    @abstractmethod
    def load_model(self, fl_ctx: Any) -> Any: ...

    @abstractmethod
    def save_model(self, model: Any, fl_ctx: Any) -> None: ...


def make_model_learnable(weights: Any, meta_props: Any) -> dict[str, Any]:
    return {"weights": weights, "meta": meta_props}


PARTS: Mapping[str, Mapping[str, Any]] = {
    "nvflare": {},
    "nvflare.app_common": {},
    "nvflare.app_common.abstract": {},
    "nvflare.app_common.abstract.fl_model": {"FLModel": FLModel, "ParamsType": ParamsType},
    "nvflare.app_common.abstract.model": {"make_model_learnable": make_model_learnable},
    "nvflare.app_common.abstract.model_persistor": {"ModelPersistor": ModelPersistor},
    "nvflare.app_common.aggregators": {},
    "nvflare.app_common.aggregators.model_aggregator": {"ModelAggregator": ModelAggregator},
}
"""Module to what of it is used."""


def install() -> None:
    """Put the stand-ins where ``import nvflare`` finds them, unless the real thing is there."""
    if "nvflare" in sys.modules or find_spec("nvflare") is not None:
        return
    for name, content in PARTS.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(content)
        sys.modules[name] = module
