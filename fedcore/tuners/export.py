"""A Gram adapter as a plain LoRA adapter, exactly, for everyone who does not have this package."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedcore.data.adapter_state import AdapterState
from fedcore.data.peft_files import read_adapter, write_adapter
from fedcore.data.peft_keys import PREFIX
from fedcore.errors import FedcoreError
from fedcore.tuners.frames import DenseFrame, Frame, FrameRecipe, StructuredFrame
from fedcore.tuners.lora_factors import lora_factors

if TYPE_CHECKING:
    from peft import PeftModel

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


def export_lora(
    source: str | Path | PeftModel, out_folder: str | Path, *, adapter_name: str | None = None
) -> Path:
    """Write a Gram adapter as a plain LoRA folder; returns the folder.

    ``r = lora_alpha = 2r`` (``r`` without offset), so the scale is 1; modules saved whole are kept.
    The base model is not needed: shapes stand in the configuration. Each file appears whole or not
    at all, and equal adapters give byte-identical files.

    Args:
        source: an adapter folder, or a live model.
        out_folder: made if missing.
        adapter_name: which adapter of a live model; its active one by default.

    Raises:
        FedcoreError: the source is no Gram adapter, or lacks a tensor or shape it should have.
    """
    if isinstance(source, str | Path):
        if adapter_name is not None:
            raise FedcoreError(f"adapter_name is {adapter_name!r}; a folder holds one adapter")
        state = read_adapter(source)
    else:
        state = _live_state(source, adapter_name)
    return write_adapter(gram_to_lora(state), out_folder)


def gram_to_lora(state: AdapterState, name: str = "adapter") -> AdapterState:
    """The plain LoRA adapter that equals ``state``; ``name`` is what errors call it.

    Raises:
        FedcoreError: as :func:`export_lora`.
    """
    if state.family != "gram":
        raise FedcoreError(f"{name}: is of family {state.family!r}; export needs a 'gram' adapter")
    factors: dict[str, dict[str, Tensor]] = {}
    keys = {dense: state.keys[dense] for dense in state.dense}
    for module, named in state.factors.items():
        lora_A, lora_B = lora_factors(
            named["A"],
            _initial(state, module, name),
            _frame(state, module, name),
            state.scaling[module],
        )
        factors[module] = {"A": lora_A.contiguous(), "B": lora_B.contiguous()}
        for factor in ("A", "B"):
            keys[f"{module}.{factor}"] = f"{PREFIX}{module}.lora_{factor}.weight"
    ranks = {module: named["A"].shape[0] for module, named in factors.items()}
    return replace(
        state,
        family="lora",
        factors=factors,
        constants={},
        scaling=dict.fromkeys(factors, 1.0),
        config=_lora_config(state.config, ranks),
        keys=keys,
    )


def _live_state(model: PeftModel, adapter_name: str | None) -> AdapterState:
    from peft import get_peft_model_state_dict

    active = model.active_adapters
    if adapter_name is None and len(active) != 1:
        raise FedcoreError(f"adapters {active} are active; pass adapter_name to choose one")
    chosen = active[0] if adapter_name is None else adapter_name
    if chosen not in model.peft_config:
        raise FedcoreError(f"adapter_name is {chosen!r}; the model has {sorted(model.peft_config)}")
    tensors = get_peft_model_state_dict(model, adapter_name=chosen)
    held = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
    return AdapterState.from_peft(held, model.peft_config[chosen].to_dict(), name=chosen)


def _initial(state: AdapterState, module: str, name: str) -> Tensor | None:
    initial = state.constants.get(f"{module}.gram_A0")
    offset = state.config.get("offset", True)
    if offset and initial is None:
        raise FedcoreError(f"{name}: module {module} lacks gram_A0, which offset=True needs")
    return initial if offset else None


def _frame(state: AdapterState, module: str, name: str) -> Frame:
    config = state.config
    if config.get("frame") == "qr":
        stored = [state.constants.get(f"{module}.gram_{side}") for side in ("left", "right")]
        if stored[0] is None or stored[1] is None:
            raise FedcoreError(f"{name}: module {module} lacks gram_left or gram_right")
        return DenseFrame(stored[0], stored[1])
    shape = (config.get("module_shapes") or {}).get(module)
    if shape is None:
        raise FedcoreError(f"{name}: module {module} has no entry in module_shapes")
    recipe = FrameRecipe(config["frame"], config["frame_seed"], module, shape[0], shape[1])
    return StructuredFrame(recipe)


def _lora_config(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    # The commonest rank is the default: fewest exceptions, and the same answer in any order.
    common = max(Counter(ranks.values()).items(), key=lambda item: (item[1], item[0]))[0]
    # PEFT matches a pattern against the end of a path; the anchor makes it the whole path.
    other = {f"^{re.escape(m)}": rank for m, rank in sorted(ranks.items()) if rank != common}
    return {
        **{field: _ordered(config.get(field)) for field in _KEPT_FIELDS},
        "peft_type": "LORA",
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": other,
        "alpha_pattern": dict(other),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "init_lora_weights": True,
    }


def _ordered(value: Any) -> Any:
    # PEFT writes sets in the order of their hashes, which differs from process to process.
    return sorted(value) if isinstance(value, set | list) else value
