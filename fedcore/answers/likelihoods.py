"""Log-likelihoods of options after a prompt, which is read once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedcore.answers.cached import CachedModel, Read, check_positions, tokens_of
from fedcore.answers.task import AnswerTask
from fedcore.errors import FedcoreError


def option_likelihoods(
    model: CachedModel,
    tokenizer: Any,
    task: AnswerTask,
    batch_size: int,
    done: Callable[[int], None] = lambda rows: None,
) -> list[list[float]]:
    """For each row the log-likelihood of each of its options in nats, in fp64.

    An option's tokens are those that follow the prompt's in the tokens of both together.

    Args:
        batch_size: prompts that are read at once.
        done: called with the number of rows of each batch.

    Raises:
        FedcoreError: an option changes the prompt's tokens, or both are too long for the model,
            naming the row.
    """
    prompts, options = [], []
    for number, row in enumerate(task.rows, start=1):
        what = f"{task.name}, row {number}"
        prompt = tokens_of(tokenizer, row.prompt, what)
        wholes = [tokens_of(tokenizer, row.prompt + option, what) for option in row.options]
        for whole in wholes:
            if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
                raise FedcoreError(
                    f"{what}: an option changes the prompt's tokens, so that its likelihood is not "
                    "that of a continuation; begin options with a blank, and end the prompt "
                    "without one"
                )
            check_positions(model, len(whole), what)
        prompts.append(prompt)
        options.append([whole[len(prompt) :] for whole in wholes])
    # Of like length side by side: less padding.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    scores: list[list[float]] = [[] for _ in order]
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        part = [prompts[i] for i in batch], [options[i] for i in batch]
        for i, values in zip(
            batch, (_cached if model.caches else _whole)(model, *part), strict=True
        ):
            scores[i] = values
        done(len(batch))
    return scores


def _cached(
    model: CachedModel, prompts: Sequence[list[int]], options: Sequence[list[list[int]]]
) -> list[list[float]]:
    read = model.read(prompts)
    first = read.logits.log_softmax(dim=-1)
    scores = [[float(first[i, option[0]]) for option in row] for i, row in enumerate(options)]
    longer = [(i, j) for i, row in enumerate(options) for j, o in enumerate(row) if len(o) > 1]
    if longer:
        rest = _following(model, read.chosen([i for i, _ in longer]), longer, options)
        for (i, j), value in zip(longer, rest, strict=True):
            scores[i][j] += value
    return scores


def _following(
    model: CachedModel,
    read: Read,
    pairs: Sequence[tuple[int, int]],
    options: Sequence[list[list[int]]],
) -> list[float]:
    """Of each option in ``pairs``, the log-likelihood of its tokens after the first."""
    tokens = [options[i][j] for i, j in pairs]
    width = max(map(len, tokens)) - 1
    ids = torch.tensor([t[:-1] + t[-1:] * (width - len(t) + 1) for t in tokens])
    mask = torch.tensor([[1] * (len(t) - 1) + [0] * (width - len(t) + 1) for t in tokens])
    logits, _ = model.follow(read, ids.to(model.device), mask.to(model.device))
    return [_sum(logits[k, : len(t) - 1], t[1:]) for k, t in enumerate(tokens)]


def _whole(
    model: CachedModel, prompts: Sequence[list[int]], options: Sequence[list[list[int]]]
) -> list[list[float]]:
    """The same by reading prompt and option from the beginning, one after the other."""
    return [
        [_sum(model.logits(prompt + option)[len(prompt) - 1 : -1], option) for option in row]
        for prompt, row in zip(prompts, options, strict=True)
    ]


def _sum(logits: Tensor, tokens: Sequence[int]) -> float:
    """The log-likelihood of ``tokens``, each by its row of logits ``(S, V)``."""
    targets = torch.tensor(tokens, device=logits.device)[:, None]
    return float(logits.log_softmax(dim=-1).gather(1, targets).double().sum())
