"""Rows of instruction data as examples: what a model is given, and what it is to write.

A row has one of five formats. ``text`` has a text that is learned as a whole. ``prompt_completion``
has a prompt and its completion, both texts or both lists of messages. ``messages`` has a list of
messages with ``role`` and ``content``. ``alpaca`` has ``instruction``, ``output`` and perhaps
``input``, which are put into the template of Taori et al., "Stanford Alpaca: An
Instruction-following LLaMA model" (2023). Of ``columns``, prompt and completion are templates of
the file's columns, as in ``"Question: {question}"``.

A defect is an error that names the file, the line and the column. No error shows a value: rows may
be confidential.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from fedcore.checks import choice
from fedcore.errors import FedcoreError, unknown_name
from fedcore.training.datasets import check_data_source, load_dataset
from fedcore.training.hub_tables import read_hub_rows
from fedcore.training.table_files import read_rows
from fedcore.training.text_columns import columns_of, described, fill

_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "text": ("text",),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "columns": ("prompt", "completion"),
}
_OPTIONAL: Mapping[str, tuple[str, ...]] = {"alpaca": ("input",)}

FormatName = Literal["text", "prompt_completion", "messages", "alpaca", "columns"]
"""What a row may hold."""

LossName = Literal["last", "assistant", "all"]
"""Which messages of a conversation are learned: the last one, those of the assistant, or all."""

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who may have written a message."""

_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n{given}### Response:"
)
_ALPACA_PAIRED = ", paired with an input that provides further context"

Message = Mapping[str, str]


@dataclass(frozen=True)
class Example:
    """What a model is given and what it learns to write.

    Attributes:
        line: where it stands in its source, counted from 1.
        prompt: a text, or messages; empty where the whole completion is learned without one.
        completion: a text, or messages, as the prompt is.
        assistant_only: of the completion's messages, those of the assistant alone are learned.
        where: what stands in front of ``line`` in an error, where it is not what the other examples
            have.
    """

    line: int
    prompt: str | tuple[Message, ...]
    completion: str | tuple[Message, ...]
    assistant_only: bool = False
    where: str = ""

    @property
    def words(self) -> str:
        """All that it says, without a template."""
        said = [self.prompt, self.completion]
        return "\n".join(
            part if isinstance(part, str) else "\n".join(m.get("content", "") for m in part)
            for part in said
            if part
        )


@dataclass(frozen=True)
class Conversations:
    """The examples of one source, in its order.

    Attributes:
        where: what stands in front of a line's number in an error: the file, for instance.
        examples: n examples.
    """

    where: str
    examples: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def place(self, index: int) -> str:
        """Where the example at ``index`` comes from, for an error."""
        example = self.examples[index]
        return f"{example.where or self.where}{example.line}"

    def take(self, indices: Sequence[int] | np.ndarray | Tensor) -> Conversations:
        """The examples at ``indices``, in that order."""
        return replace(self, examples=tuple(self.examples[int(i)] for i in indices))


@dataclass(frozen=True)
class RowFormat:
    """How rows are read.

    Attributes:
        name: one of :data:`FormatName`.
        columns: our name of a column to the file's, where they differ, as in
            ``{"prompt": "question", "completion": "answer"}``; with format ``"columns"`` prompt and
            completion as templates of the file's columns.
        loss: one of :data:`LossName`. ``last``: the last message, which must be the assistant's, is
            the completion and those before it are the prompt. ``assistant``: as ``last``, and the
            assistant's earlier messages are learned too. ``all``: every token is learned, those of
            the user too. Other formats than ``messages`` have ``last`` alone.

    Raises:
        FedcoreError: an unknown format, loss or column, one column of the file for two of ours, or
            a loss that the format does not have.

    Example:
        >>> form = RowFormat("prompt_completion", {"prompt": "q", "completion": "a"})
        >>> form.example({"q": "2 + 2 = ", "a": "4"}, 1, "sums.csv:1")
        Example(line=1, prompt='2 + 2 =', completion=' 4', assistant_only=False, where='')
    """

    name: str = "messages"
    columns: Mapping[str, str] = field(default_factory=dict)
    loss: str = "last"

    def __post_init__(self) -> None:
        choice("", "format", self.name, get_args(FormatName))
        choice("", "loss", self.loss, get_args(LossName))
        if self.loss != "last" and self.name != "messages":
            raise FedcoreError(
                f"loss is {self.loss!r} and format {self.name!r}; pass format 'messages', or "
                "leave out loss"
            )
        for column, theirs in self.columns.items():
            if column not in self._names():
                raise unknown_name(f"column of format {self.name!r}", column, self._names())
            if not isinstance(theirs, str) or not theirs:
                raise FedcoreError(
                    f"columns.{column} is not a name; pass that of the file's column"
                )
        if self.name == "columns":
            for column in self._names():
                if column not in self.columns:
                    raise FedcoreError(
                        f"columns.{column} is not set; pass a template of the file's columns, as "
                        "in '{question}'"
                    )
                columns_of(self.columns[column], f"columns.{column}")
            return
        names = [self._theirs(column) for column in self._names()]
        for name in names:
            if names.count(name) > 1:
                raise FedcoreError(
                    f"columns reads the file's column {name!r} twice; pass one per name"
                )

    @property
    def wanted(self) -> tuple[str, ...]:
        """The file's columns that every row must have; a renamed one is always among them."""
        if self.name == "columns":
            named = [columns_of(self.columns[column]) for column in self._names()]
            return tuple(dict.fromkeys(name for names in named for name in names))
        return tuple(
            self._theirs(column)
            for column in self._names()
            if column in _REQUIRED[self.name] or column in self.columns
        )

    @property
    def optional(self) -> tuple[str, ...]:
        """The file's columns that a row may have."""
        return tuple(name for name in map(self._theirs, self._names()) if name not in self.wanted)

    def example(self, row: Mapping[str, Any], line: int, place: str) -> Example:
        """What ``row`` holds; blanks at the end of a prompt that is a text move to the completion.

        A tokenizer joins such a blank with the word after it, so a prompt with it would end in a
        token that the whole row does not contain.

        Raises:
            FedcoreError: an absent column, a value of another kind or an empty one, a conversation
                that does not end with the assistant; in front of it ``place``.
        """
        values = _Values(row, place, self._theirs)
        if self.name == "text":
            return Example(line, "", values.text("text"))
        if self.name == "alpaca":
            given = values.text("input", empty=True)
            prompt = _ALPACA.format(
                paired=_ALPACA_PAIRED if given.strip() else "",
                instruction=values.text("instruction"),
                given=f"### Input:\n{given}\n\n" if given.strip() else "",
            )
            return Example(line, prompt, values.text("output"))
        if self.name == "messages":
            messages = values.messages("messages")
            if self.loss == "last":
                if len(messages) < 2:
                    raise values.wrong("messages", "has one message", "write the prompt before it")
                return Example(line, messages[:-1], messages[-1:])
            return Example(line, (), messages, assistant_only=self.loss == "assistant")
        if self.name == "columns" or isinstance(row.get(self._theirs("prompt")), str):
            prompt, completion = values.text("prompt"), values.text("completion")
            end = prompt.rstrip()
            return Example(line, end, prompt[len(end) :] + completion)
        return Example(
            line, values.messages("prompt", answered=False), values.messages("completion")
        )

    def read(self, rows: Iterable[tuple[int, Mapping[str, Any]]], where: str) -> Conversations:
        """The examples of ``rows``, each with its line.

        Raises:
            FedcoreError: as :meth:`example`, or no rows at all.
        """
        examples = tuple(self.example(row, line, f"{where}{line}") for line, row in rows)
        if not examples:
            source = where.removesuffix(":").removesuffix(", row ")
            raise FedcoreError(f"{source}: no rows")
        return Conversations(where, examples)

    def _names(self) -> tuple[str, ...]:
        return (*_REQUIRED[self.name], *_OPTIONAL.get(self.name, ()))

    def _theirs(self, column: str) -> str:
        return self.columns.get(column, column)


def load_conversations(
    source: str, form: RowFormat, *, split: str | None = None, subset: str | None = None
) -> Conversations:
    """The examples of a file, of a packaged corpus or of a dataset of the hub.

    Args:
        source: as for :func:`open_rows`.
        form: how its rows are read.
        split, subset: as for :func:`open_rows`.

    Raises:
        FedcoreError: as :func:`open_rows`, or a row with a defect; with file and line, and never
            with a value.
        MissingExtraError: the package that reads it is not installed.
    """
    where, rows = open_rows(source, form.wanted, form.optional, split=split, subset=subset)
    return form.read(rows, where)


def open_rows(
    source: str,
    columns: Collection[str],
    optional: Collection[str] = (),
    *,
    split: str | None = None,
    subset: str | None = None,
) -> tuple[str, Iterable[tuple[int, Mapping[str, Any]]]]:
    """The rows of ``source``, each with its line, and what stands in front of a line in an error.

    Args:
        source: a ``.jsonl``, ``.parquet``, ``.csv`` or ``.tsv`` file, a hub id as ``owner/name`` or
            ``hf:name``, or a packaged corpus, whose rows have the columns ``text`` and ``label``.
            Messages in a column of text are read as JSON.
        columns, optional: what every row must have, and what is read where it is there.
        split: the split of a hub dataset, ``"train"`` by default; nothing else has splits.
        subset: the configuration of a hub dataset that has several.

    Raises:
        FedcoreError: an unknown source, or a split of what has none; while rows are read, what
            cannot be.
        MissingExtraError: the package that reads it is not installed.
    """
    origin = check_data_source(source)
    if origin.kind == "hub":
        part = split or "train"
        rows = read_hub_rows(origin.location, columns, optional, part, subset)
        return f"dataset {origin.location!r}, split {part!r}, row ", rows
    if split is not None:
        raise FedcoreError(f"dataset {source!r} has no splits; leave out split")
    if origin.kind == "packaged":
        return f"dataset {source!r}, row ", _packaged_rows(source, columns)
    return f"{origin.path}:", read_rows(origin.path, columns, optional)


def _packaged_rows(
    source: str, columns: Collection[str]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    texts = load_dataset(source)
    for column in columns:
        if column not in ("text", "label"):
            raise FedcoreError(
                f"dataset {source!r}: {unknown_name('column', column, ('text', 'label'))}"
            )
    for i, (text, label) in enumerate(zip(texts.texts, texts.labels, strict=True)):
        yield texts.row(i), {"text": text, "label": texts.label_names[label]}


@dataclass(frozen=True)
class _Values:
    """The values of one row, each checked when it is read."""

    row: Mapping[str, Any]
    place: str
    theirs: Any

    def wrong(self, column: str, problem: str, remedy: str) -> FedcoreError:
        return FedcoreError(f"{self.place}: column {self.theirs(column)!r} {problem}; {remedy}")

    def value(self, column: str) -> object:
        given = self.theirs(column)
        return fill(given, self.row) if "{" in given else self.row.get(given)

    def text(self, column: str, *, empty: bool = False) -> str:
        value = self.value(column)
        if empty and (value is None or value == ""):
            return ""
        if not isinstance(value, str) or not (empty or value.strip()):
            raise self.wrong(column, f"is {described(value)}", "each row needs a text")
        self._encodable(column, value)
        return value

    def messages(self, column: str, *, answered: bool = True) -> tuple[Message, ...]:
        value = self.row.get(self.theirs(column))
        if isinstance(value, str) and value.strip():
            value = self._parsed(column, value)
        if not isinstance(value, list) or not value:
            problem = "is an empty list" if value == [] else f"is {described(value)}"
            raise self.wrong(column, problem, "each row needs a list of messages")
        messages = tuple(self._message(column, i, item) for i, item in enumerate(value, start=1))
        if answered and messages[-1]["role"] != "assistant":
            raise self.wrong(column, "does not end with a message of the assistant", "add it")
        return messages

    def _parsed(self, column: str, value: str) -> Any:
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise self.wrong(
                column, "is a text and not JSON", "each row needs a list of messages"
            ) from None

    def _message(self, column: str, number: int, item: Any) -> Message:
        if not isinstance(item, dict):
            raise self.wrong(
                column, f"has message {number} {described(item)}", "pass objects with role, content"
            )
        # Parquet fills what a message lacks with null, and templates skip it as well.
        message = {key: value for key, value in item.items() if value is not None}
        if set(message) - {"role", "content"}:
            raise self.wrong(
                column, f"has message {number} with keys beside role and content", "remove them"
            )
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise self.wrong(
                column, f"has message {number} of an unknown role", f"valid: {', '.join(ROLES)}"
            )
        if not isinstance(content, str) or (role == "assistant" and not content.strip()):
            raise self.wrong(
                column, f"has message {number} whose content is {described(content)}", "pass a text"
            )
        self._encodable(column, content)
        return {"role": str(role), "content": content}

    def _encodable(self, column: str, value: str) -> None:
        # JSON may escape half of a surrogate pair, which no tokenizer takes.
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.wrong(column, "is not Unicode (half a surrogate pair)", "mend it") from None
