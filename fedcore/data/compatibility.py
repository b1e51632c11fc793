"""Whether adapters can be averaged at all: each by itself, and beside another.

Only names, shapes and configurations are looked at, so values need not be there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedcore.data.adapter_kind import (
    EMBEDDINGS,
    FIELD_OF_TENSOR,
    meaning_problem,
    token_indices,
)
from fedcore.data.adapter_state import AdapterState
from fedcore.data.peft_keys import MAGNITUDE, TOKEN_ROWS, ends_with
from fedcore.data.validation import check_state
from fedcore.errors import FedcoreError
from fedcore_kernels.layout import FactorLayout


def _target_problem(state: AdapterState) -> str | None:
    targets = state.config.get("target_modules")
    if not isinstance(targets, list | tuple | set | frozenset):
        return None
    # PEFT adapts both of a tied pair where one of them is a target.
    tied = bool(state.config.get("ensure_weight_tying")) and set(EMBEDDINGS) & set(targets)
    for module in state.factors:
        form = state.forms.get(f"{module}.A")
        if form is not None and form.experts:
            continue
        # PEFT takes a name as the whole path or as its end.
        if any(ends_with(module, str(name)) for name in targets):
            continue
        if not (tied and any(ends_with(module, name) for name in EMBEDDINGS)):
            return f"module {module} is adapted and not among target_modules, so PEFT drops it"
    return None


def magnitudes(state: AdapterState) -> list[str]:
    """The dense tensors that are DoRA's magnitude vectors."""
    return [name for name in state.dense if MAGNITUDE in name.split(".")]


def adapter_problem(state: AdapterState) -> str | None:
    """What makes one adapter unfit for averaging, whatever the others are."""
    config = state.config
    if not state.factors:
        return "it holds no low-rank factor"
    for end, field in FIELD_OF_TENSOR:
        tensors = [name for name in state.dense if ends_with(name, end)]
        if bool(config.get(field)) != bool(tensors):
            return f"{field} is {config.get(field)!r:.60} and {len(tensors)} tensors are {end}"
    for module, named in state.factors.items():
        kinds = {"lora_embedding_" in state.keys[f"{module}.{factor}"] for factor in named}
        if len(kinds) > 1:
            return f"module {module} has one factor of an embedding and one of a linear layer"
    try:
        token_rows(state)
    except FedcoreError as error:
        return str(error)
    return _target_problem(state)


def token_rows(state: AdapterState) -> dict[str, tuple[int, ...]]:
    """Name of each tensor of embedding rows to its tokens, in order.

    Raises:
        FedcoreError: the configuration lists none, or another number than there are rows.
    """
    rows = {}
    for name, tensor in state.dense.items():
        if ends_with(name, TOKEN_ROWS):
            rows[name] = token_indices(state.config, name)
            if tensor.dim() != 2 or len(rows[name]) != tensor.shape[0]:
                raise FedcoreError(
                    f"{name} has shape {tuple(tensor.shape)} for {len(rows[name])} tokens"
                )
    return rows


def _without_token_rows(state: AdapterState) -> AdapterState:
    dense = {n: tensor for n, tensor in state.dense.items() if not ends_with(n, TOKEN_ROWS)}
    return replace(state, dense=dense)


def _token_mismatch(state: AdapterState, first: AdapterState, whose: str) -> str | None:
    rows, expected = token_rows(state), token_rows(first)
    for name in sorted(rows.keys() ^ expected.keys()):
        where = "it" if name in rows else whose
        return f"only {where} trains the token rows {name}"
    for name in rows:
        width, other = state.dense[name].shape[1], first.dense[name].shape[1]
        if width != other:
            return f"{name} has rows of {width} numbers, those of {whose} have {other}"
    return None


def _base_mismatch(
    config: Mapping[str, Any], expected: Mapping[str, Any], whose: str
) -> str | None:
    base, named = (
        str(c.get("base_model_name_or_path") or "").rstrip("/") for c in (config, expected)
    )
    if base and named and base != named:
        return (
            f"base_model_name_or_path is {base!r:.80}, that of {whose} is {named!r:.80}; if both "
            "name the same model, pass base (--base NAME)"
        )
    return None


def mismatch(
    state: AdapterState, first: AdapterState, whose: str, layout: FactorLayout, *, same_base: bool
) -> str | None:
    """The first way in which an adapter does not fit ``first``, if any.

    Args:
        whose: the name of ``first`` in an error.
        layout: the tensors of ``first`` at the largest rank of any adapter.
        same_base: whether the caller vouches for the base models to be one.
    """
    config, expected = state.config, first.config
    if state.family != first.family:
        return f"it is of family {state.family!r}, {whose} of {first.family!r}"
    problem = None if same_base else _base_mismatch(config, expected, whose)
    problem = problem or meaning_problem(config, expected, whose)
    if problem:
        return problem
    mine, theirs = len(magnitudes(state)), len(magnitudes(first))
    if bool(mine) != bool(theirs):
        return f"it holds {mine} DoRA magnitude vectors, {whose} holds {theirs}"
    problem = _token_mismatch(state, first, whose)
    if problem:
        return problem
    layout = layout.part(slot.name for slot in layout if not ends_with(slot.name, TOKEN_ROWS))
    problem = check_state(_without_token_rows(state), layout, mixed_ranks=True)
    if problem:
        return problem
    offset = state.family == "gram" and config.get("offset", True)
    if offset and state.scaling != first.scaling:
        return f"its scaling differs from that of {whose}; the offset is common to all"
    return None
