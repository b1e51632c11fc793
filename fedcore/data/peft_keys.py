"""What the keys of PEFT adapters mean.

``base_model.model.encoder.layer.0.query.lora_A.weight`` is factor ``A`` of module
``encoder.layer.0.query``. Files drop the adapter's name, live models carry it
(``lora_A.default.weight``, ``classifier.modules_to_save.default.weight``,
``lora_magnitude_vector.default.weight``); both are understood, and so are the names that
``torch.compile``, DDP, FSDP and activation checkpointing put around a module.
Factors are recognised by their key, never by their shape: a layer may be as wide as the rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "base_model.model."

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Path components of ``torch.compile``, FSDP and activation checkpointing, which name no module."""

DDP = "module."
"""What ``DistributedDataParallel`` puts in front of every key."""

Role = Literal["factor", "constant", "singular", "dense"]

_FACTORS: dict[str, tuple[str, str]] = {
    "lora_A": ("lora", "A"),
    "lora_B": ("lora", "B"),
    "lora_embedding_A": ("lora", "A"),
    "lora_embedding_B": ("lora", "B"),
    "gram_A": ("gram", "A"),
    "tri_A": ("tri", "A"),
    "tri_B": ("tri", "B"),
    "tri_R": ("tri", "R"),
}
_CONSTANTS = {"gram_A0": "gram", "gram_left": "gram", "gram_right": "gram"}

SINGULAR = "lora_E"
"""AdaLoRA's singular values, one per row of ``A``."""

MAGNITUDE = "lora_magnitude_vector"
"""DoRA's magnitudes, a dense tensor of the module; files end their key here."""

LORA_BIAS = "lora_B.bias"
"""The end of the name of a bias that is trained beside ``B`` and scaled as the update is."""

TAGS = frozenset({*_FACTORS, *_CONSTANTS, SINGULAR, MAGNITUDE})
"""The names that adapters give their parameters; no part of a model is called so."""

TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
"""The end of the name of rows of an embedding, of the tokens that the configuration lists."""

TRAINING_ONLY = "lora_velora_embed"
"""VeLoRA's vectors, which only training uses."""

TRANSPOSED_FACTORS = frozenset({"B"})
"""Factors that a flat row holds transposed, so that every factor is ``rank x width``."""

CORE = "R"
"""The square factor, ``rank x rank``: a lower rank leaves rows and columns of it empty."""


@dataclass(frozen=True)
class KeyMeaning:
    """One tensor of an adapter: its role, the adapter family, module and factor."""

    role: Role
    family: str
    module: str
    factor: str


def unwrapped(key: str) -> str:
    """``key`` without the components that wrappers put into it."""
    if key.startswith(DDP + PREFIX):
        key = key.removeprefix(DDP)
    if not any(wrapper in key for wrapper in WRAPPERS):
        return key
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def ends_with(name: str, end: str) -> bool:
    """Whether the path ``name`` is ``end`` or ends with it, component by component."""
    return name == end or name.endswith(f".{end}")


def _ends_a_factor(tail: list[str]) -> bool:
    """Whether a factor's key ends so: with the adapter's name or without, and with ``weight``."""
    return len(tail) < 2 or (len(tail) == 2 and tail[0] != "weight" and tail[1] == "weight")


def parse_key(key: str) -> KeyMeaning:
    """What ``key`` names; anything that is neither a factor nor a constant is a dense tensor.

    Live models have many more parameters than an adapter; what a *file* may hold is said by
    :mod:`fedcore.data.adapter_kind`.
    """
    path = unwrapped(key).removeprefix(PREFIX)
    parts = path.split(".")
    for i in range(len(parts) - 1, max(len(parts) - 4, -1), -1):
        tag, module, tail = parts[i], ".".join(parts[:i]), parts[i + 1 :]
        if tag == "lora_B" and tail and tail[-1] == "bias":
            return KeyMeaning("dense", "", f"{module}.{LORA_BIAS}", "")
        if not _ends_a_factor(tail):
            continue
        if tag in _FACTORS:
            family, factor = _FACTORS[tag]
            return KeyMeaning("factor", family, module, factor)
        if tag in _CONSTANTS:
            return KeyMeaning("constant", _CONSTANTS[tag], module, tag)
        if tag == SINGULAR:
            return KeyMeaning("singular", "lora", module, tag)
    if MAGNITUDE in parts[-3:] and _ends_a_factor(parts[parts.index(MAGNITUDE, -3) + 1 :]):
        path = ".".join(parts[: parts.index(MAGNITUDE, -3) + 1])
    elif "trainable_tokens_delta" in parts[-2:]:
        path = ".".join(parts[: parts.index("trainable_tokens_delta", -2) + 1])
    elif "modules_to_save" in parts:
        i = parts.index("modules_to_save")
        path = ".".join(parts[:i] + parts[i + 2 :])
    return KeyMeaning("dense", "", path, "")
