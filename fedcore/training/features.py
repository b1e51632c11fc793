"""Features of examples from the model as it stands, for statements about a client's data."""

from __future__ import annotations

from hashlib import sha256

import torch
from torch import Tensor, nn

from fedcore.training.encoding import Examples
from fedcore.training.layers import eval_mode


@torch.no_grad()
def mean_states(model: nn.Module, examples: Examples, batch_size: int = 64) -> Tensor:
    """The last hidden states averaged over an example's tokens: ``(n, width)`` fp32 on the CPU.

    Runs in eval mode; with an adapter that starts at zero these are the base model's features.
    """
    device = next(model.parameters()).device
    means = []
    with eval_mode(model):
        for rows in torch.arange(len(examples)).split(batch_size):
            ids, mask = (tensor.to(device) for tensor in examples.inputs(rows).values())
            outputs = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
            states = outputs.hidden_states[-1].float()
            attended = mask.unsqueeze(-1).to(states.dtype)
            means.append(((states * attended).sum(dim=1) / attended.sum(dim=1).clamp(min=1)).cpu())
    return torch.cat(means)


def encoder_digest(model: nn.Module) -> Tensor:
    """A hash of every frozen parameter: uint8 ``(32,)``, equal where features are comparable."""
    total = sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad:
            values = parameter.detach().cpu().contiguous()
            total.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
            total.update(values.flatten().view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(total.digest()), dtype=torch.uint8).clone()
