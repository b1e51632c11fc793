"""The language head apart from the layers below it, so that logits exist for few tokens at a time.

A pass of B texts of T tokens over a vocabulary of V makes ``4 B T V`` bytes of logits: 67 GB for
64 texts of 2048 tokens and V = 128256. Losses need one number per token. So the layers run once,
what enters the head is kept, and the head runs on the tokens that are predicted, some at a time.

What a model does to its logits after the head (a soft cap, a scale) is tried by name and compared
with the model's own logits; a model that does something else keeps its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedcore.training.layers import capture_input, eval_mode

LOGITS_BUDGET = 256 << 20
"""Bytes that logits and their working copies may take at once."""

_COPIES = 3
"""In fp32: the logits, what the model makes of them, and their exponentials."""

_PROBE = 8
"""Tokens on which logits are compared."""


@dataclass(frozen=True, eq=False)
class TokenHead:
    """The head of a causal language model; made by :meth:`find`.

    Attributes:
        module: hidden states ``(..., width)`` to raw logits ``(..., V)``.
        finish: raw logits to the model's own, number by number.
        vocabulary: V.
    """

    module: nn.Module
    finish: Callable[[Tensor], Tensor]
    vocabulary: int

    @classmethod
    def find(cls, model: nn.Module) -> TokenHead | str:
        """The head of ``model``, wrapped by PEFT or not, or why it cannot be taken apart.

        Runs the model on a few tokens to see that the head gives the model's own logits.
        """
        whole: Any = model
        base = whole.get_base_model() if hasattr(model, "get_base_model") else whole
        named: Any = getattr(base, "get_output_embeddings", None)
        module = None if named is None else named()
        if not isinstance(module, nn.Module):
            return "the model names no output embeddings"
        config = base.config.get_text_config()
        device = next(model.parameters()).device
        ids = (torch.arange(_PROBE, device=device) % config.vocab_size)[None]
        with torch.no_grad(), eval_mode(model):
            expected: Tensor = model(input_ids=ids).logits
            states = capture_input(lambda: model(input_ids=ids), module)
            if states is None or states.shape[:-1] != ids.shape:
                return "its head does not see every token"
            raw = module(states)
        for finish in _finishes(config):
            if _equal(finish(raw), expected):
                return cls(module, finish, expected.shape[-1])
        return "it does something to its logits that is not known"

    def tokens(self, budget: int) -> int:
        """How many tokens' logits fit into ``budget`` bytes with their working copies."""
        return max(1, budget // (_COPIES * 4 * self.vocabulary))

    def logits(self, states: Tensor, budget: int) -> Iterator[Tensor]:
        """Logits ``(n, V)`` in fp32 of ``states`` ``(N, width)``, in order, within ``budget``."""
        for part in states.split(self.tokens(budget)):
            yield self.finish(self.module(part[None])[0]).float()


def _finishes(config: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """What models make of raw logits, by the fields of their configurations; last, nothing."""

    def number(name: str) -> float:
        value = getattr(config, name, None)
        return float(value) if isinstance(value, int | float) and value else math.nan

    for name in ("final_logit_softcapping", "logits_soft_cap"):
        if not math.isnan(cap := number(name)):
            yield partial(_capped, cap)
    for name in ("logit_scale", "lm_head_multiplier"):
        if not math.isnan(factor := number(name)):
            yield partial(_scaled, factor)
    if not math.isnan(divisor := number("logits_scaling")):
        yield partial(_divided, divisor)
    yield _as_they_are


def _capped(cap: float, logits: Tensor) -> Tensor:
    return torch.tanh(logits / cap) * cap


def _scaled(factor: float, logits: Tensor) -> Tensor:
    return logits * factor


def _divided(divisor: float, logits: Tensor) -> Tensor:
    return logits / divisor


def _as_they_are(logits: Tensor) -> Tensor:
    return logits


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    size = float(theirs.abs().max())
    allowed = 32 * torch.finfo(theirs.dtype).eps * size if math.isfinite(size) else 0.0
    return torch.allclose(ours.float(), theirs.float(), rtol=0.0, atol=allowed, equal_nan=True)
