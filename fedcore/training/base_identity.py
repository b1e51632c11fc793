"""The identity of the base model in memory: its weights as they are stored, and what is around it.

Of every tensor that the model would save, sampled blocks are hashed as they lie in memory, packed
low-bit weights and their scales too, so that quantisation is part of the identity. Blocks are drawn
from the tensor's name: every site reads the same ones. They find another checkpoint, another
format, a fine-tuned base; a single changed number of a large tensor is seen only where its block is
drawn, unless the mode is ``"full"``. It guards against mistakes, not against malice.

Cost: ``"sampled"`` reads 64 KiB of every tensor, 0.4 s for a model of 7 billion parameters;
``"full"`` reads all of it, at about 0.5 GB/s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from fedcore.checks import choice
from fedcore.data.base_identity import MODES, WRAPPERS, BaseIdentity, plain_name
from fedcore.errors import FedcoreError

BLOCKS, BLOCK = 16, 4096
"""Sampled blocks of a tensor, and their bytes; smaller tensors are hashed whole."""

_CHUNK = 1 << 26

_NOT_THE_BASE = frozenset(
    {
        # Set by training and generation, or by the version that writes.
        "transformers_version",
        "use_cache",
        "problem_type",
        "pad_token_id",
        "gradient_checkpointing",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        # Where it was read from, and what its tensors say themselves.
        "architectures",
        "dtype",
        "torch_dtype",
    }
)
"""Fields of a configuration in which equal bases differ; so do those that begin with ``_``."""


def identity_of(model: nn.Module, tokenizer: Any = None, mode: str = "sampled") -> BaseIdentity:
    """The identity of ``model``'s base, and of ``tokenizer`` and its chat template where it is set.

    It is that of the plain base whether or not PEFT has wrapped it, and does not change by use.
    Tied tensors count once, under their first name. What an adapter trains of the base itself
    (``bias="all"``) or replaces (``modules_to_save``) is in it;
    :meth:`~fedcore.data.base_identity.BaseIdentity.without` leaves it out.

    Args:
        model: a model in memory, in any format.
        tokenizer: of transformers, or a processor that has one.
        mode: ``"sampled"`` blocks of each tensor, or ``"full"``.

    Raises:
        FedcoreError: another mode, or a tensor whose values are not in memory.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> identity_of(layer) == identity_of(layer)
        True
        >>> list(identity_of(layer).tensors)
        ['weight', 'bias']
    """
    choice("", "mode", mode, MODES)
    unwrap: Any = getattr(model, "get_base_model", None)
    base = model if unwrap is None else unwrap()
    config, quantisation = _configuration(base)
    weights = {}
    for name, tensor in stored_tensors(base):
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        quantisation[name] = f"{str(tensor.dtype).removeprefix('torch.')} {shape}"
        weights[name] = tensor_digest(name, tensor, mode)
    entries = {"config": config, "quantisation": quantisation, "weights": weights}
    if tokenizer is not None:
        # A processor of images or sound holds one.
        inner = tokenizer if hasattr(tokenizer, "get_vocab") else tokenizer.tokenizer
        entries["tokenizer"] = _tokenizer(inner)
        entries["template"] = {
            "chat_template": _digest(getattr(tokenizer, "chat_template", None)),
        }
    return BaseIdentity.of(mode, entries)


def stored_tensors(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that ``base`` would save, by the plain base's names, without an adapter's own.

    Raises:
        FedcoreError: the values of a tensor are not in memory.
    """
    # Of a module that wraps another, only what lies inside the other is the base's.
    wrapping = {
        name: inner
        for name, module in base.named_modules()
        for inner, _ in module.named_children()
        if inner in WRAPPERS
    }
    seen: set[int] = set()
    for key, value in base.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or id(value) in seen or not _is_base(key, wrapping):
            continue
        seen.add(id(value))
        for name, tensor in _parts(plain_name(key), value.detach()):
            if tensor.is_meta:
                raise FedcoreError(
                    f"the values of {name} are not in memory (they are offloaded), so the base "
                    "has no identity; load the model onto one device"
                )
            yield name, tensor


def tensor_digest(name: str, tensor: Tensor, mode: str = "sampled") -> str:
    """16 hex digits of a tensor's name, dtype, shape and bytes."""
    total = sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    data = tensor.contiguous().flatten().view(torch.uint8)
    if mode == "full" or data.numel() <= BLOCKS * BLOCK:
        pieces = data.split(_CHUNK)
    else:
        pieces = (torch.cat([data[s : s + BLOCK] for s in _places(name, data.numel())]),)
    for piece in pieces:
        total.update(piece.cpu().numpy())
    return total.hexdigest()[:16]


def _places(name: str, size: int) -> list[int]:
    """Where the sampled blocks of ``size`` bytes begin, the same on every machine."""
    digests = (sha256(f"{name} {i}".encode()).digest() for i in range(BLOCKS))
    return sorted(int.from_bytes(digest[:8], "big") % (size - BLOCK + 1) for digest in digests)


def _is_base(key: str, wrapping: Mapping[str, str]) -> bool:
    segments = key.split(".")
    for i in range(len(segments)):
        inner = wrapping.get(".".join(segments[:i]))
        if inner is not None and segments[i] != inner:
            return False
    return True


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """``tensor``, or what a tensor class of a quantisation library is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor
        return
    for inner in flatten()[0]:
        yield from _parts(f"{name}.{inner}", getattr(tensor, inner))


def _configuration(base: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Field to digest: of the model's configuration, and of its quantisation."""
    config: Any = getattr(base, "config", None)
    values = _plain(config.to_dict()) if hasattr(config, "to_dict") else {}
    quantisation = values.pop("quantization_config", None) or {}
    return (
        {str(name): _digest(value) for name, value in sorted(values.items())},
        {f"quantization_config.{n}": _digest(v) for n, v in sorted(quantisation.items())},
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            str(name): _plain(inner)
            for name, inner in value.items()
            if not str(name).startswith("_") and name not in _NOT_THE_BASE
        }
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _tokenizer(tokenizer: Any) -> dict[str, str]:
    """Setting to digest."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        settings = {"vocabulary": tokenizer.get_vocab()}
    else:
        settings = json.loads(backend.to_str())
        # A call with padding or truncation leaves its settings in the backend.
        for name in ("padding", "truncation"):
            settings.pop(name, None)
    special = getattr(tokenizer, "special_tokens_map", {})
    settings["special tokens"] = {
        name: str(token) for name, token in special.items() if name != "pad_token"
    }
    return {name: _digest(value) for name, value in settings.items()}


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
