"""How good a model is on held-out examples, never with the logits of a whole batch of texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedcore.training.encoding import IGNORED, Examples
from fedcore.training.forward import Forward
from fedcore.training.token_head import LOGITS_BUDGET, TokenHead

_COPIES = 3
"""The model's logits, an fp32 copy and their exponentials."""


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
    forward: Forward,
    examples: Examples,
    indices: Tensor,
    batch_size: int = 64,
    logits_budget: int = LOGITS_BUDGET,
) -> Evaluation:
    """Predict ``examples[indices]`` in evaluation mode.

    Args:
        batch_size: examples of a forward pass.
        logits_budget: bytes that the logits of a language model may take at once, with their
            working copies. Where its head cannot be taken apart (``forward.head`` is a text), its
            batches are as small as that takes, one example at least.
    """
    forward.eval()
    outcomes = [torch.zeros(3, 0, dtype=torch.float64)]
    for batch in indices.split(batch_size) if len(indices) else ():
        targets = examples.targets(batch)
        if targets.dim() == 1:
            outcomes.append(_outcome(forward(batch).float().cpu(), targets))
        elif isinstance(forward.head, TokenHead):
            outcomes.append(_by_tokens(forward, forward.head, batch, targets, logits_budget))
        else:
            outcomes.extend(_whole(forward, examples, batch, logits_budget))
    predictions, correct, losses = torch.cat(outcomes, dim=1)
    return Evaluation(indices, predictions.long(), correct.long(), losses.float())


def _by_tokens(
    forward: Forward, head: TokenHead, batch: Tensor, targets: Tensor, budget: int
) -> Tensor:
    """``(3, B)``: predictions, right ones and losses of each example of ``batch``."""
    states = forward.states(batch)
    places = (targets != IGNORED).to(states.device)
    chosen = states[places]
    wanted, owner = targets[places.cpu()], places.nonzero()[:, 0].cpu()
    outcome = torch.zeros(3, len(batch), dtype=torch.float64)
    first = 0
    for logits in head.logits(chosen, budget):
        part = slice(first, first + len(logits))
        outcome.index_add_(1, owner[part], _single(logits, wanted[part].to(logits.device)))
        first = part.stop
    return outcome


def _whole(forward: Forward, examples: Examples, batch: Tensor, budget: int) -> Iterator[Tensor]:
    """The same from the model's own logits, of as many examples at a time as fit."""
    first, rest = batch[:1], batch[1:]
    logits = forward(first)
    yield _outcome(logits.float().cpu(), examples.targets(first))
    # Padded to the longest of the batch at most.
    longest = examples.targets(batch).shape[1] * logits.shape[-1]
    for part in rest.split(max(1, budget // (_COPIES * 4 * longest))):
        if len(part):
            yield _outcome(forward(part).float().cpu(), examples.targets(part))


def _outcome(logits: Tensor, targets: Tensor) -> Tensor:
    single = _single(logits.flatten(0, -2), targets.flatten())
    return single.view(3, len(targets), -1).sum(dim=2)


def _single(logits: Tensor, targets: Tensor) -> Tensor:
    """fp64 ``(3, n)`` on the CPU: for each target whether it is wanted, was predicted, its loss."""
    wanted = targets != IGNORED
    losses = nn.functional.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
    correct = (logits.argmax(dim=-1) == targets) & wanted
    return torch.stack([wanted.double(), correct.double(), losses.double()]).cpu()


def _ratio(total: Tensor, count: Tensor) -> float:
    number = int(count.sum())
    return float(total.double().sum()) / number if number else float("nan")
