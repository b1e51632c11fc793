"""Adapters as PEFT tuner types; importing this package makes them known to PEFT."""

# First, because without PEFT it raises the error that names the extra to install.
from fedcore.tuners.shared.registration import register  # isort: skip

from fedcore.tuners.export import export_lora, gram_to_lora, tri_to_lora
from fedcore.tuners.gram.config import GramConfig
from fedcore.tuners.gram.frames import FrameRecipe, StructuredFrame, check_same_frames
from fedcore.tuners.gram.layer import GramLayer
from fedcore.tuners.gram.model import GramModel
from fedcore.tuners.lora_factors import lora_factors
from fedcore.tuners.tri.config import TriConfig
from fedcore.tuners.tri.layer import TriLayer
from fedcore.tuners.tri.lora_sb import apply_sb, first_step_statistics, sb_factors
from fedcore.tuners.tri.model import TriModel
from fedcore.tuners.tri.start import TriFactors

register("gram", GramConfig, GramModel)
register("tri", TriConfig, TriModel)

__all__ = [
    "FrameRecipe",
    "GramConfig",
    "GramLayer",
    "GramModel",
    "StructuredFrame",
    "TriConfig",
    "TriFactors",
    "TriLayer",
    "TriModel",
    "apply_sb",
    "check_same_frames",
    "export_lora",
    "first_step_statistics",
    "gram_to_lora",
    "lora_factors",
    "sb_factors",
    "tri_to_lora",
]
