"""How good a model is on held-out examples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedcore.training.encoding import EncodedDataset
from fedcore.training.forward import Forward


@dataclass(frozen=True)
class Evaluation:
    """Per-example outcome on ``indices``: whether the prediction was right, and its loss."""

    indices: Tensor
    correct: Tensor
    losses: Tensor

    @property
    def accuracy(self) -> float:
        """Share of right predictions; ``nan`` without examples."""
        return float(self.correct.double().mean()) if len(self.correct) else float("nan")

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats; ``nan`` without examples."""
        return float(self.losses.double().mean()) if len(self.losses) else float("nan")

    def accuracy_on(self, indices: Tensor) -> float:
        """Accuracy on those of the evaluated examples that ``indices`` names; ``nan`` if none."""
        chosen = self.correct[torch.isin(self.indices, indices)]
        return float(chosen.double().mean()) if len(chosen) else float("nan")


@torch.no_grad()
def evaluate(
    forward: Forward, examples: EncodedDataset, indices: Tensor, batch_size: int = 64
) -> Evaluation:
    """Predict ``examples[indices]`` in evaluation mode."""
    forward.eval()
    correct, losses = [], []
    for batch in indices.split(batch_size) if len(indices) else ():
        logits = forward(batch).float().cpu()
        labels = examples.labels[batch]
        correct.append(logits.argmax(dim=-1) == labels)
        losses.append(nn.functional.cross_entropy(logits, labels, reduction="none"))
    empty = torch.zeros(0)
    return Evaluation(
        indices,
        torch.cat(correct) if correct else empty.bool(),
        torch.cat(losses) if losses else empty,
    )
