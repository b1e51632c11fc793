"""What the keys of PEFT adapters mean.

``base_model.model.encoder.layer.0.query.lora_A.weight`` is factor ``A`` of module
``encoder.layer.0.query``. Files drop the adapter's name, live models carry it
(``lora_A.default.weight``, ``classifier.modules_to_save.default.weight``,
``lora_magnitude_vector.default.weight``); both are understood.
Factors are recognised by their key, never by their shape: a layer may be as wide as the rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "base_model.model."

Role = Literal["factor", "constant", "dense"]

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

MAGNITUDE = "lora_magnitude_vector"
"""DoRA's magnitudes, a dense tensor of the module; files end their key here."""

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


def parse_key(key: str) -> KeyMeaning:
    """What ``key`` names; anything that is neither a factor nor a constant is a dense tensor."""
    path = key.removeprefix(PREFIX)
    parts = path.split(".")
    for i in range(len(parts) - 1, max(len(parts) - 4, -1), -1):
        tag = parts[i]
        if tag in _FACTORS:
            family, factor = _FACTORS[tag]
            return KeyMeaning("factor", family, ".".join(parts[:i]), factor)
        if tag in _CONSTANTS:
            return KeyMeaning("constant", _CONSTANTS[tag], ".".join(parts[:i]), tag)
    if MAGNITUDE in parts[-3:]:
        path = ".".join(parts[: parts.index(MAGNITUDE, -3) + 1])
    elif "modules_to_save" in parts:
        i = parts.index("modules_to_save")
        path = ".".join(parts[:i] + parts[i + 2 :])
    return KeyMeaning("dense", "", path, "")
