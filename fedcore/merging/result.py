"""What an aggregation of adapters gives: adapters that PEFT loads, what was lost, and the folder.

The first adapter of a job gives the configuration; ranks and alphas are the result's own.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from fedcore.data.adapter_fields import FIELDS
from fedcore.data.adapter_kind import kind
from fedcore.data.adapter_state import AdapterState
from fedcore.data.declared import declaration
from fedcore.data.folders import is_leftover, replace_folder, writing
from fedcore.data.low_rank import LowRank
from fedcore.data.peft_files import CONFIG_FILE, WEIGHTS_FILE, write_adapter
from fedcore.data.peft_keys import LORA_BIAS, MAGNITUDE, PREFIX, TOKEN_ROWS, ends_with
from fedcore.data.rows import rank_and_width
from fedcore.data.stored_form import expert_module
from fedcore.data.validation import Dropped
from fedcore.errors import FedcoreError
from fedcore.merging.plan import Job

RESIDUAL_FOLDER = "residual"
"""Where a second adapter stands in the folder of the first."""

Factors = dict[str, dict[str, Tensor]]
"""Module to factor to tensor, in PEFT's orientation."""


@dataclass
class Merged:
    """What the groups gave: PEFT's orientation, the dtypes of the result.

    ``factors`` absorb all scaling; ``residual`` is an update of scale 1 beside them.
    """

    factors: Factors = field(default_factory=dict)
    residual: dict[str, LowRank] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MethodError:
    """One row of the table.

    Attributes:
        method: its name.
        chosen: whether it is the method of the call.
        error: ``||M - P||_F / ||M||_F`` over all modules; ``nan`` if every M is zero.
        worst: the largest error of a module, relative to its own M.
        worst_module: the module it is in.
        rank: the largest rank of a module, of adapter and residual together.
        bytes: of the tensors that would be written.
        refused: why the method cannot be used here; empty if it can.
    """

    method: str
    chosen: bool
    error: float
    worst: float
    worst_module: str
    rank: int
    bytes: int
    refused: str = ""


@dataclass(frozen=True)
class Aggregated:
    """The result of :func:`fedcore.aggregate`.

    Attributes:
        adapter: the aggregated adapter, as it is written.
        residual: a second adapter that has to be added to the first, where the method has one.
        errors: one row for the method and one for each alternative; empty with ``compare=False``.
        dropped: adapters that were left out, with reasons.
        flags: what a user should know of the result.
        exact: whether the mean of the products is kept up to the rounding of the written dtype;
            never with DoRA, whose normalisation no average passes through, nor where adapters
            train rows of different tokens.
        merged_error: of DoRA adapters whose base model is at hand, the distance of the merged
            weights from the mean of the adapters' merged weights, relative to the mean's change.
    """

    adapter: AdapterState
    residual: AdapterState | None
    errors: tuple[MethodError, ...]
    dropped: tuple[Dropped, ...]
    flags: tuple[str, ...]
    exact: bool
    merged_error: float | None = None


def _lora_factors(residual: Mapping[str, LowRank]) -> Factors:
    return {
        module: {"A": part.inner.contiguous(), "B": part.outer.T.contiguous()}
        for module, part in residual.items()
    }


def _tag(key: str) -> str:
    """The end of a factor's key as files have it, from that of a file or of a live model."""
    parts = key.split(".")
    at = next(i for i in reversed(range(len(parts))) if re.match(r"(lora|gram)_", parts[i]))
    return f"{parts[at]}.weight" if parts[-1] == "weight" else parts[at]


def _at_one_rank(factors: Factors, ranks: Mapping[str, int]) -> Factors:
    """The factors with rows and columns of zeros up to ``ranks``, which change no product."""
    padded: Factors = {}
    for module, named in factors.items():
        padded[module] = {}
        for factor, tensor in named.items():
            missing = ranks[module] - rank_and_width(factor, tensor)[0]
            sides = (0, missing) if factor == "B" else (0, 0, 0, missing)
            padded[module][factor] = pad(tensor, sides) if missing else tensor
    return padded


def _written_ranks(job: Job, factors: Factors) -> dict[str, int]:
    """Module to the rank it is written with.

    Servers that pass over patterns scale by alpha over a tensor's own rank: all modules have one
    unless patterns are wanted, and all experts of a parameter stand in one tensor in any case.
    """
    ranks = {
        module: rank_and_width(*next(iter(named.items())))[0] for module, named in factors.items()
    }
    if not job.patterns:
        return dict.fromkeys(ranks, max(ranks.values()))
    largest: dict[str, int] = {}
    for module, rank in ranks.items():
        owner = expert_module(module)
        largest[owner] = max(largest.get(owner, 0), rank)
    return {module: largest[expert_module(module)] for module in ranks}


def _saved_modules(dense: Iterable[str]) -> list[str]:
    """The modules that are saved whole, of an adapter whose configuration does not list them."""
    ends = (MAGNITUDE, LORA_BIAS, TOKEN_ROWS)
    whole = [name for name in dense if not any(ends_with(name, end) for end in ends)]
    return sorted({name.rpartition(".")[0] or name for name in whole})


def _tokens_field(job: Job) -> Any:
    """``trainable_token_indices`` of the result, in the form that the first adapter has it."""
    listed = job.first.outline.config.get("trainable_token_indices")
    if not isinstance(listed, Mapping):
        return list(next(iter(job.tokens.values()))) if job.tokens else listed
    return {
        key: next(
            (
                list(tokens)
                for name, tokens in job.tokens.items()
                if ends_with(name.removesuffix(f".{TOKEN_ROWS}"), str(key))
            ),
            listed[key],
        )
        for key in listed
    }


def _config(
    job: Job, adapter: AdapterState, scaling: Mapping[str, float], plain: bool
) -> dict[str, Any]:
    """The first adapter's fields with what the result declares, and all that PEFT needs."""
    config = dict(job.first.outline.config)
    named = (s.outline.config.get("base_model_name_or_path") for s in (job.first, *job.sources))
    base = job.base or next((name for name in named if name), None)
    if base:
        config["base_model_name_or_path"] = base
    config |= {
        "peft_type": kind(config),
        "inference_mode": True,
        **declaration(adapter.ranks, scaling),
    }
    if config.get("target_modules") is None and not config.get("target_parameters"):
        config["target_modules"] = sorted(adapter.factors)
    if "modules_to_save" not in config and not plain:
        config["modules_to_save"] = _saved_modules(adapter.dense) or None
    if "init_lora_weights" in config:
        config["init_lora_weights"] = True
    config |= {
        field: None
        for field, rule in FIELDS[kind(config)].items()
        if rule.use == "dropped" and config.get(field)
    }
    if job.tokens:
        config["trainable_token_indices"] = _tokens_field(job)
    if plain:
        # What the first adapter saves whole stands there once.
        config |= {"modules_to_save": None, "bias": "none"}
        config |= {
            field: None if field == "trainable_token_indices" else False
            for field in ("trainable_token_indices", "lora_bias")
            if config.get(field)
        }
    return config


def _adapter(
    job: Job, factors: Factors, dense: Mapping[str, Tensor], plain: bool = False
) -> AdapterState:
    first = job.first.outline
    scaling = {module: job.scaling[module] for module in factors}
    factors = _at_one_rank(factors, _written_ranks(job, factors))
    keys = {name: f"{PREFIX}{name}" for name in dense}
    for module, named in factors.items():
        for factor in named:
            tag = _tag(first.keys[f"{module}.{factor}"])
            keys[f"{module}.{factor}"] = f"{PREFIX}{expert_module(module)}.{tag}"
    constants = {}
    if first.constants and not plain:
        constants = job.first.constants()
        keys |= {name: f"{PREFIX}{name}" for name in constants}
    adapter = AdapterState(first.family, factors, dense, constants, scaling, {}, keys, first.forms)
    return replace(adapter, config=_config(job, adapter, scaling, plain))


def adapters_of(job: Job, merged: Merged) -> tuple[AdapterState, AdapterState | None]:
    """The adapter and, where factors and a residual stand beside each other, the second one."""
    factors, residual = merged.factors, _lora_factors(merged.residual)
    if not factors:
        return _adapter(job, residual, merged.dense), None
    beside = _adapter(job, residual, {}, plain=True) if residual else None
    return _adapter(job, factors, merged.dense), beside


def check_output(out: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """Refuse a folder that must not be written to, before anything is computed.

    Only the four files that an aggregation writes are ever overwritten.

    Raises:
        FedcoreError: it is not a folder; it is not empty and ``overwrite`` is false, or it holds
            anything else than an adapter and its residual; or it holds one of the ``inputs``.
    """
    with writing(out):
        place = out.resolve()
        in_the_way = _is_no_folder(out)
    for source in inputs:
        if source.resolve().is_relative_to(place):
            raise FedcoreError(f"out is {out}, which holds the adapter {source}; pass another")
    if in_the_way:
        raise FedcoreError(f"out is {out}, which is not a folder; pass another")
    present = _names_in(out)
    if not present:
        return
    if not overwrite:
        raise FedcoreError(f"out is {out}, which is not empty; pass another or overwrite it")
    _check_replaceable(out, present)


def _is_no_folder(out: Path) -> bool:
    """Whether something else has this name; another process may be replacing the folder."""
    try:
        mode = os.lstat(out).st_mode
    except FileNotFoundError:
        return False
    return not (stat.S_ISDIR(mode) or (stat.S_ISLNK(mode) and out.is_dir()))


def _names_in(out: Path) -> list[str]:
    """The paths of all files below ``out``, empty folders and links among them, in order."""
    names = []
    for parent, folders, files in os.walk(out):
        inside = Path(parent).relative_to(out)
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        names += [str(inside / name) for name in (*files, *links)]
        if not folders and not files and parent != str(out):
            names.append(str(inside))
    return sorted(name for name in names if not is_leftover(Path(name).parts[0]))


def _check_replaceable(out: Path, present: Sequence[str]) -> None:
    """Refuse ``out`` if it holds what no aggregation wrote.

    Raises:
        FedcoreError: naming the first such file.
    """
    written = {CONFIG_FILE, WEIGHTS_FILE}
    written |= {str(Path(RESIDUAL_FOLDER, name)) for name in written}
    foreign = [name for name in present if name not in written]
    if foreign:
        others = f" and {len(foreign) - 1} others" if len(foreign) > 1 else ""
        raise FedcoreError(
            f"out is {out}, which holds {foreign[0]!r}{others}: overwriting would delete it. Only "
            f"{CONFIG_FILE} and {WEIGHTS_FILE} are overwritten; move what else is there, a "
            "README.md of PEFT too, or pass another folder"
        )


def write_folder(out: Path, adapter: AdapterState, residual: AdapterState | None) -> None:
    """Write the adapter to ``out``, a residual to ``out/residual``; the folder appears at once.

    Raises:
        FedcoreError: the folder cannot be written, or has got other files meanwhile; what was there
            before is still there.
    """
    with replace_folder(out) as new:
        write_adapter(adapter, new)
        if residual is not None:
            write_adapter(residual, new / RESIDUAL_FOLDER)
        _check_replaceable(out, _names_in(out))
