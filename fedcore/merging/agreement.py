"""What adapters must have in common before their updates can be averaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fedcore.data.adapter_state import AdapterState
from fedcore.data.peft_keys import MAGNITUDE
from fedcore.data.validation import check_state
from fedcore.errors import FedcoreError
from fedcore.merging.sources import Source
from fedcore_kernels.layout import FactorLayout

_SAME_FIELDS: Mapping[str, Any] = {
    "peft_type": None,
    "task_type": None,
    "fan_in_fan_out": False,
    "use_dora": False,
    "bias": "none",
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "use_qalora": False,
    "frame": None,
    "frame_seed": None,
    "frame_ids": None,
    "module_shapes": None,
    "offset": None,
}
"""Fields that change what the tensors mean, with the value that a missing one stands for."""

_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base weights as they are."""


def magnitudes(state: AdapterState) -> list[str]:
    """The dense tensors that are DoRA's magnitude vectors."""
    return [name for name in state.dense if MAGNITUDE in name.split(".")]


def own_problem(state: AdapterState) -> str | None:
    """What makes one adapter unfit for averaging, whatever the others are."""
    config = state.config
    if not state.factors:
        return "it holds no low-rank factor"
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        return (
            f"init_lora_weights is {start!r:.60}, which changes the base weights; convert the "
            "adapter first (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for field in ("lora_bias", "target_parameters"):
        if config.get(field):
            return f"{field} is {config[field]!r:.60}, which is not supported"
    if bool(config.get("use_dora")) != bool(magnitudes(state)):
        return (
            f"use_dora is {config.get('use_dora')!r:.60} and {len(magnitudes(state))} tensors "
            "are magnitude vectors"
        )
    for module, named in state.factors.items():
        kinds = {"lora_embedding_" in state.keys[f"{module}.{factor}"] for factor in named}
        if len(kinds) > 1:
            return f"module {module} has one factor of an embedding and one of a linear layer"
    return _target_problem(state)


def shared_problem(state: AdapterState, first: Source, layout: FactorLayout) -> str | None:
    """The first way in which an adapter does not fit ``first``, if any.

    Args:
        layout: the tensors of ``first`` at the largest rank of any adapter.
    """
    config, expected = state.config, first.outline.config
    if state.family != first.outline.family:
        return f"it is of family {state.family!r}, {first.name} of {first.outline.family!r}"
    mine, theirs = len(magnitudes(state)), len(magnitudes(first.outline))
    if bool(mine) != bool(theirs):
        return f"it holds {mine} DoRA magnitude vectors, {first.name} holds {theirs}"
    base, named = config.get("base_model_name_or_path"), expected.get("base_model_name_or_path")
    if base and named and base != named:
        return f"base_model_name_or_path is {base!r:.80}, that of {first.name} is {named!r:.80}"
    for field, default in _SAME_FIELDS.items():
        one, other = config.get(field) or default, expected.get(field) or default
        if one != other:
            return f"{field} is {one!r:.60}, that of {first.name} is {other!r:.60}"
    problem = check_state(state, layout, mixed_ranks=True)
    if problem:
        return problem
    if (
        state.family == "gram"
        and config.get("offset", True)
        and state.scaling != (first.outline.scaling)
    ):
        return f"its scaling differs from that of {first.name}; the offset is common to all"
    return None


def check_same_constants(sources: list[Source]) -> None:
    """Compare the tensors that never change, bit by bit.

    Raises:
        FedcoreError: naming the adapter and the first tensor that differs.
    """
    first, *others = sources
    if not first.outline.constants and not any(s.outline.constants for s in others):
        return
    expected = first.constants()
    for source in others:
        found = source.constants()
        for name in sorted(expected.keys() | found.keys()):
            both = name in expected and name in found
            if not both or not torch.equal(expected[name], found[name]):
                raise FedcoreError(
                    f"{source.name}: {name} differs from that of {first.name}; factors are "
                    "relative to it and must not be mixed"
                )


def _target_problem(state: AdapterState) -> str | None:
    targets = state.config.get("target_modules")
    if not isinstance(targets, list | tuple | set | frozenset):
        return None
    for module in state.factors:
        # PEFT takes a name as the whole path or as its end.
        if not any(module == name or module.endswith(f".{name}") for name in targets):
            return f"module {module} is adapted and not among target_modules, so PEFT drops it"
    return None
