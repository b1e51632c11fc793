"""The tuner that puts Gram layers into a base model."""

from __future__ import annotations

from fedcore.tuners.gram.config import GramConfig
from fedcore.tuners.gram.frames import FrameRecipe, check_same_frames
from fedcore.tuners.gram.layer import GramLayer
from fedcore.tuners.shared.tuner import ShapeCheckedTuner


class GramModel(ShapeCheckedTuner):
    """PEFT's tuner for :class:`GramConfig`; made by ``get_peft_model`` and ``PeftModel``.

    Raises:
        FedcoreError: as :class:`ShapeCheckedTuner`, or a frame that is rebuilt from its recipe is
            not the one that the adapter was made with.
    """

    prefix = "gram_"
    tuner_layer_cls = GramLayer
    recorded = ("module_shapes", "frame_ids")

    def _check_module(self, config: GramConfig, module: str, shape: tuple[int, int]) -> None:
        super()._check_module(config, module, shape)
        if config.frame == "structured":
            recipe = FrameRecipe(config.frame, config.frame_seed, module, *shape)
            rebuilt = {module: recipe.frame_id}
            check_same_frames(config.frame_ids, rebuilt, "adapter configuration")

    def _record(self, config: GramConfig, module: str, layer: GramLayer, adapter_name: str) -> None:
        super()._record(config, module, layer, adapter_name)
        config.frame_ids[module] = layer.frame_ids[adapter_name]
