"""Put an adapter on a base model: LoRA, FLoRG's Gram adapter, a tri-factor adapter, or none."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedcore.errors import FedcoreError, unknown_name
from fedcore.tuners.gram.config import GramConfig
from fedcore.tuners.tri.config import TriConfig

_FAMILIES = ("lora", "gram", "tri", "none")

HEADS = ("classifier", "score")
"""What the classifiers of transformers call their head."""


def attach_adapter(
    model: nn.Module,
    family: str,
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str] | Literal["all-linear"],
    layers: Sequence[int] | None,
    use_rslora: bool,
    init_std: float | None,
    frame: str,
    seed: int,
    init: str = "random",
    task_type: str = "SEQ_CLS",
    whole_model: bool = False,
    dropout: float = 0.0,
    use_dora: bool = False,
    modules_to_save: Sequence[str] = (),
) -> nn.Module:
    """Wrap ``model`` so that only the adapter trains, and with a classifier its head.

    Args:
        family: ``"lora"``, ``"gram"``, ``"tri"`` or ``"none"`` (the head alone).
        target_modules: names of the adapted linear layers, as PEFT matches them, or
            ``"all-linear"``: every one but the head.
        layers: transformer layers to adapt, counted from 0, negative from the end; all by default.
        init_std: standard deviation of a Gram adapter's initial factor; its own default if None.
        frame: the kind of FLoRG's frames.
        seed: seeds the initial factors and the frames, independently of the global generator.
        init: how a tri-factor adapter starts, as :class:`~fedcore.tuners.tri.config.TriConfig` has
            it; the other families have one start.
        task_type: PEFT's name of the task. A classifier's head (``"SEQ_CLS"``) trains with the
            adapter; a language model's (``"CAUSAL_LM"``) is part of the frozen base.
        dropout: of the inputs of LoRA's factors, while they train.
        use_dora: LoRA with a trained magnitude per output (DoRA, arXiv 2402.09353).
        modules_to_save: ends of the names of modules that train whole beside the adapter.
        whole_model: without an adapter, every parameter trains and not the head alone.

    Raises:
        FedcoreError: no layer of the model is called so, the rank is more than a layer's update can
            have, a layer index is out of range, the family or the start is unknown, or the start
            does not fit a layer; an option that the family does not have; a quantised base where
            all of it trains.
    """
    if family not in _FAMILIES:
        raise unknown_name("adapter family", family, _FAMILIES)
    if family == "none":
        (_train_all if whole_model else _freeze_all_but_head)(model)
        return model
    common: dict[str, Any] = {
        "task_type": task_type,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "target_modules": target_modules,
        "layers_to_transform": _layer_indices(model, layers),
        "modules_to_save": list(modules_to_save) or None,
    }
    if family != "lora":
        _check_plain(family, dropout=dropout, use_dora=use_dora)
    if target_modules == "all-linear":
        common["target_modules"] = targets = _linear_layers(model)
    else:
        common["target_modules"] = targets = list(target_modules)
    _check_targets(model, targets)
    _check_targets(model, modules_to_save)
    _check_rank(model, targets, rank)
    config: PeftConfig
    if family == "lora":
        config = LoraConfig(lora_dropout=dropout, use_dora=use_dora, bias="none", **common)
    elif family == "gram":
        small = seed % 2**31
        config = GramConfig(
            frame=frame, frame_seed=small, init_seed=small, init_std=init_std, **common
        )
    else:
        config = TriConfig(init=init, init_seed=seed % 2**31, **common)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # transformers deprecates a property that peft still reads.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        torch.manual_seed(seed)
        wrapped: nn.Module = get_peft_model(model, config)
        return wrapped


def _check_plain(family: str, **options: Any) -> None:
    for name, value in options.items():
        if value:
            raise FedcoreError(
                f"{name} is {value!r}, which adapters of family {family!r} do not have; leave it "
                "out, or use a method for LoRA"
            )


def _linear_layers(model: nn.Module) -> list[str]:
    """The ends of the names of all linear layers, without the head and a language model's output.

    A layer and a head that end alike are told apart by their whole names.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    layers: set[str] = set()
    others: set[str] = set()
    for name, module in model.named_modules():
        inner = module is not output and name.split(".")[0] not in HEADS
        linear = inner and isinstance(module, nn.Linear | Conv1D)
        (layers if linear else others).add(name)
    if not layers:
        raise FedcoreError("target_modules is 'all-linear', and the model has no linear layer")
    ends = {name.rpartition(".")[2] for name in layers}
    taken = {name.rpartition(".")[2] for name in others}
    whole = {name for name in layers if name.rpartition(".")[2] in ends & taken}
    return sorted(whole | (ends - taken))


def _freeze_all_but_head(model: nn.Module) -> None:
    names = [name for name, _ in model.named_children() if name in HEADS]
    if not names:
        children = ", ".join(name for name, _ in model.named_children())
        raise FedcoreError(
            f"the model has no classifier head (classifier or score) to train, only {children}"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in names)


def _train_all(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise FedcoreError(
                f"{name} holds {parameter.dtype} numbers, and a quantised model cannot be trained "
                "whole; train an adapter, or load the model without quantisation"
            )
        parameter.requires_grad_(True)


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    linear = {name for name, module in model.named_modules() if hasattr(module, "weight")}
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            ends = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise FedcoreError(
                f"target module {target!r} is not in the model; its layers end in {', '.join(ends)}"
            )


def _check_rank(model: nn.Module, targets: Sequence[str], rank: int) -> None:
    """Refuse a rank that no update of a target can have, before factors of it are allocated."""
    for name, module in model.named_modules():
        if not any(name == target or name.endswith(f".{target}") for target in targets):
            continue
        sides = _sides(module)
        if rank > min(sides, default=rank):
            raise FedcoreError(
                f"rank {rank} is more than an update of {name} can have, which is "
                f"{sides[0]} x {sides[1]}; pass {min(sides)} at most"
            )


def _sides(module: nn.Module) -> tuple[int, ...]:
    """Output and input width of a layer, of a quantised one too; empty where they are not known."""
    widths = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(widths[0], int) and isinstance(widths[1], int):
        return widths[0], widths[1]
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() > 1:
        return weight.shape[0], weight[0].numel()
    return ()


def _layer_indices(model: nn.Module, layers: Sequence[int] | None) -> list[int] | None:
    if layers is None:
        return None
    count = int(getattr(model.config, "num_hidden_layers", 0))
    for layer in layers:
        if not -count <= layer < count:
            raise FedcoreError(f"layer {layer} does not exist; the model has {count} layers")
    return sorted({layer % count for layer in layers})
