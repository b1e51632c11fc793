"""What a language model writes when it always takes the likeliest token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedcore.training.layers import eval_mode


@torch.no_grad()
def continue_greedily(
    model: nn.Module, prompt: Tensor, tokens: int, end: int | None = None
) -> Tensor:
    """At most ``tokens`` tokens after ``prompt``, none after the token ``end``.

    Each step reads the whole text again: adapters of any kind work as they do in training, and a
    few dozen tokens cost little.

    Args:
        model: a causal language model, PEFT-wrapped or not.
        prompt: int64 ``(T,)``.

    Returns:
        int64 ``(at most tokens,)``, without the prompt, ``end`` left out.
    """
    device = next(model.parameters()).device
    text = prompt.to(device)
    with eval_mode(model):
        for _ in range(tokens):
            following = model(input_ids=text[None]).logits[0, -1].argmax()
            if end is not None and int(following) == end:
                break
            text = torch.cat([text, following[None]])
    return text[len(prompt) :].cpu()
