"""What vLLM and llama.cpp make of an adapter folder, by the rules of their loaders.

vLLM 0.32 (``lora/peft_helper.py``) honours ``rank_pattern`` and ``alpha_pattern`` and refuses DoRA,
biases, modules saved whole and starts that change the base. llama.cpp (``llama-adapter.h``) knows
one ``lora_alpha`` per file and multiplies a pair by ``lora_alpha / rank of its tensors``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import isclose, sqrt
from pathlib import Path
from typing import Any

from safetensors import safe_open

PAIR = (".lora_A.weight", ".lora_B.weight")
_REFUSED = (
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_qalora",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
)


def _of(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def problems(folder: Path) -> list[str]:
    """Why one of them would refuse ``folder`` or compute another model from it; empty if none."""
    config = json.loads((folder / "adapter_config.json").read_text())
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    found = [f"{field} is set" for field in _REFUSED if config.get(field)]
    if config.get("peft_type") != "LORA":
        found.append(f"peft_type is {config.get('peft_type')}")
    if config.get("init_lora_weights") not in (True, False, None, "gaussian", "orthogonal"):
        found.append(f"init_lora_weights is {config['init_lora_weights']}")
    if (config.get("bias") or "none") != "none":
        found.append(f"bias is {config['bias']}")
    found += [f"tensor {key}" for key in shapes if not key.endswith(PAIR)]
    for key, shape in shapes.items():
        if not key.endswith(PAIR[0]):
            continue
        module = key.removeprefix("base_model.model.").removesuffix(PAIR[0])
        if key.replace(*PAIR) not in shapes:
            found.append(f"{module} lacks B")
        rank = _of(config.get("rank_pattern"), module, config["r"])
        alpha = _of(config.get("alpha_pattern"), module, config["lora_alpha"])
        if rank != shape[0]:
            found.append(f"{module} has rank {shape[0]}, its configuration says {rank}")
        meant = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
        scaled = config["lora_alpha"] / shape[0]
        if not isclose(meant, scaled):
            found.append(f"{module} is scaled by {scaled:g} instead of {meant:g}")
    return found
