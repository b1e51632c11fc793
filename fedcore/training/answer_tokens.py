"""Rows of instruction data as examples: what a causal language model predicts of their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fedcore.errors import FedcoreError, missing_extra
from fedcore.training.encoding import IGNORED, Examples, Indices
from fedcore.training.instruction_rows import InstructionRows, Tokens


@dataclass(frozen=True, eq=False)
class AnswerTokens(Examples):
    """Token ids of n rows of their own lengths, of each of which some tokens are to be predicted.

    A batch is padded to its own longest row, so memory and work are those of its tokens.

    Attributes:
        input_ids: n arrays, int32 ``(T_i,)``.
        answers: n arrays of the same lengths, a token where it is to be predicted from those before
            it, and :data:`~fedcore.training.encoding.IGNORED` elsewhere.
        labels: int64 ``(n,)``, the rows' domains, by which they are split and dealt to the clients.
        pad: the token that fills up a batch, which no token of a row sees.
    """

    input_ids: tuple[Tokens, ...]
    answers: tuple[Tokens, ...]
    labels: Tensor
    pad: int

    def __post_init__(self) -> None:
        lengths = [list(map(len, rows)) for rows in (self.input_ids, self.answers)]
        if lengths[0] != lengths[1]:
            raise FedcoreError("input_ids and answers must have rows of the same lengths")
        if self.labels.shape != (len(self.input_ids),):
            raise FedcoreError(
                f"there are {len(self.input_ids)} rows and labels {tuple(self.labels.shape)}; pass "
                "one label for each row"
            )

    def inputs(self, batch: Tensor) -> dict[str, Tensor]:
        """Token ids and mask of the rows ``batch``: int64 ``(B, T)``, T their longest."""
        rows = [self.input_ids[int(i)] for i in batch]
        ids, mask = _padded(rows, self.pad), _padded([np.ones_like(row) for row in rows], 0)
        return {"input_ids": ids, "attention_mask": mask}

    def targets(self, batch: Tensor) -> Tensor:
        """The token after each token: int64 ``(B, T)``, ``IGNORED`` where none is predicted."""
        answers = _padded([self.answers[int(i)] for i in batch], IGNORED)
        targets = torch.full_like(answers, IGNORED)
        targets[:, :-1] = answers[:, 1:]
        return targets

    def tensors(self) -> dict[str, Tensor]:
        """All tokens, one row after the other, with the rows' lengths and domains."""
        none = np.zeros(0, dtype=np.int32)
        return {
            "input_ids": torch.from_numpy(np.concatenate((none, *self.input_ids))),
            "answers": torch.from_numpy(np.concatenate((none, *self.answers))),
            "lengths": torch.tensor([len(row) for row in self.input_ids], dtype=torch.int64),
            "labels": self.labels,
        }

    def take(self, indices: Indices) -> Self:
        """The rows at ``indices``, in that order."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        rows = index.tolist()
        return type(self)(
            tuple(self.input_ids[i] for i in rows),
            tuple(self.answers[i] for i in rows),
            self.labels[index],
            self.pad,
        )

    def dataset(self) -> Any:
        """A ``datasets.Dataset`` with the columns ``input_ids`` and ``labels``, as trl reads it.

        Raises:
            MissingExtraError: datasets is not installed.
        """
        try:
            from datasets import Dataset
        except ImportError as error:
            raise missing_extra("datasets", "llm") from error
        return Dataset.from_dict({"input_ids": list(self.input_ids), "labels": list(self.answers)})


def answer_tokens(
    rows: InstructionRows, tokenizer: Any, domains: Sequence[int] | None = None
) -> AnswerTokens:
    """``rows`` as examples of a model with ``tokenizer``.

    Args:
        rows: n rows.
        tokenizer: a transformers tokenizer with a padding token.
        domains: an index for each row by which rows are dealt to clients; all 0 by default.

    Raises:
        FedcoreError: no padding token, or another number of domains than of rows.
    """
    if tokenizer.pad_token_id is None:
        raise FedcoreError("the tokenizer has no padding token; set tokenizer.pad_token")
    kinds = torch.tensor([0] * len(rows) if domains is None else list(domains), dtype=torch.int64)
    return AnswerTokens(rows.input_ids, rows.labels, kinds, int(tokenizer.pad_token_id))


def _padded(rows: Sequence[Tokens], value: int) -> Tensor:
    """``(B, T)`` int64, each row filled up with ``value`` on its right."""
    padded = np.full((len(rows), max(map(len, rows), default=0)), value, dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded)
