"""What a model writes after prompts, by its likeliest tokens, in batches with a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fedcore.answers.cached import CachedModel, check_positions, tokens_of
from fedcore.answers.marking import until
from fedcore.answers.task import AnswerTask


def continuations(
    model: CachedModel,
    tokenizer: Any,
    task: AnswerTask,
    batch_size: int,
    done: Callable[[int], None] = lambda rows: None,
) -> list[str]:
    """The continuation of each row's prompt, truncated at the task's first stop string.

    A continuation ends at an end token, at a stop string, after ``task.max_tokens``, or where the
    model has no more positions.

    Args:
        batch_size: prompts that are continued at once.
        done: called with the number of rows of each batch.

    Raises:
        FedcoreError: a prompt leaves the model no position to write at, naming the row.
    """
    prompts = []
    for number, row in enumerate(task.rows, start=1):
        what = f"{task.name}, row {number}"
        prompts.append(tokens_of(tokenizer, row.prompt, what))
        check_positions(model, len(prompts[-1]) + 1, what)
    ends = _ends(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), batch_size if model.caches else 1):
        batch = order[start : start + (batch_size if model.caches else 1)]
        written = _written(model, [prompts[i] for i in batch], tokenizer, task, ends)
        for i, tokens in zip(batch, written, strict=True):
            texts[i] = until(_words(tokenizer, prompts[i], tokens), task.stop)
        done(len(batch))
    return texts


def _written(
    model: CachedModel,
    prompts: Sequence[list[int]],
    tokenizer: Any,
    task: AnswerTask,
    ends: frozenset[int],
) -> list[list[int]]:
    """The tokens after each prompt, end tokens left out."""
    written: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    most = task.max_tokens
    if model.longest is not None:
        most = min(most, model.longest - max(map(len, prompts)))
    read = model.read(prompts) if model.caches else None
    for step in range(most):
        if read is None:
            following = [int(model.logits(prompts[0] + written[0])[-1].argmax())]
        else:
            following = read.logits.argmax(dim=-1).tolist()
        for i in tuple(open_rows):
            if following[i] in ends:
                open_rows.discard(i)
                continue
            written[i].append(following[i])
            if task.stop and _stops(tokenizer, written[i], task.stop):
                open_rows.discard(i)
        if not open_rows:
            break
        if read is not None and step + 1 < most:
            # Rows that have ended are read along, and what follows in them is left out.
            ids = torch.tensor(following, device=model.device)[:, None]
            _, read = model.follow(read, ids, torch.ones_like(ids))
    return written


def _stops(tokenizer: Any, tokens: list[int], stops: Sequence[str]) -> bool:
    """Whether the newest tokens complete a stop string."""
    # A character takes up to four tokens of bytes.
    newest = tokens[-(4 * max(map(len, stops)) + 4) :]
    text = tokenizer.decode(newest, skip_special_tokens=True)
    return any(stop in text for stop in stops)


def _words(tokenizer: Any, prompt: list[int], tokens: list[int]) -> str:
    """The text of ``tokens`` after ``prompt``, with the blanks that it begins with."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before: str = tokenizer.decode(prompt, **options)
    whole: str = tokenizer.decode(prompt + tokens, **options)
    if whole.startswith(before):
        return whole[len(before) :]
    alone: str = tokenizer.decode(tokens, **options)
    return alone


def _ends(model: CachedModel, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's, and those of the model's generation."""
    return frozenset(
        token for token in (tokenizer.eos_token_id, *model.ends) if isinstance(token, int)
    )
