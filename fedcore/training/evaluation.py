"""How good a model is on held-out examples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedcore.training.encoding import IGNORED, EncodedDataset
from fedcore.training.forward import Forward


@dataclass(frozen=True)
class Evaluation:
    """Outcome by example on ``indices``.

    An example is one prediction of a classifier and one per token of a language model.
    Means are over predictions, so long texts weigh more than short ones.

    Attributes:
        indices: int64 ``(n,)``.
        predictions: int64 ``(n,)``, predictions asked for.
        correct: int64 ``(n,)``, how many of them were right.
        losses: ``(n,)``, their cross-entropies in nats, summed.
    """

    indices: Tensor
    predictions: Tensor
    correct: Tensor
    losses: Tensor

    @property
    def accuracy(self) -> float:
        """Share of right predictions; ``nan`` without any."""
        return _ratio(self.correct, self.predictions)

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats; ``nan`` without predictions."""
        return _ratio(self.losses, self.predictions)

    def on(self, indices: Tensor) -> Evaluation:
        """The outcome on those of the evaluated examples that ``indices`` names."""
        chosen = torch.isin(self.indices, indices)
        return Evaluation(
            self.indices[chosen],
            self.predictions[chosen],
            self.correct[chosen],
            self.losses[chosen],
        )


def prediction_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the predictions that ``targets`` asks for, in fp32.

    Args:
        logits: ``(..., classes)``.
        targets: int64 ``(...)``, :data:`~fedcore.training.encoding.IGNORED` where none is asked.
    """
    return nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten().to(logits.device), ignore_index=IGNORED
    )


@torch.no_grad()
def evaluate(
    forward: Forward, examples: EncodedDataset, indices: Tensor, batch_size: int = 64
) -> Evaluation:
    """Predict ``examples[indices]`` in evaluation mode."""
    forward.eval()
    asked, correct, losses = [], [], []
    for batch in indices.split(batch_size) if len(indices) else ():
        logits = forward(batch).float().cpu()
        targets = examples.targets(batch)
        wanted = targets != IGNORED
        asked.append(_by_example(wanted))
        correct.append(_by_example((logits.argmax(dim=-1) == targets) & wanted))
        single = nn.functional.cross_entropy(
            logits.flatten(0, -2), targets.flatten(), reduction="none", ignore_index=IGNORED
        )
        losses.append(_by_example(single.view_as(targets)))
    empty = torch.zeros(0, dtype=torch.int64)
    return Evaluation(
        indices,
        torch.cat(asked) if asked else empty,
        torch.cat(correct) if correct else empty,
        torch.cat(losses) if losses else empty.float(),
    )


def _by_example(values: Tensor) -> Tensor:
    """``(B, ...)`` summed to ``(B,)``."""
    return values.reshape(len(values), -1).sum(dim=1)


def _ratio(total: Tensor, count: Tensor) -> float:
    number = int(count.sum())
    return float(total.double().sum()) / number if number else float("nan")
