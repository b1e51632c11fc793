"""Conversations as token ids with labels, equal to those of trl's ``SFTTrainer``.

The rule, which is trl's documented one: a text without a template ends with the end token; a prompt
is tokenised alone and together with its completion, and what is learned begins where the two
differ; messages are rendered by the tokenizer's chat template, the prompt with the template's start
of an answer. It takes two calls of the tokenizer, so it is written here: trl has it only inside the
constructor of a trainer, which needs the model, changes it, and logs the end of a prompt. Tests
compare the two token for token, so a trl that tokenises differently turns them red.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedcore.checks import choice, count
from fedcore.errors import FedcoreError, missing_extra
from fedcore.federation.row_counts import RowCounts
from fedcore.training.conversations import Conversations, Example, Message
from fedcore.training.encoding import IGNORED, check_length

Overlong = Literal["drop", "cut_prompt", "error"]
"""What becomes of a row that is longer than the model may see."""

LEAST_PROMPT = 8
"""Tokens of a prompt that ``cut_prompt`` leaves; a row without room for them is dropped."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "fedcore"

Tokens = NDArray[np.int32]
Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class InstructionRows:
    """Token ids and labels of rows, for a trainer of trl or, padded, for our own loop.

    Attributes:
        input_ids: for each used row its token ids, int32 ``(T,)``.
        labels: for each used row int32 ``(T,)``: the token where it is learned,
            :data:`~fedcore.training.encoding.IGNORED` elsewhere.
        positions: int64, ascending after :func:`tokenise`: which of the rows read each used row is.
        truncated: bool, whether a used row's prompt lost its beginning.
        merged: bool, whether a token of a used row spans the prompt's end.
        lengths: int64, the tokens of every row read, before any is truncated.
    """

    input_ids: tuple[Tokens, ...]
    labels: tuple[Tokens, ...]
    positions: Indices
    truncated: NDArray[np.bool_]
    merged: NDArray[np.bool_]
    lengths: Indices

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def read(self) -> int:
        """How many rows were read."""
        return len(self.lengths)

    @property
    def targets(self) -> Indices:
        """Tokens that are predicted of each used row; its first token never is."""
        return np.array([(row[1:] != IGNORED).sum() for row in self.labels], dtype=np.int64)

    @property
    def counts(self) -> RowCounts:
        """What became of the rows read."""
        return RowCounts(
            read=self.read,
            used=len(self),
            dropped=self.read - len(self),
            truncated=int(self.truncated.sum()),
            merged=int(self.merged.sum()),
            targets=int(self.targets.sum()),
        )

    def take(self, indices: Sequence[int] | NDArray[Any] | Tensor) -> InstructionRows:
        """The part that has, of the rows *read*, those at ``indices``, in that order.

        So the rows of a file can be dealt to clients before it is known which are too long, and
        each client's counts name what it lost. ``positions`` count within the part.
        """
        used = {int(position): i for i, position in enumerate(self.positions)}
        chosen = [(k, used[int(i)]) for k, i in enumerate(indices) if int(i) in used]
        rows = [i for _, i in chosen]
        return InstructionRows(
            tuple(self.input_ids[i] for i in rows),
            tuple(self.labels[i] for i in rows),
            np.array([k for k, _ in chosen], dtype=np.int64),
            self.truncated[rows],
            self.merged[rows],
            self.lengths[np.asarray(indices, dtype=np.int64)],
        )


def tokenise(
    conversations: Conversations, tokenizer: Any, *, max_length: int, overlong: str = "drop"
) -> InstructionRows:
    """Token ids and labels of ``conversations``. No model is needed, and nothing is logged.

    A row without a limit is what trl's ``SFTTrainer`` makes of it with ``max_length=None``. The
    last token that is learned is the end token, or what the template ends a message with. Cost: one
    or two calls of the tokenizer for each row.

    Args:
        conversations: n examples.
        tokenizer: a transformers tokenizer with an end token; with a chat template where examples
            are messages.
        max_length: the most tokens of a row, special ones included.
        overlong: what becomes of a longer row. ``drop``: it is not used. ``cut_prompt``: its prompt
            loses tokens at its beginning, behind the start token, and the completion none; a row
            whose completion leaves fewer than :data:`LEAST_PROMPT` tokens to the prompt is dropped.
            ``error``: it is refused.

    Raises:
        FedcoreError: a tokenizer without what is needed; a template that refuses a row, or that
            never ends a message; a row that is too long, by its place; or no row that is used.
        MissingExtraError: ``loss = "assistant"`` with a template that has no generation blocks, and
            trl, which knows those of common templates, is not installed.
    """
    choice("", "overlong", overlong, get_args(Overlong))
    check_length(tokenizer, count("", "max_length", max_length, least=2), least=2)
    templates: dict[bool, str | None] = {}
    input_ids, labels, positions, truncated, merged = [], [], [], [], []
    long: list[int] = []
    lengths: list[int] = []
    for i, example in enumerate(conversations.examples):
        place = conversations.place(i)
        if isinstance(example.completion, str):
            row = _plain_row(example, tokenizer, place)
        else:
            if example.assistant_only not in templates:
                templates[example.assistant_only] = _template(tokenizer, example.assistant_only)
            row = _chat_row(example, tokenizer, templates[example.assistant_only], place)
        ids, learned, crosses = row
        if not learned[1:].any():
            raise FedcoreError(f"{place}: no token of this row can be learned; remove it")
        shorter = len(ids) > max_length
        lengths.append(len(ids))
        if shorter:
            long.append(i)
            chosen = _without_start(ids, learned, tokenizer.bos_token_id, max_length)
            if overlong != "cut_prompt" or chosen is None:
                continue
            ids, learned = ids[chosen], learned[chosen]
        input_ids.append(ids)
        labels.append(np.where(learned, ids, IGNORED))
        positions.append(i)
        truncated.append(shorter)
        merged.append(crosses)
    if long and (overlong == "error" or not input_ids):
        raise FedcoreError(
            f"{conversations.place(long[0])}: {len(long)} of {len(conversations)} rows, of which "
            f"this is the first, have more than max_length = {max_length} tokens; raise "
            "max_length, or shorten them"
            + (", or pass overlong = 'drop' or 'cut_prompt'" if overlong == "error" else "")
        )
    return InstructionRows(
        tuple(input_ids),
        tuple(labels),
        np.array(positions, dtype=np.int64),
        np.array(truncated, dtype=np.bool_),
        np.array(merged, dtype=np.bool_),
        np.array(lengths, dtype=np.int64),
    )


_Row = tuple[Tokens, NDArray[np.bool_], bool]
"""Token ids, which of them are learned, and whether one spans the prompt's end."""


def _plain_row(example: Example, tokenizer: Any, place: str) -> _Row:
    end = tokenizer.eos_token
    if end is None:
        raise FedcoreError("the tokenizer has no end token; set tokenizer.eos_token")
    prompt, completion = str(example.prompt), str(example.completion)
    if not completion.endswith(end):
        completion += end
    # Not verbose: that a row is longer than the model's limit is counted, not logged.
    whole = tokenizer(text=prompt + completion, verbose=False)["input_ids"]
    if whole[-1] != tokenizer.eos_token_id:
        raise FedcoreError(
            f"{place}: the tokenizer ends a text with another token than its end token "
            f"{end!r}; pass a tokenizer of a causal language model"
        )
    if not prompt:
        return _row(whole, 0, False)
    alone = tokenizer(text=prompt, return_special_tokens_mask=True, verbose=False)
    start = _common(alone["input_ids"], whole)
    # An end token that the tokenizer itself appends to a prompt is not a word of it.
    return _row(whole, start, not all(alone["special_tokens_mask"][start:]))


def _chat_row(example: Example, tokenizer: Any, template: str | None, place: str) -> _Row:
    assert not isinstance(example.prompt, str)
    assert not isinstance(example.completion, str)
    prompt, messages = example.prompt, (*example.prompt, *example.completion)
    if example.assistant_only:
        out = _rendered(tokenizer, messages, template, place, return_assistant_tokens_mask=True)
        return (
            np.array(out["input_ids"], dtype=np.int32),
            np.array(out["assistant_masks"], dtype=np.bool_),
            False,
        )
    whole = _rendered(tokenizer, messages, template, place)["input_ids"]
    if not prompt:
        return _row(whole, 0, False)
    alone = _rendered(tokenizer, prompt, template, place, add_generation_prompt=True)["input_ids"]
    start = _common(alone, whole)
    return _row(whole, start, start < len(alone))


def _row(ids: list[int], start: int, merged: bool) -> _Row:
    return np.array(ids, dtype=np.int32), np.arange(len(ids)) >= start, merged


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens two rows begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _without_start(
    ids: Tokens, learned: NDArray[np.bool_], bos: int | None, max_length: int
) -> Indices | None:
    """Which ``max_length`` tokens of a longer row stay; None where its completion is too long."""
    start = int(learned.argmax())
    room = max_length - (len(ids) - start)
    if room < LEAST_PROMPT:
        return None
    first = np.arange(int(ids[0] == bos))
    return np.concatenate((first, np.arange(start - room + len(first), len(ids))))


def _template(tokenizer: Any, assistant_only: bool) -> str | None:
    """The template that renders examples, None for the tokenizer's own; it is tried once here.

    Raises:
        FedcoreError: there is none, it has no generation blocks where they are needed, or it does
            not teach a model to end an answer.
    """
    if not tokenizer.chat_template:
        raise FedcoreError(
            "the tokenizer has no chat template, which messages need; set tokenizer.chat_template, "
            "or pass rows of format 'prompt_completion'"
        )
    template = _with_generation(tokenizer) if assistant_only else None
    probe = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": _PROBE})
    place = "a conversation of two messages"
    text = _rendered(tokenizer, probe, template, place, tokenize=False)
    _, answer, end = text.rpartition(_PROBE)
    if answer and assistant_only:
        out = _rendered(
            tokenizer,
            probe,
            template,
            place,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        stops = [stop for _, stop in out["offset_mapping"]]
        masks = np.array(out["assistant_masks"], dtype=np.bool_)
        last = int(np.where(masks, stops, 0).max())
        end = text[len(text) - len(end) : last]
    if not answer or not end.strip():
        raise FedcoreError(
            "the tokenizer's chat template ends an answer with nothing that is learned, so the "
            "model would not learn to stop; set tokenizer.chat_template to one that ends it with "
            "an end token" + (" inside its generation block" if assistant_only else "")
        )
    return template


def _with_generation(tokenizer: Any) -> str | None:
    if _GENERATION.search(tokenizer.get_chat_template()):
        return None
    try:
        from trl import get_training_chat_template
    except ImportError as error:
        raise missing_extra("trl", "llm") from error
    try:
        return str(get_training_chat_template(tokenizer))
    except ValueError:
        raise FedcoreError(
            "loss is 'assistant' and the tokenizer's chat template has no generation blocks, which "
            "mark the assistant's words; add them to it, or pass loss = 'last'"
        ) from None


def _rendered(
    tokenizer: Any, messages: Sequence[Message], template: str | None, place: str, **options: Any
) -> Any:
    settings = {"tokenize": True, "return_dict": True, "tokenizer_kwargs": {"verbose": False}}
    try:
        return tokenizer.apply_chat_template(
            list(messages), chat_template=template, **{**settings, **options}
        )
    # A template is a program of somebody else and raises what it likes.
    except Exception as error:
        # Its own words may be shown; what it puts together may hold a value.
        words = str(error)
        written = template or tokenizer.get_chat_template()
        reason = f" ({words})" if words and words in written else ""
        raise FedcoreError(
            f"{place}: the tokenizer's chat template refuses this conversation{reason}; change "
            "the row, or the template"
        ) from None
