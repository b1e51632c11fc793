"""What an aggregation of adapters gives: adapters that PEFT loads, what was lost, and the folder.

The first adapter of a job gives the configuration; ranks and alphas are the result's own.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedcore.data.adapter_state import AdapterState
from fedcore.data.folders import is_leftover, replace_folder, writing
from fedcore.data.low_rank import LowRank
from fedcore.data.peft_files import CONFIG_FILE, WEIGHTS_FILE, write_adapter
from fedcore.data.peft_keys import PREFIX
from fedcore.data.validation import Dropped
from fedcore.errors import FedcoreError
from fedcore.merging.plan import Job
from fedcore.merging.sources import magnitudes

RESIDUAL_FOLDER = "residual"
"""Where a second adapter stands in the folder of the first."""


@dataclass
class Merged:
    """What the groups gave: PEFT's orientation, the dtypes of the result.

    ``factors`` absorb all scaling; ``residual`` is an update of scale 1 beside them.
    """

    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
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
            never with DoRA, whose normalisation no average passes through.
    """

    adapter: AdapterState
    residual: AdapterState | None
    errors: tuple[MethodError, ...]
    dropped: tuple[Dropped, ...]
    flags: tuple[str, ...]
    exact: bool


def _lora_factors(residual: Mapping[str, LowRank]) -> dict[str, dict[str, Tensor]]:
    return {
        module: {"A": part.inner.contiguous(), "B": part.outer.T.contiguous()}
        for module, part in residual.items()
    }


def _tag(key: str) -> str:
    """The end of a factor's key as files have it, from that of a file or of a live model."""
    parts = key.split(".")
    at = next(i for i in reversed(range(len(parts))) if re.match(r"(lora|gram)_", parts[i]))
    return f"{parts[at]}.weight" if parts[-1] == "weight" else parts[at]


def _commonest(values: Mapping[str, Any]) -> Any:
    return max(Counter(values.values()).items(), key=lambda item: (item[1], item[0]))[0]


def _exceptions(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    # PEFT matches a pattern against the end of a path; the anchor makes it the whole path.
    return {f"^{re.escape(m)}": v for m, v in sorted(values.items()) if v != default}


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _config(
    job: Job, ranks: Mapping[str, int], scaling: Mapping[str, float], plain: bool
) -> dict[str, Any]:
    """The first adapter's fields with the ranks of the result, and ``alpha = scaling * rank``."""
    config = dict(job.first.outline.config)
    named = (s.outline.config.get("base_model_name_or_path") for s in (job.first, *job.sources))
    base = next((name for name in named if name), None)
    if base:
        config["base_model_name_or_path"] = base
    alphas = {module: _number(scaling[module] * rank) for module, rank in ranks.items()}
    # The commonest value is the default: fewest exceptions, and the same answer in any order.
    rank, alpha = (_commonest(values) for values in (ranks, alphas))
    config |= {
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _exceptions(ranks, rank),
        "alpha_pattern": _exceptions(alphas, alpha),
        "use_rslora": False,
    }
    if "init_lora_weights" in config:
        config["init_lora_weights"] = True
    if plain:
        # What the first adapter saves whole stands there once.
        config["modules_to_save"] = None
        config["bias"] = "none"
    return config


def _adapter(
    job: Job,
    factors: Mapping[str, Mapping[str, Tensor]],
    dense: Mapping[str, Tensor],
    plain: bool = False,
) -> AdapterState:
    first = job.first.outline
    scaling = {module: job.scaling[module] for module in factors}
    keys = {name: f"{PREFIX}{name}" for name in dense}
    for module, named in factors.items():
        for factor in named:
            tag = _tag(first.keys[f"{module}.{factor}"])
            keys[f"{module}.{factor}"] = f"{PREFIX}{module}.{tag}"
    constants = {}
    if first.constants and not plain:
        constants = job.first.constants()
        keys |= {name: f"{PREFIX}{name}" for name in constants}
    adapter = AdapterState(first.family, factors, dense, constants, scaling, {}, keys)
    return replace(adapter, config=_config(job, adapter.ranks, scaling, plain))


def adapters_of(job: Job, merged: Merged) -> tuple[AdapterState, AdapterState | None]:
    """The adapter and, where factors and a residual stand beside each other, the second one.

    Raises:
        FedcoreError: a residual would have to stand beside a DoRA adapter.
    """
    if merged.factors and merged.residual and magnitudes(job.first.outline):
        raise FedcoreError(
            f"{job.method.name} leaves a residual, which cannot stand beside a DoRA adapter: its "
            "normalisation takes the sum of both; use another method"
        )
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
