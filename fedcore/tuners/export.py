"""Adapters as plain LoRA of one rank and scale 1, exactly, for readers that know nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from fedcore.data.adapter_kind import not_additive
from fedcore.data.adapter_state import AdapterState
from fedcore.data.low_rank import LowRank
from fedcore.data.peft_files import read_adapter, write_adapter
from fedcore.data.plain_lora import plain_lora, with_residual
from fedcore.errors import FedcoreError
from fedcore.tuners.gram.frames import DenseFrame, Frame, FrameRecipe, StructuredFrame
from fedcore.tuners.lora_factors import lora_factors
from fedcore.tuners.tri.factors import tri_pair


def export_lora(
    source: str | Path | PeftModel, out_folder: str | Path, *, adapter_name: str | None = None
) -> Path:
    """Write an adapter as a plain LoRA folder; returns the folder.

    The rank is ``2r`` for a Gram adapter (``r`` without offset), ``r`` for a tri-factor adapter and
    the largest of any module for LoRA; ``lora_alpha`` is that rank, so the scale is 1; modules
    saved whole are kept.
    The base model is not needed: shapes stand in the configuration. Both files appear whole, or
    none does, and equal adapters give byte-identical files.

    Args:
        source: an adapter folder, or a live model.
        out_folder: made if missing.
        adapter_name: which adapter of a live model; its active one by default.

    Raises:
        FedcoreError: the source holds no adapter, one whose update does not add to the weights of
            linear layers alone, or lacks a tensor or shape it should have.
    """
    if isinstance(source, str | Path):
        if adapter_name is not None:
            raise FedcoreError(f"adapter_name is {adapter_name!r}; a folder holds one adapter")
        state = read_adapter(source)
    else:
        state = _live_state(source, adapter_name)
    convert = {"gram": gram_to_lora, "tri": tri_to_lora, "lora": lora_to_plain}.get(state.family)
    if convert is None:
        raise FedcoreError(f"adapter: is of family {state.family!r}; export needs an adapter")
    return write_adapter(convert(state), out_folder)


def gram_to_lora(state: AdapterState, name: str = "adapter") -> AdapterState:
    """The plain LoRA adapter that equals ``state``; ``name`` is what errors call it.

    Raises:
        FedcoreError: as :func:`export_lora`.
    """
    if state.family != "gram":
        raise FedcoreError(f"{name}: is of family {state.family!r}; export needs a 'gram' adapter")
    pairs = {
        module: lora_factors(
            named["A"],
            _initial(state, module, name),
            _frame(state, module, name),
            state.scaling[module],
        )
        for module, named in state.factors.items()
    }
    return _as_lora(state, pairs)


def tri_to_lora(state: AdapterState, name: str = "adapter") -> AdapterState:
    """The plain LoRA adapter ``B' = s B R``, ``A' = A`` that equals ``state``.

    Raises:
        FedcoreError: ``state`` is not a tri-factor adapter.
    """
    if state.family != "tri":
        raise FedcoreError(f"{name}: is of family {state.family!r}; export needs a 'tri' adapter")
    pairs = {
        module: tri_pair(named["A"], named["R"], named["B"], state.scaling[module])
        for module, named in state.factors.items()
    }
    return _as_lora(state, pairs)


def lora_to_plain(state: AdapterState, name: str = "adapter") -> AdapterState:
    """The LoRA adapter of one rank and scale 1 that equals ``state``.

    rsLoRA's scale and those of ``alpha_pattern`` go into ``B``, and modules of lower rank are
    filled with zeros: a reader that divides one ``lora_alpha`` by a tensor's rank gets the same
    model.

    Raises:
        FedcoreError: ``state`` is not a LoRA adapter, or trains something else than updates of
            linear layers and modules saved whole.
    """
    if state.family != "lora":
        raise FedcoreError(f"{name}: is of family {state.family!r}; export needs a 'lora' adapter")
    problem = not_additive(state.config, state.dense) or _beside_linear(state)
    if problem is not None:
        raise FedcoreError(f"{name}: {problem}; merge it into the model instead")
    return with_residual(state, {})


def _beside_linear(state: AdapterState) -> str | None:
    """What the adapter trains that plain LoRA of linear layers does not have, if anything."""
    for field in ("lora_bias", "trainable_token_indices", "target_parameters"):
        if state.config.get(field):
            return f"{field} is set, which plain LoRA does not have"
    if (state.config.get("bias") or "none") != "none":
        return f"bias is {state.config['bias']!r}, and plain LoRA trains none"
    if any("lora_embedding_" in key for key in state.keys.values()):
        return "it adapts an embedding"
    if any(form.axes for form in state.forms.values()):
        return "it adapts a convolution"
    return None


def _as_lora(state: AdapterState, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> AdapterState:
    updates = {module: LowRank(lora_B.T, lora_A) for module, (lora_A, lora_B) in pairs.items()}
    return plain_lora(updates, state)


def _live_state(model: PeftModel, adapter_name: str | None) -> AdapterState:
    active = model.active_adapters
    if adapter_name is None and len(active) != 1:
        raise FedcoreError(f"adapters {active} are active; pass adapter_name to choose one")
    chosen = active[0] if adapter_name is None else adapter_name
    if chosen not in model.peft_config:
        raise FedcoreError(f"adapter_name is {chosen!r}; the model has {sorted(model.peft_config)}")
    tensors = get_peft_model_state_dict(model, adapter_name=chosen)
    on_cpu = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
    return AdapterState.from_peft(on_cpu, model.peft_config[chosen].to_dict(), name=chosen)


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
