"""A task: prompts with what the right answer is, and where a continuation ends."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedcore.checks import choice, count
from fedcore.errors import FedcoreError

KINDS = {
    "number": "exact_match",
    "math": "exact_match",
    "exact": "exact_match",
    "choice": "acc",
    "code": "pass@1",
}
"""Kind of a task to the measure that it is compared by."""

DEFAULT_STOPS = {
    "exact": ("\n",),
    # What stands at the left margin after a function's body is not part of it.
    "code": ("\nclass ", "\ndef ", "\nif ", "\nprint(", "\n#", "\n@", "\n```"),
}
"""Kind of a task to the strings that end an answer, where a task of one's own names none."""


@dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        prompt: what the model reads.
        options: of a choice, the texts that may follow, with the blank between, if any.
        answer: the right one as text; of a choice its index into ``options``; of code its tests.
    """

    prompt: str
    answer: str | int
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class AnswerTask:
    """Questions of one kind.

    Attributes:
        name: how tables and errors call it.
        kind: one of :data:`KINDS`. ``number``, ``math`` and ``exact`` read what the model writes,
            ``choice`` compares the likelihoods of options, ``code`` runs a program.
        rows: the questions.
        stop: a continuation ends before the first of these strings.
        max_tokens: the most tokens of a continuation.
    """

    name: str
    kind: str
    rows: tuple[Row, ...]
    stop: tuple[str, ...] = ()
    max_tokens: int = 256

    def __post_init__(self) -> None:
        choice(self.name, "kind", self.kind, KINDS)
        count(self.name, "max_tokens", self.max_tokens, least=1)
        if "" in self.stop:
            raise FedcoreError(f"{self.name}: a stop string is empty; leave it out")
        if not self.rows:
            raise FedcoreError(f"{self.name}: the task has no rows")
        for number, row in enumerate(self.rows, start=1):
            if problem := self._problem(row):
                raise FedcoreError(f"{self.name}, row {number}: {problem}")

    def _problem(self, row: Row) -> str | None:
        if not row.prompt.strip():
            return "the prompt is empty"
        if self.kind != "choice":
            return None if isinstance(row.answer, str) else "the answer is not a text"
        if len(row.options) < 2:
            return "a choice needs two options or more"
        if len(set(row.options)) < len(row.options) or not all(o.strip() for o in row.options):
            return "an option is empty, or there twice"
        if not isinstance(row.answer, int) or not 0 <= row.answer < len(row.options):
            return f"the answer must be an index from 0 to {len(row.options) - 1}"
        return None

    def first(self, limit: int | None) -> AnswerTask:
        """The task with its first ``limit`` rows; with all where it is None.

        Raises:
            FedcoreError: the limit is below 1.
        """
        if limit is None:
            return self
        return replace(self, rows=self.rows[: count("", "limit", limit, least=1)])
