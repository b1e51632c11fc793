"""What a run left behind, as frozen data.

Rounds are counted from 0; the round -1 is the initial model, evaluated before any training. A
number that is undefined or was not measured is ``None``, never 0 and never NaN. Bytes and seconds
of a round are sums over its clients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean

from fedcore.federation.measures import ACCURACY, Measure


def mean_or_none(values: list[float]) -> float | None:
    """The arithmetic mean, or ``None`` of nothing."""
    return fmean(values) if values else None


@dataclass(frozen=True)
class Traffic:
    """Bytes in one direction; heads and other dense tensors never count as adapter traffic."""

    adapter: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        """Adapter and head together."""
        return self.adapter + self.head

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.adapter + other.adapter, self.head + other.head)


@dataclass(frozen=True)
class ClientRound:
    """One client in one round.

    ``global_accuracy`` and ``global_loss`` are those of the model which the client holds after the
    round, the global one or, of personalised methods, its own; ``local_accuracy`` and
    ``local_loss`` those of its model after local training and before aggregation. All on the
    client's own held-out shard. The qualities say the same on the run's ``measure``.
    """

    client: str
    examples: int = 0
    train_loss: float | None = None
    global_accuracy: float | None = None
    local_accuracy: float | None = None
    global_loss: float | None = None
    local_loss: float | None = None
    measure: Measure = ACCURACY

    @property
    def global_quality(self) -> float | None:
        """Of the model that the client holds after the round."""
        return self.measure.of(self.global_accuracy, self.global_loss)

    @property
    def local_quality(self) -> float | None:
        """Of the client's model after local training."""
        return self.measure.of(self.local_accuracy, self.local_loss)


@dataclass(frozen=True)
class DroppedClient:
    """A client that was selected and whose upload was not used."""

    client: str
    reason: str


@dataclass(frozen=True)
class ModuleRound:
    """One adapted module in one round.

    ``aggregation_error`` is the Frobenius distance of the broadcast product to the exact weighted
    mean of products, relative to that mean; ``factor_drift`` is how far the factors moved,
    relative to their size.
    """

    module: str
    aggregation_error: float | None = None
    factor_drift: float | None = None
    kept_rank: int | None = None
    condition: float | None = None


@dataclass(frozen=True)
class PrivacySpent:
    """What the clients have spent of their examples' privacy up to the end of a round.

    Attributes:
        epsilon: client id to the epsilon of (epsilon, ``delta``)-differential privacy of any one of
            its examples, by ``accountant``.
        noise: ``"seeded"`` where the run's seed gives the noise, ``"secret"`` where nothing does.
    """

    epsilon: Mapping[str, float]
    delta: float | None
    accountant: str
    noise_multiplier: float | None
    max_grad_norm: float | None
    noise: str

    @property
    def largest(self) -> tuple[str, float] | None:
        """The client that has spent the most, and its epsilon."""
        if not self.epsilon:
            return None
        client = max(sorted(self.epsilon), key=lambda name: self.epsilon[name])
        return client, self.epsilon[client]


@dataclass(frozen=True)
class CentralPrivacySpent:
    """What every client has spent of its privacy, as a whole, up to the end of a round."""

    epsilon: float | None
    delta: float | None
    accountant: str
    noise_multiplier: float | None
    max_norm: float | None
    noise: str


@dataclass(frozen=True)
class RoundRecord:
    """One completed round.

    ``clients`` may hold more than the ``sampled`` ones, which took part; ``flags`` is what the
    method wants a user to know. ``upload_error`` is what the number format of the uploads lost of
    them, relative to their norm, on average over the clients.
    """

    index: int
    accuracy: float | None = None
    loss: float | None = None
    train_loss: float | None = None
    clients: tuple[ClientRound, ...] = ()
    sampled: tuple[str, ...] = ()
    dropped: tuple[DroppedClient, ...] = ()
    flags: tuple[str, ...] = ()
    bytes_up: Traffic = Traffic()
    bytes_down: Traffic = Traffic()
    upload_error: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    modules: tuple[ModuleRound, ...] = ()
    privacy: PrivacySpent | None = None
    central_privacy: CentralPrivacySpent | None = None
    measure: Measure = ACCURACY

    @property
    def quality(self) -> float | None:
        """Of the global model on all held-out examples, on the run's measure."""
        return self.measure.of(self.accuracy, self.loss)

    @property
    def done(self) -> int:
        """Rounds completed once this one is: 0 for the initial model."""
        return self.index + 1

    @property
    def client_qualities(self) -> list[float]:
        """Quality at each client that was evaluated: the global model's, or, where clients train
        alone and there is none, their own models'.
        """
        found = [c.global_quality for c in self.clients if c.global_quality is not None]
        return found or [c.local_quality for c in self.clients if c.local_quality is not None]

    @property
    def gap(self) -> float | None:
        """Mean of local minus global quality over the clients that have both."""
        return mean_or_none(
            [
                c.local_quality - c.global_quality
                for c in self.clients
                if c.local_quality is not None and c.global_quality is not None
            ]
        )

    def module_values(self, quantity: str) -> list[float]:
        """The defined values of a :class:`ModuleRound` field over the modules."""
        return [v for m in self.modules if (v := getattr(m, quantity)) is not None]


@dataclass(frozen=True)
class Partition:
    """Examples by client and class: ``class_counts`` and ``test_counts`` are (clients, classes)."""

    label_names: tuple[str, ...]
    client_ids: tuple[str, ...]
    class_counts: tuple[tuple[int, ...], ...]
    test_counts: tuple[tuple[int, ...], ...]

    @property
    def majority_rate(self) -> float | None:
        """Accuracy on all held-out examples of always answering their most frequent class."""
        totals = [sum(column) for column in zip(*self.test_counts, strict=True)]
        return max(totals) / sum(totals) if sum(totals) else None

    @property
    def smallest_test(self) -> int | None:
        """Held-out examples of the client with the fewest."""
        return min((sum(row) for row in self.test_counts), default=None)


@dataclass(frozen=True)
class Summary:
    """The outcome as the engine wrote it; of an unfinished run, as far as the rounds tell it.

    ``rounds`` are those planned, which a finished run has completed. ``quality``,
    ``best_quality``, those of the clients and ``target`` are on the run's measure.
    """

    recipe: str
    method: str
    seed: int | None
    rounds: int
    finished: bool
    quality: float | None = None
    best_quality: float | None = None
    worst_client: float | None = None
    mean_client: float | None = None
    best_client: float | None = None
    bytes_up: Traffic = Traffic()
    bytes_down: Traffic = Traffic()
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    git: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    target: float | None = None
    rounds_to_target: int | None = None
    bytes_to_target: int | None = None


@dataclass(frozen=True)
class Sample:
    """The beginning of a held-out text, its own continuation, and those of the two models.

    ``client`` names whose model it is where there is no global one.
    """

    domain: str
    prompt: str
    reference: str
    before: str
    after: str
    client: str | None = None


@dataclass(frozen=True)
class RunRecord:
    """A run folder, read and checked.

    ``measure`` is what the quality of its models is measured in, and ``sample`` one text that a
    language model continued.
    ``interrupted_line`` says that the last line of ``metrics.jsonl`` was cut off in the middle, and
    ``not_finite`` counts the NaN and infinite numbers that were read as ``None``.
    """

    folder: Path
    recipe: str
    environment: Mapping[str, object]
    partition: Partition
    rounds: tuple[RoundRecord, ...]
    summary: Summary
    interrupted_line: bool = False
    not_finite: int = 0
    measure: Measure = ACCURACY
    sample: Sample | None = None

    @cached_property
    def trained(self) -> tuple[RoundRecord, ...]:
        """The rounds without the initial evaluation."""
        return tuple(r for r in self.rounds if r.index >= 0)

    @cached_property
    def evaluated(self) -> tuple[RoundRecord, ...]:
        """The rounds, the initial one included, in which the global model was evaluated."""
        return tuple(r for r in self.rounds if r.quality is not None)

    @cached_property
    def client_evaluated(self) -> tuple[RoundRecord, ...]:
        """The rounds with a quality at the clients."""
        return tuple(r for r in self.rounds if r.client_qualities)

    @cached_property
    def cumulated(self) -> dict[int, tuple[Traffic, Traffic]]:
        """Bytes up and down from the start to the end of each round, by round index."""
        up, down, found = Traffic(), Traffic(), {}
        for r in self.rounds:
            up, down = up + r.bytes_up, down + r.bytes_down
            found[r.index] = (up, down)
        return found

    @cached_property
    def client_rounds(self) -> int:
        """Selected clients summed over the rounds, dropped ones included."""
        return sum(len(r.sampled) for r in self.trained)

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
        return next((r.gap for r in reversed(self.rounds) if r.gap is not None), None)

    @property
    def majority_rate(self) -> float | None:
        """What always naming the most frequent class would reach; None where none is named."""
        return self.partition.majority_rate if self.measure == ACCURACY else None

    def mean_over_modules(self, quantity: str) -> float | None:
        """Mean over rounds of the mean over modules of a :class:`ModuleRound` field."""
        rounds = [mean_or_none(r.module_values(quantity)) for r in self.trained]
        return mean_or_none([value for value in rounds if value is not None])
