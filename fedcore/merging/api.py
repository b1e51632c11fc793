"""``fedcore.aggregate``: adapters in, one adapter out.

What a caller may pass is brought into one form here: adapters and weights by name, a torch dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fedcore.checks import is_number
from fedcore.data.compatibility import magnitudes
from fedcore.data.peft_files import DEFAULT_BUDGET
from fedcore.data.validation import OnInvalid, check_weight, enforce
from fedcore.errors import FedcoreError, unknown_name
from fedcore.merging.error_table import error_tally
from fedcore.merging.groups import DEFAULT_GROUP_BYTES
from fedcore.merging.merge import Progress, merge
from fedcore.merging.merged_error import base_files, merged_error
from fedcore.merging.plan import Job, open_sources, plan_job
from fedcore.merging.result import (
    Aggregated,
    MethodError,
    adapters_of,
    check_output,
    write_folder,
)
from fedcore.merging.sources import Adapter, open_source
from fedcore.merging.usable import check_usable
from fedcore.methods import create_method

Adapters = Sequence[Adapter] | Mapping[str, Adapter]
Weights = Sequence[float] | Mapping[str, float]

DTYPES: Mapping[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
"""What an adapter can be written in."""


def _as_named(key: str, names: Sequence[str]) -> str:
    """``key`` or the folder that it spells otherwise."""
    for name in (key, str(Path(key))):
        if name in names:
            return name
    raise unknown_name("adapter in weights", key, names)


def _named_adapters(adapters: Adapters) -> dict[str, Adapter]:
    """Adapters by their client id; folders of a sequence go by their path.

    Raises:
        FedcoreError: there is none, or a folder is named twice.
    """
    if isinstance(adapters, str | Path) or not isinstance(adapters, Mapping | Sequence):
        raise FedcoreError(
            f"adapters is a {type(adapters).__name__}; pass a sequence of folders, or a mapping of "
            "client ids to folders"
        )
    named: dict[str, Adapter] = {}
    if isinstance(adapters, Mapping):
        named = {str(name): adapter for name, adapter in adapters.items()}
    else:
        for place, adapter in enumerate(adapters, start=1):
            folder = isinstance(adapter, str | Path)
            name = str(Path(adapter)) if folder else f"adapter {place}"  # type: ignore[arg-type]
            if name in named:
                raise FedcoreError(f"{name} is given twice; weight it instead")
            named[name] = adapter
    if not named:
        raise FedcoreError("no adapters were given")
    return named


def _weights_by_name(weights: Weights | None, names: Sequence[str]) -> dict[str, float]:
    """The weight of each of ``names``; equal ones by default.

    Raises:
        FedcoreError: another number of weights than adapters, an unknown or missing name, a weight
            that is negative or not finite, or nothing but zeros.
    """
    if weights is None:
        return dict.fromkeys(names, 1.0)
    if isinstance(weights, Mapping):
        by_name = {_as_named(str(key), names): value for key, value in weights.items()}
        for name in names:
            if name not in by_name:
                raise FedcoreError(f"weights has no entry for {name}")
    elif isinstance(weights, Sequence) and not isinstance(weights, str):
        if len(weights) != len(names):
            raise FedcoreError(f"weights has {len(weights)} entries for {len(names)} adapters")
        by_name = dict(zip(names, weights, strict=True))
    else:
        raise FedcoreError(f"weights is a {type(weights).__name__}; pass a list or a mapping")
    for name, value in by_name.items():
        try:
            number = is_number(value)
            problem = (
                check_weight(value) if number else f"its weight is {value!r:.60}, not a number"
            )
        except OverflowError:
            problem = "its weight is too large; weights are finite"
        if problem:
            raise FedcoreError(f"{name}: {problem}")
    if not any(by_name.values()):
        raise FedcoreError("the weights of all adapters are zero")
    return {name: float(by_name[name]) for name in names}


def _parsed_dtype(dtype: Any) -> torch.dtype | None:
    """A torch dtype from its name or itself; None stays None.

    Raises:
        FedcoreError: no dtype in which adapters are written.
    """
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise unknown_name("dtype", str(dtype), DTYPES)
    return DTYPES[dtype]


def _exact(job: Job, errors: tuple[MethodError, ...]) -> bool:
    """Whether the mean of the products is kept up to the rounding of the coarsest dtype."""
    if magnitudes(job.first.outline) or not job.common_tokens:
        return False
    coarsest = max(torch.finfo(dtype).eps for dtype in job.dtypes.values())
    measured = errors[0].error if errors else float("nan")
    return job.method.capabilities.always_exact or measured <= 4 * coarsest


def _notes(job: Job) -> Iterator[str]:
    """What a user should know of this kind of adapters, whatever the method."""
    if magnitudes(job.first.outline):
        yield (
            "DoRA normalises base weight and update together, so no average of their parts is the "
            "average of the models; the error of the products is not that of the weights, so it is "
            "not shown (with base, a folder of the base model, that of the merged weights is)"
        )
    for name in job.tokens:
        if not job.common_tokens:
            yield f"{name}: adapters train different tokens; each row is the mean of those that do"


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
    keep_patterns: bool = False,
    base: str | Path | None = None,
    same_base: bool = False,
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
        weights: one per adapter, in the order of ``adapters`` or by id; equal by default. An
            adapter of weight zero has no influence.
        method: a name of :func:`fedcore.merging.methods_for_merging`.
        rank: of the result, for methods that choose it; the largest of the adapters by default.
            A module gets no more than its product can have.
        out: folder to write; a residual goes to ``out/residual``. Nothing is there before all is.
        options: the method's own.
        previous: the adapter that all started from, for methods that align to it.
        on_invalid: ``"raise"`` names the first bad adapter, ``"drop"`` leaves bad ones out.
        dtype: ``fp64``, ``fp32``, ``fp16`` or ``bf16``; that of the first adapter by default.
        compare: find the error of the method and of its alternatives too.
        keep_patterns: let modules keep ranks of their own, by ``rank_pattern``, which PEFT and
            vLLM honour; otherwise all get the largest, with zeros, since llama.cpp scales by
            alpha over a tensor's own rank.
        base: the base model's name in the result; adapters that name it otherwise are of the same
            model then. Where it is a folder with the model's weights, the error of merged DoRA
            weights is measured on them.
        same_base: the adapters are of one base model, whatever they call it.
        overwrite: replace the adapter in ``out``, a folder that holds nothing else.
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
        >>> merged = aggregate({"a": one, "b": one}, [1, 3])
        >>> (merged.adapter.factors["q"]["B"] @ merged.adapter.factors["q"]["A"]).tolist()
        [[6.0, 0.0]]
    """
    named = _named_adapters(adapters)
    counts = _weights_by_name(weights, list(named))
    given = dict(options or {})
    chosen = check_usable(create_method(method, **given), previous is not None, given.get("align"))
    if previous is not None and chosen.capabilities.history == "none":
        raise FedcoreError(f"{chosen.name} makes no use of previous; leave it out")
    result_dtype = _parsed_dtype(dtype)
    enforce((), on_invalid, 0)
    if out is not None:
        inputs = [Path(one) for one in named.values() if isinstance(one, str | Path)]
        check_output(Path(out), inputs, overwrite)
    same_base = same_base or base is not None
    sources, dropped = open_sources(named, counts, on_invalid, budget, same_base)
    job = plan_job(
        chosen,
        sources,
        counts,
        previous=None if previous is None else open_source("previous", previous, budget),
        rank=rank,
        dtype=result_dtype,
        group_bytes=group_bytes,
        base=None if base is None else str(base),
        same_base=same_base,
        patterns=keep_patterns,
    )
    tally = error_tally(job) if compare else None
    merged = merge(job, None if tally is None else tally.add, progress)
    adapter, residual = adapters_of(job, merged)
    files = base_files(base) if magnitudes(job.first.outline) else []
    measured = merged_error(job, adapter, files) if files else None
    errors = () if tally is None else tally.rows()
    if out is not None:
        write_folder(Path(out), adapter, residual)
    return Aggregated(
        adapter,
        residual,
        errors,
        tuple(sorted(dropped)),
        (*_notes(job), *merged.flags),
        _exact(job, errors),
        measured,
    )
