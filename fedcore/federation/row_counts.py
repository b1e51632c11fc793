"""What became of a client's rows of instruction data."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from fedcore.federation.record_fields import Count, Record


class RowCounts(Record):
    """A statement about a client's rows, held-out ones too, without any of their words.

    ``read`` are the rows in the file, without copies; ``used`` those that are learned or asked for,
    ``dropped`` those that are too long. Of the used ones, ``truncated`` lost the beginning of their
    prompt, and in ``merged`` a token spans the prompt's end and the completion's beginning, so that
    training shows another context than generation does. ``targets`` are the tokens that are
    predicted, over all used rows.

    Raises:
        ValidationError: a number that is none of a count, or numbers that contradict each other.
    """

    read: Count = 0
    used: Count = 0
    dropped: Count = 0
    truncated: Count = 0
    merged: Count = 0
    targets: Count = 0

    @model_validator(mode="after")
    def _agree(self) -> RowCounts:
        if self.read != self.used + self.dropped or max(self.truncated, self.merged) > self.used:
            raise PydanticCustomError("rows", "counts of rows that do not contradict each other")
        return self

    def __add__(self, other: RowCounts) -> RowCounts:
        ours, theirs = dict(self), dict(other)
        return RowCounts(**{name: ours[name] + theirs[name] for name in ours})

    @classmethod
    def sum(cls, counts: Iterable[RowCounts]) -> RowCounts:
        """The sum over clients."""
        return sum(counts, cls())

    def __str__(self) -> str:
        return (
            f"{self.read} rows read, {self.used} used, {self.dropped} dropped as too long, "
            f"{self.truncated} with a truncated prompt, {self.merged} with a token across the "
            f"prompt's end; {self.targets} target tokens"
        )
