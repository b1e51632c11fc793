"""Rows with stored labels: what a causal language model predicts of an instruction's answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedcore.errors import FedcoreError
from fedcore.training.encoding import IGNORED, EncodedDataset
from fedcore.training.instruction_rows import InstructionRows


@dataclass(frozen=True, eq=False)
class AnswerTokens(EncodedDataset):
    """Token ids of n examples, of each of which some tokens are to be predicted.

    Attributes:
        answers: int64 ``(n, T)``, a token where it is to be predicted from those before it, and
            :data:`~fedcore.training.encoding.IGNORED` elsewhere. ``labels``, int64 ``(n,)``, are
            the examples' domains, by which they are split and dealt to the clients.
    """

    answers: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answers.shape != self.input_ids.shape:
            raise FedcoreError(
                f"answers {tuple(self.answers.shape)} and input_ids "
                f"{tuple(self.input_ids.shape)} must be of one shape"
            )

    def targets(self, batch: Tensor) -> Tensor:
        """The token after each token: int64 ``(B, T)``, ``IGNORED`` where none is predicted."""
        targets = self.answers.new_full((len(batch), self.length), IGNORED)
        targets[:, :-1] = self.answers[batch, 1:]
        return targets


def answer_tokens(
    rows: InstructionRows, tokenizer: Any, domains: Sequence[int] | None = None
) -> AnswerTokens:
    """``rows`` padded on the right to the longest of them.

    Args:
        rows: n rows.
        tokenizer: a transformers tokenizer with a padding token.
        domains: an index for each row by which rows are dealt to clients; all 0 by default.

    Raises:
        FedcoreError: no rows, no padding token, or another number of domains than of rows.
    """
    if len(rows) == 0:
        raise FedcoreError("there are no rows to pad; pass rows that max_length leaves")
    if tokenizer.pad_token_id is None:
        raise FedcoreError("the tokenizer has no padding token; set tokenizer.pad_token")
    shape = (len(rows), max(map(len, rows.input_ids)))
    input_ids = torch.full(shape, tokenizer.pad_token_id, dtype=torch.int64)
    answers = torch.full(shape, IGNORED, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for i, (ids, labels) in enumerate(zip(rows.input_ids, rows.labels, strict=True)):
        input_ids[i, : len(ids)] = torch.from_numpy(ids)
        answers[i, : len(ids)] = torch.from_numpy(labels)
        attention_mask[i, : len(ids)] = 1
    kinds = torch.tensor([0] * len(rows) if domains is None else list(domains), dtype=torch.int64)
    return AnswerTokens(input_ids, attention_mask, kinds, answers)
