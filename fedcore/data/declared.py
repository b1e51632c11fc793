"""What a configuration declares of each module: its rank and its scaling, read and written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from math import sqrt
from typing import Any

from fedcore.checks import count, flag, number
from fedcore.data.patterns import first_match
from fedcore.errors import FedcoreError

# No scaling in use is near it, and fp32 factors of ordinary size survive being multiplied by it.
_LARGEST = 1e30

_ADALORA_FIELDS = (
    "target_r",
    "init_r",
    "tinit",
    "tfinal",
    "deltaT",
    "beta1",
    "beta2",
    "orth_reg_weight",
    "total_step",
)

# PEFT adds it to the rank that AdaLoRA's scaling is divided by.
_ADALORA_EPS = 1e-5


def declared_rank_and_scaling(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and scaling that ``config`` declares for ``module`` (patterns as PEFT matches them).

    ``alpha / r`` for plain LoRA, ``alpha / sqrt(r)`` with ``use_rslora``. A pattern matches the
    whole module path or what follows one of its dots, see :mod:`~fedcore.data.patterns`.

    Raises:
        FedcoreError: ``r`` or ``lora_alpha`` is missing or not positive, or a pattern is not
            understood.
    """
    rank = _declared(config, "rank_pattern", module, "r")
    alpha = _declared(config, "alpha_pattern", module, "lora_alpha")
    owner = f"module {module} in the adapter's configuration"
    rank = count(owner, "r", rank, least=1, most=_LARGEST)
    alpha = number(owner, "lora_alpha", alpha, least=1 / _LARGEST, most=_LARGEST)
    rooted = flag(owner, "use_rslora", config.get("use_rslora") or False)
    return rank, alpha / sqrt(rank) if rooted else alpha / rank


def _declared(config: Mapping[str, Any], patterns: str, module: str, default: str) -> Any:
    """The value of the first of the ``patterns`` that matches ``module``, else of ``default``."""
    declared = config.get(patterns) or {}
    if not isinstance(declared, Mapping):
        raise FedcoreError(f"{patterns} is {declared!r:.60}; a mapping of patterns is needed")
    if not all(isinstance(pattern, str) for pattern in declared):
        raise FedcoreError(f"{patterns} is {declared!r:.60}; its keys are patterns of module paths")
    keys = tuple(declared)
    try:
        place = first_match(keys, module)
    except FedcoreError as error:
        raise FedcoreError(f"{patterns}: {error}") from None
    return config.get(default) if place is None else declared[keys[place]]


def _commonest(values: Mapping[str, Any]) -> Any:
    return max(Counter(values.values()).items(), key=lambda item: (item[1], item[0]))[0]


def _exceptions(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    # PEFT matches a pattern against the end of a path; the anchor makes it the whole path.
    return {f"^{re.escape(m)}": v for m, v in sorted(values.items()) if v != default}


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


def declaration(ranks: Mapping[str, int], scaling: Mapping[str, float]) -> dict[str, Any]:
    """The fields that declare ``ranks`` and ``scaling``: ``alpha = scaling * rank`` by module."""
    alphas = {module: _whole(scaling[module] * rank) for module, rank in ranks.items()}
    # The commonest value is the default: fewest exceptions, and the same answer in any order.
    rank, alpha = (_commonest(values) for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _exceptions(ranks, rank),
        "alpha_pattern": _exceptions(alphas, alpha),
        "use_rslora": False,
    }


def as_lora_config(
    config: Mapping[str, Any], ranks: Mapping[str, int], name: str
) -> tuple[dict[str, Any], dict[str, float]]:
    """The configuration of the plain LoRA that an AdaLoRA adapter is, and its scalings.

    AdaLoRA's update is ``alpha / (init_r + 1e-5) B diag(E) A``, whatever rank is left.

    Raises:
        FedcoreError: ``init_r`` or ``lora_alpha`` is not positive, or a module has more than
            ``init_r`` directions.
    """
    owner = f"{name}: the adapter's configuration"
    initial = count(owner, "init_r", config.get("init_r", 12), least=1, most=_LARGEST)
    alpha = number(
        owner, "lora_alpha", config.get("lora_alpha", 8), least=1 / _LARGEST, most=_LARGEST
    )
    for module, rank in ranks.items():
        if rank > initial:
            raise FedcoreError(
                f"{name}: module {module} has rank {rank}, its configuration starts at {initial}"
            )
    scaling = dict.fromkeys(ranks, alpha / (initial + _ADALORA_EPS))
    fields = {field: value for field, value in config.items() if field not in _ADALORA_FIELDS}
    return {**fields, "peft_type": "LORA", **declaration(ranks, scaling)}, scaling
