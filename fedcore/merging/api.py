"""``fedcore.aggregate``: adapters in, one adapter out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedcore.data.peft_files import DEFAULT_BUDGET
from fedcore.data.validation import OnInvalid
from fedcore.errors import FedcoreError
from fedcore.merging.error_table import ErrorTally
from fedcore.merging.merge import Progress, merge
from fedcore.merging.plan import check_usable, open_sources, plan_job, usable_methods
from fedcore.merging.reading import DEFAULT_GROUP_BYTES, Job
from fedcore.merging.result import (
    Aggregated,
    MethodError,
    adapters_of,
    check_output,
    kept_scaling,
    write_folder,
)
from fedcore.merging.sources import (
    Adapter,
    Adapters,
    Weights,
    magnitudes,
    named_adapters,
    open_source,
    parse_dtype,
    weights_by_name,
)
from fedcore.methods import create_method
from fedcore.methods.base import FACTORS, Method

_COMPARED_ROWS = 4096
"""Alternatives cost Grams of all stacked factors: above so many rows a module they are skipped."""


def aggregate(
    adapters: Adapters,
    weights: Weights | None = None,
    *,
    method: str = "product_svd",
    rank: int | None = None,
    out: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    previous: Adapter | None = None,
    on_invalid: OnInvalid = "raise",
    dtype: str | torch.dtype | None = None,
    compare: bool = True,
    overwrite: bool = False,
    budget: int = DEFAULT_BUDGET,
    group_bytes: int = DEFAULT_GROUP_BYTES,
    progress: Progress | None = None,
) -> Aggregated:
    """Aggregate LoRA adapters of one base model into one adapter that PEFT loads.

    The target is the weighted mean of the adapters' updates, ``M = sum_n w_n s_n B_n A_n``, with
    scalings as each configuration declares them; heads and other dense tensors, and DoRA
    magnitudes, are averaged. Adapters are read by groups of modules, so that memory is the
    result's and one group's of all adapters. A method with a rule over whole adapters reads them
    twice; adapters that it leaves out have no part in anything that is averaged, and stay in the
    M that errors are measured against.

    Args:
        adapters: PEFT folders, or client id to folder; in place of a folder a state, a PEFT state
            dict with its configuration under ``"config"``, or a pair of tensors (or arrays) and
            configuration. Ranks, scalings, dtypes may differ; modules and base model may not.
        weights: one each, in the order of ``adapters`` or by id; equal unless given. An adapter of
            weight zero has no influence.
        method: a name of :func:`fedcore.merging.usable_methods`.
        rank: of the result, for methods that choose it; the largest of the adapters unless given.
            A module gets no more than its product can have.
        out: folder to write; a residual goes to ``out/residual``. Nothing is there before all is.
        options: the method's own.
        previous: the adapter that all started from, for methods that align to it.
        on_invalid: ``"raise"`` names the first bad adapter, ``"drop"`` leaves bad ones out.
        dtype: ``fp64``, ``fp32``, ``fp16`` or ``bf16``; that of the first adapter unless given.
        compare: find the error of the method and of its alternatives too.
        overwrite: replace the adapter in ``out``.
        budget: refuse weight files of more bytes.
        group_bytes: of one group's tensors of all adapters.
        progress: called with the number of parts done and of all, in both passes if there are two.

    Returns:
        :class:`~fedcore.merging.result.Aggregated`. The first adapter gives the configuration:
        ``r`` is the rank, ``lora_alpha`` makes the scaling 1, ``use_rslora`` is off.

    Raises:
        FedcoreError: naming adapter, tensor and value; nothing has been written then.

    Example:
        >>> one = {"q.lora_A.weight": torch.tensor([[1.0, 0.0]]), "config": {"r": 1}}
        >>> one |= {"q.lora_B.weight": torch.tensor([[2.0]])}
        >>> one["config"] |= {"lora_alpha": 3}
        >>> found = aggregate({"a": one, "b": one}, [1, 3])
        >>> (found.adapter.factors["q"]["B"] @ found.adapter.factors["q"]["A"]).tolist()
        [[6.0, 0.0]]
    """
    named = named_adapters(adapters)
    counts = weights_by_name(weights, list(named))
    given = dict(options or {})
    chosen = check_usable(create_method(method, **given), previous is not None, given.get("align"))
    if previous is not None and chosen.capabilities.history == "none":
        raise FedcoreError(f"{chosen.name} makes no use of previous; leave it out")
    wanted = parse_dtype(dtype)
    if on_invalid not in ("raise", "drop"):
        raise FedcoreError(f"on_invalid is {on_invalid!r}; pass 'raise' or 'drop'")
    if out is not None:
        inputs = [Path(one) for one in named.values() if isinstance(one, str | Path)]
        check_output(Path(out), inputs, overwrite)
    sources, dropped = open_sources(named, counts, on_invalid, budget)
    before = None if previous is None else open_source("previous", previous, budget)
    job = plan_job(chosen, sources, counts, before, rank, group_bytes)
    dtypes = _dtypes(job, wanted)
    tally = _tally(job, dtypes) if compare else None
    merged = merge(job, _cast(job, dtypes), tally, progress)
    if magnitudes(job.first.outline) and merged.factors and merged.residual:
        raise FedcoreError(
            f"{chosen.name} leaves a residual, which cannot stand beside a DoRA adapter: its "
            "normalisation takes the sum of both; use another method"
        )
    adapter, residual = adapters_of(job, merged)
    errors = () if tally is None else tally.rows(chosen.name)
    if out is not None:
        write_folder(Path(out), adapter, residual)
    return Aggregated(
        adapter,
        residual,
        errors,
        tuple(sorted(dropped)),
        tuple(merged.flags),
        _exact(job, errors, dtypes),
    )


def _dtypes(job: Job, wanted: torch.dtype | None) -> dict[str, torch.dtype]:
    """Full name of every tensor of the result to its dtype."""
    outline = job.first.outline
    own = {
        f"{module}.{factor}": tensor.dtype
        for module, named in outline.factors.items()
        for factor, tensor in named.items()
    }
    own |= {name: tensor.dtype for name, tensor in outline.dense.items()}
    return own if wanted is None else dict.fromkeys(own, wanted)


def _cast(job: Job, dtypes: Mapping[str, torch.dtype]) -> Callable[[str, Tensor], Tensor]:
    """A tensor of the result, with all scaling absorbed, as it is written."""
    units = _units(job)

    def cast(name: str, values: Tensor) -> Tensor:
        unit = units.get(name.rpartition(".")[0], 1.0)
        found = (values / unit if unit != 1.0 else values).to(dtypes[name])
        if not bool(torch.isfinite(found).all()):
            largest = float(values.abs().max())
            raise FedcoreError(
                f"{name} of the result holds values up to {largest:.3g}, which are not finite in "
                f"{dtypes[name]}; pass a wider dtype"
            )
        return found

    return cast


def _units(job: Job) -> dict[str, float]:
    """Module to what a Gram factor takes up of the scaling that its adapter is written with."""
    if job.method.family != "gram":
        return {}
    return {module: sqrt(scaling) for module, scaling in kept_scaling(job).items()}


def _tally(job: Job, dtypes: Mapping[str, torch.dtype]) -> ErrorTally:
    outline, units = job.first.outline, _units(job)
    offsets: dict[str, Tensor] = {}
    if outline.family == "gram" and outline.config.get("offset", True):
        held = job.first.constants()
        for module, unit in units.items():
            if f"{module}.gram_A0" not in held:
                raise FedcoreError(f"{job.first.name}: module {module} lacks gram_A0")
            offsets[module] = held[f"{module}.gram_A0"].double() * unit
    rows = max(sum(source.ranks[module] for source in job.sources) for module in outline.factors)
    dense = sum(t.numel() * dtypes[name].itemsize for name, t in outline.dense.items())
    others = _alternatives(job.method) if rows <= _COMPARED_ROWS else []
    return ErrorTally(others, dtypes, dense, units, offsets)


def _alternatives(chosen: Method) -> list[Method]:
    """The other methods that adapters alone are enough for, with their default options."""
    factors = frozenset(FACTORS[chosen.family])
    return [
        check_usable(method(), previous=False, align=None)
        for method in usable_methods(chosen.family, previous=False)
        # A method with a factor in common differs from averaging only where there is none; a rule
        # is no other way of averaging.
        if method.name != chosen.name
        and method().plan(0).sends == factors
        and method().rule is None
    ]


def _exact(job: Job, errors: tuple[MethodError, ...], dtypes: Mapping[str, torch.dtype]) -> bool:
    if magnitudes(job.first.outline):
        return False
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes.values())
    measured = errors[0].error if errors else float("nan")
    return job.method.capabilities.always_exact or measured <= 4 * coarsest
