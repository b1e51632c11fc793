"""Causal language models with their tokenizers: a packaged one, a local folder, or a hub id."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import torch

from fedcore.errors import FedcoreError
from fedcore.training.layers import eval_mode
from fedcore.training.models import (
    check_complete,
    check_model_source,
    gguf_file,
    loading,
    quiet_transformers,
    ready,
)
from fedcore.training.weight_format import WeightFormat


def load_language_model(
    source: str,
    *,
    dtype: torch.dtype | None = None,
    weights: WeightFormat | None = None,
    device: torch.device | None = None,
) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Nothing is added to the checkpoint and nothing is drawn. A GGUF file is read into plain weights
    of a floating type: what its 4-bit blocks stand for, exactly, so that any adapter can be trained
    on them, by a Trainer too. The tokenizer pads on the right, with its end token if it has no
    padding token.

    Args:
        source: ``"smollm2"``, a local folder, or a hub id as ``owner/name`` or ``hf:name``. A
            folder holds a checkpoint as transformers saves it, or one GGUF file.
        dtype: floating type of the weights; that of ``weights`` by default.
        weights: in which numbers they are held; plain fp32 by default.
        device: for quantised weights; the CPU by default.

    Returns:
        The transformers model, on the CPU unless it is quantised, in evaluation mode, and its
        tokenizer.

    Raises:
        FedcoreError: an unknown source (before anything is downloaded), a type that is not
            floating, a quantisation beside a GGUF file, a checkpoint that cannot be loaded, lacks
            weights, or is of a model whose tokens see later ones, or a tokenizer with neither a
            padding nor an end token.
        MissingExtraError: transformers, gguf, bitsandbytes or the package that holds the model is
            not installed.
    """
    origin = check_model_source(source)
    stored = weights or WeightFormat()
    if dtype is not None and not dtype.is_floating_point:
        raise FedcoreError(f"dtype is {dtype}; weights need a floating type")
    stored.check()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"local_files_only": origin.kind != "hub"}
    file = gguf_file(origin)
    if file is not None and stored.quantisation is not None:
        raise FedcoreError(
            f"model {source!r} is a GGUF file, which is read into plain weights; leave out "
            "model.quantisation, or pass a checkpoint of transformers"
        )
    if file is not None:
        where["gguf_file"] = file
    numbers = stored.arguments(device or torch.device("cpu"))
    if dtype is not None:
        numbers["dtype"] = dtype
    # Reading a GGUF file draws a progress bar that transformers has no switch for.
    with loading(source), quiet_transformers(), redirect_stderr(StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(origin.location, **where)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            origin.location, output_loading_info=True, **numbers, **where
        )
    model, info = loaded
    check_complete(source, model, info)
    if file is not None:
        _say_plain(model)
    tokenizer.padding_side = "right"
    ready(source, model, tokenizer)
    _check_causal(source, model)
    return model, tokenizer


def _say_plain(model: Any) -> None:
    """transformers marks a model as quantised whose blocks it has read into plain weights, and no
    Trainer trains one with these marks.
    """
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(mark, None)
    vars(model.config).pop("quantization_config", None)


@torch.no_grad()
def _check_causal(source: str, model: Any) -> None:
    """A token that sees the next one predicts it from itself, and the loss means nothing."""
    ids = torch.tensor([[0, 1], [0, 2]], device=next(model.parameters()).device)
    with eval_mode(model):
        first, second = model(input_ids=ids).logits[:, 0]
    # Weights of few bits are multiplied by rows that are rounded together.
    rounding = 0.0 if model.dtype == torch.float32 and not _quantised(model) else 0.02
    allowed = max(1e-8, rounding * float(first.abs().max().nan_to_num(0.0, 0.0, 0.0)))
    if not torch.allclose(first, second, atol=allowed, equal_nan=True):
        raise FedcoreError(
            f"model {source!r} ({type(model).__name__}) lets tokens see later ones; pass a "
            "causal language model"
        )


def _quantised(model: Any) -> bool:
    return getattr(model.config, "quantization_config", None) is not None
