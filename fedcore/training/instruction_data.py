"""Instruction data as a data set: examples with a domain each, by which they are split and dealt.

As of other texts, examples that say the same are kept once, so that no held-out one was trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from fedcore.errors import FedcoreError
from fedcore.training.conversations import Conversations, Example, RowFormat, open_rows
from fedcore.training.datasets import TextDataset, labelled
from fedcore.training.table_files import label_in, read_rows


@dataclass(frozen=True)
class InstructionDataset(TextDataset):
    """Examples with one domain each; ``texts`` are their words.

    Attributes:
        examples: n examples.
    """

    examples: tuple[Example, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.examples) != len(self.texts):
            raise FedcoreError(
                f"{self.name}: {len(self.examples)} examples, {len(self.texts)} texts"
            )

    @property
    def conversations(self) -> Conversations:
        """The same as a tokenizer takes them."""
        return Conversations("", self.examples)

    def _at(self, chosen: Sequence[int]) -> dict[str, Any]:
        return {**super()._at(chosen), "examples": tuple(self.examples[i] for i in chosen)}

    @classmethod
    def joined(cls, parts: Sequence[Self], label_names: Sequence[str], name: str) -> Self:
        """The examples of ``parts`` one after the other, all with the domains ``label_names``."""
        texts = TextDataset.joined(parts, label_names, name)
        examples = tuple(example for part in parts for example in part.examples)
        return cls(**vars(texts), examples=examples)


@dataclass(frozen=True)
class InstructionReader:
    """Rows of instruction data, by a format, with the column of their domains.

    Attributes:
        form: how rows are read.
        label_column: the column of the domains; empty where all have one.
    """

    form: RowFormat
    label_column: str = ""

    def load(self, source: str, subset: str | None) -> InstructionDataset:
        """All examples of ``source``, as :func:`~fedcore.training.conversations.open_rows` takes
        it.

        Raises:
            FedcoreError: as :func:`~fedcore.training.conversations.open_rows`, a row with a defect,
                or no rows.
        """
        where, rows = open_rows(source, self._columns, self.form.optional, subset=subset)
        return self._dataset(source, where, rows, None)

    def read(
        self, path: Path, name: str, labels: Sequence[str] | None, columns: Mapping[str, str]
    ) -> InstructionDataset:
        """Those of one file.

        Args:
            name: of the data set, in errors.
            labels: the domains in their order, the only ones that there may be; those of the file
                by default.
            columns: the file's columns that are known under another name, to that name.

        Raises:
            FedcoreError: as :func:`~fedcore.training.table_files.read_rows`, a row with a defect,
                or no rows.
        """
        rows = read_rows(path, self._columns, self.form.optional, columns)
        return self._dataset(name, f"{path}:", rows, labels)

    def labels(self, path: Path, columns: Mapping[str, str]) -> set[str]:
        """The domains in one file."""
        wanted = [self.label_column] if self.label_column else []
        rows = read_rows(path, wanted, renamed=columns)
        return {label_in(row, self.label_column, f"{path}:{line}") for line, row in rows}

    def joined(
        self, parts: Sequence[InstructionDataset], label_names: Sequence[str], name: str
    ) -> InstructionDataset:
        """The examples of ``parts`` one after the other."""
        return InstructionDataset.joined(parts, label_names, name)

    @property
    def _columns(self) -> tuple[str, ...]:
        label = (self.label_column,) if self.label_column else ()
        return tuple(dict.fromkeys((*self.form.wanted, *label)))

    def _dataset(
        self,
        name: str,
        where: str,
        rows: Iterable[tuple[int, Mapping[str, Any]]],
        labels: Sequence[str] | None,
    ) -> InstructionDataset:
        domains: list[str] = []

        def labelled_rows() -> Iterable[tuple[int, Mapping[str, Any]]]:
            for line, row in rows:
                domains.append(label_in(row, self.label_column, f"{where}{line}", labels))
                yield line, row

        read = self.form.read(labelled_rows(), where).examples
        texts = labelled(name, [example.words for example in read], domains, labels)
        # Their rows are indices among those read, which may not be lines of a file.
        distinct = [replace(read[row - 1], where=where) for row in texts.rows]
        lines = tuple(example.line for example in distinct)
        return InstructionDataset(**{**vars(texts), "rows": lines}, examples=tuple(distinct))
