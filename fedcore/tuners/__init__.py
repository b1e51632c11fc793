"""Adapters as PEFT tuner types; importing this package makes them known to PEFT."""

# First, because without PEFT it raises the error that names the extra to install.
from fedcore.tuners.registration import register  # isort: skip

from fedcore.tuners.export import export_lora, gram_to_lora
from fedcore.tuners.frames import FrameRecipe, StructuredFrame, check_same_frames
from fedcore.tuners.gram_config import GramConfig
from fedcore.tuners.gram_layer import GramLayer
from fedcore.tuners.gram_model import GramModel
from fedcore.tuners.lora_factors import lora_factors

register("gram", GramConfig, GramModel)

__all__ = [
    "FrameRecipe",
    "GramConfig",
    "GramLayer",
    "GramModel",
    "StructuredFrame",
    "check_same_frames",
    "export_lora",
    "gram_to_lora",
    "lora_factors",
]
