"""A run folder as it was read, and what follows from its rounds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedcore.federation.answer_records import Answers
from fedcore.federation.measures import ACCURACY, Measure
from fedcore.federation.records import (
    NO_TRAFFIC,
    CentralPrivacySpent,
    Environment,
    PartitionRecord,
    PrivacySpent,
    Round,
    Sample,
    Summary,
    Traffic,
    mean_or_none,
)


@dataclass(frozen=True)
class RunRecord:
    """A run folder, read and checked.

    ``measure`` is what the quality of its models is measured in, ``sample`` one text that a
    language model continued, and ``answers`` what its models answered. The ``summary`` of a run
    that has not finished is derived from its rounds.
    ``interrupted_line`` says that the last line of ``metrics.jsonl`` was cut off in the middle, and
    ``not_finite`` counts the NaN and infinite numbers that were read as ``None``.
    """

    folder: Path
    recipe: str
    environment: Environment
    partition: PartitionRecord
    rounds: tuple[Round, ...]
    summary: Summary
    interrupted_line: bool = False
    not_finite: int = 0
    measure: Measure = ACCURACY
    sample: Sample | None = None
    answers: Answers | None = None

    @property
    def quality(self) -> float | None:
        """Of the final global model on all held-out examples, on the run's measure."""
        return self.summary.quality(self.measure)

    @property
    def best_quality(self) -> float | None:
        """The best that the global model had after any round."""
        return self.summary.best_quality(self.measure)

    @property
    def target(self) -> float | None:
        """The quality that rounds and bytes are counted up to."""
        return self.summary.target(self.measure)

    @property
    def commit(self) -> str | None:
        """The commit of the code, where it is recorded."""
        return self.summary.git or self.environment.git_commit

    @cached_property
    def trained(self) -> tuple[Round, ...]:
        """The rounds without the initial evaluation."""
        return tuple(r for r in self.rounds if r.index >= 0)

    @cached_property
    def evaluated(self) -> tuple[tuple[Round, float], ...]:
        """The rounds, the initial one included, in which the global model was evaluated, each with
        its quality.
        """
        pairs = ((r, r.quality(self.measure)) for r in self.rounds)
        return tuple((r, quality) for r, quality in pairs if quality is not None)

    @cached_property
    def client_evaluated(self) -> tuple[tuple[Round, list[float]], ...]:
        """The rounds with a quality at the clients, and these qualities."""
        pairs = ((r, r.client_qualities(self.measure)) for r in self.rounds)
        return tuple((r, qualities) for r, qualities in pairs if qualities)

    @cached_property
    def cumulated(self) -> dict[int, tuple[Traffic, Traffic]]:
        """Bytes up and down from the start to the end of each round, by round index."""
        up, down, totals = NO_TRAFFIC, NO_TRAFFIC, {}
        for r in self.rounds:
            up, down = up + r.bytes_up, down + r.bytes_down
            totals[r.index] = (up, down)
        return totals

    @cached_property
    def client_rounds(self) -> int:
        """Selected clients summed over the rounds, dropped ones included."""
        return sum(len(r.took_part) for r in self.trained)

    @cached_property
    def dropped(self) -> Counter[tuple[str, str]]:
        """How often each (client, reason) was dropped."""
        return Counter((d.client, d.reason) for r in self.rounds for d in r.dropped)

    @cached_property
    def flags(self) -> Counter[str]:
        """In how many rounds the method raised each flag."""
        return Counter(flag for r in self.rounds for flag in set(r.flags))

    @property
    def privacy(self) -> PrivacySpent | None:
        """What had been spent after the last round; None of a run without differential privacy."""
        return self.rounds[-1].privacy if self.rounds else None

    @property
    def central_privacy(self) -> CentralPrivacySpent | None:
        """The same of whole clients."""
        return self.rounds[-1].central_privacy if self.rounds else None

    @property
    def gap(self) -> float | None:
        """Local minus global quality in the last round that has both."""
        gaps = (r.gap(self.measure) for r in reversed(self.rounds))
        return next((gap for gap in gaps if gap is not None), None)

    @property
    def majority_rate(self) -> float | None:
        """What always naming the most frequent class would reach; None where none is named."""
        return self.partition.majority_rate if self.measure == ACCURACY else None

    def mean_over_modules(self, quantity: str) -> float | None:
        """Mean over rounds of the mean over modules of a ``ModuleRound`` field."""
        rounds = [mean_or_none(r.module_values(quantity)) for r in self.trained]
        return mean_or_none([value for value in rounds if value is not None])
