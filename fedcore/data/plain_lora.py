"""Low-rank updates as a plain LoRA adapter of scale 1 and one rank, which every server reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import pad

from fedcore.data.adapter_state import AdapterState
from fedcore.data.low_rank import LowRank, total
from fedcore.data.peft_keys import PREFIX

_KEPT_FIELDS = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "revision",
    "target_modules",
    "task_type",
)


def plain_lora(updates: Mapping[str, LowRank], like: AdapterState) -> AdapterState:
    """A LoRA adapter whose update of each module is ``outer^T inner``, at scale 1 and one rank.

    ``B = outer^T`` and ``A = inner``, ``r = lora_alpha`` the largest rank; modules of less have
    rows and columns of zeros, because servers pass over ``rank_pattern`` and would scale them by
    the wrong rank. Dense tensors and the fields that describe the base model are those of
    ``like``.

    Args:
        updates: module to factors ``(p, d_out)`` and ``(p, d_in)``, ``p >= 1``.
        like: an adapter of the same base model.
    """
    rank = max(part.rank for part in updates.values())
    factors, keys = {}, {dense: like.keys[dense] for dense in like.dense}
    for module, (outer, inner) in updates.items():
        missing = rank - inner.shape[0]
        factors[module] = {
            "A": pad(inner, (0, 0, 0, missing)).contiguous(),
            "B": pad(outer.T, (0, missing)).contiguous(),
        }
        for factor in ("A", "B"):
            keys[f"{module}.{factor}"] = f"{PREFIX}{module}.lora_{factor}.weight"
    return replace(
        like,
        family="lora",
        factors=factors,
        constants={},
        scaling=dict.fromkeys(factors, 1.0),
        config=_plain_config(like.config, rank),
        keys=keys,
    )


def with_residual(adapter: AdapterState, residual: Mapping[str, LowRank]) -> AdapterState:
    """A LoRA adapter and low-rank updates of the same base weights, as one adapter of scale 1.

    Args:
        residual: module to an update relative to the adapter's own scaling, as in a row.
    """
    updates = {}
    for module, named in adapter.factors.items():
        scale = adapter.scaling[module]
        parts = [LowRank(named["B"].T * scale, named["A"])]
        if module in residual:
            beside = residual[module]
            dtype = named["A"].dtype
            parts.append(LowRank((beside.outer * scale).to(dtype), beside.inner.to(dtype)))
        # A fresh adapter of a method that starts anew each round is zero: nothing to carry along.
        nonzero = [part for part in parts if bool(torch.any(part.outer))]
        updates[module] = total(nonzero or parts[:1])
    return plain_lora(updates, adapter)


def _plain_config(config: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """The fields of ``adapter_config.json``, with what ``config`` has of the base model."""
    return {
        **{field: _ordered(config.get(field)) for field in _KEPT_FIELDS},
        "peft_type": "LORA",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "init_lora_weights": True,
    }


def _ordered(value: Any) -> Any:
    # PEFT writes sets in the order of their hashes, which differs from process to process.
    return sorted(value) if isinstance(value, set | list) else value
