"""Everything a run writes into its folder, as models that its writers and readers share.

Rounds are counted from 0; round -1 is the initial model, evaluated before any training. A number
that is undefined or was not measured is ``None``, in JSON ``null``, never 0 and never NaN. Bytes
and seconds of a round are sums over its clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Annotated

from pydantic import ConfigDict, Field, Strict, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from fedcore.federation.measures import Measure
from fedcore.federation.record_fields import Count, Names, Number, Numbers, Record, Whole
from fedcore.federation.row_counts import RowCounts


class Traffic(Record):
    """Bytes in one direction; heads and other dense tensors never count as adapter traffic."""

    adapter: Count
    head: Count

    @property
    def total(self) -> int:
        """Adapter and head together."""
        return self.adapter + self.head

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(adapter=self.adapter + other.adapter, head=self.head + other.head)


NO_TRAFFIC = Traffic(adapter=0, head=0)


class ClientRound(Record):
    """One client in one round.

    ``global_accuracy`` and ``global_loss`` are those of the model which the client holds after the
    round, the global one or, of personalised methods, its own; ``local_accuracy`` and
    ``local_loss`` those of its model after local training and before aggregation. All on the
    client's own held-out shard. ``rows`` is what became of its rows of instruction data, in the
    first record that has the client.
    """

    client: str
    examples: Count = 0
    train_loss: Number = None
    global_accuracy: Number = None
    local_accuracy: Number = None
    global_loss: Number = None
    local_loss: Number = None
    rows: RowCounts | None = None

    def global_quality(self, measure: Measure) -> float | None:
        """Of the model that the client holds after the round."""
        return measure.of(self.global_accuracy, self.global_loss)

    def local_quality(self, measure: Measure) -> float | None:
        """Of the client's model after local training."""
        return measure.of(self.local_accuracy, self.local_loss)


class DroppedClient(Record):
    """A client that was selected and whose upload was not used."""

    client: str
    reason: str


class ModuleRound(Record):
    """One adapted module in one round.

    ``aggregation_error`` is the Frobenius distance of the broadcast product to the exact weighted
    mean of products, relative to that mean, and must lie between ``error_floor`` and
    ``error_ceiling``; ``factor_drift`` is how far the factors moved, relative to their size.
    """

    module: str
    aggregation_error: Number = None
    factor_drift: Number = None
    kept_rank: Whole | None = None
    condition: Number = None
    error_floor: Number = None
    error_ceiling: Number = None


class NoisySteps(Record):
    """Steps that sample and add noise alike, as :mod:`fedcore.privacy.accounting` counts them."""

    noise_multiplier: Annotated[float, Strict()]
    sampling_rate: Annotated[float, Strict()]
    steps: Count


class PrivacyRecord(Record):
    """What either kind of differential privacy has in common.

    ``noise`` is ``"seeded"`` where the run's seed gives the noise, ``"secret"`` where nothing does.
    """

    accountant: str
    delta: Number
    noise_multiplier: Number
    noise: str


class PrivacySpent(PrivacyRecord):
    """What the clients have spent of their examples' privacy up to the end of a round.

    ``epsilon`` maps a client to the epsilon of (epsilon, ``delta``)-differential privacy of any one
    of its examples, by ``accountant``; ``history`` to its noisy steps, which
    epsilon is computed from; ``steps`` to their number. The other fields are the last round's.
    """

    max_grad_norm: Number
    steps: dict[str, Whole] = Field(default_factory=dict)
    history: dict[str, tuple[NoisySteps, ...]] = Field(default_factory=dict)
    epsilon: Numbers

    @property
    def largest(self) -> tuple[str, float] | None:
        """The client that has spent the most, and its epsilon."""
        if not self.epsilon:
            return None
        client = max(sorted(self.epsilon), key=lambda name: self.epsilon[name])
        return client, self.epsilon[client]


class PrivacySummary(PrivacySpent):
    """The same after a run, with the client that has spent the most."""

    largest_epsilon: Number = None
    largest_epsilon_client: str | None = None


class CentralPrivacySpent(PrivacyRecord):
    """What every client has spent of its privacy, as a whole, up to the end of a round.

    ``history`` is what epsilon is computed from; the other fields are those of the last round.
    """

    max_norm: Number
    sampling_rate: Number = None
    rounds: Whole | None = None
    history: tuple[NoisySteps, ...] = ()
    epsilon: Number


class SitesEvaluation(Record):
    """What the sites' sums over their own held-out rows make, each prediction weighing alike.

    ``answered`` are the sites that sent sums; others have too few predictions or did not reply.
    ``targets`` counts the predictions, ``examples`` the rows. A number is ``None`` where no site
    answered.
    """

    accuracy: Number
    loss: Number
    targets: Count
    examples: Count
    answered: Names


_OF_TRAINED = ("train_loss", "clients", "dropped", "bytes_up", "bytes_down", "modules")
"""Fields that every round but the initial one has; one that lacks them had a broken writer."""


class Round(Record):
    """One completed round: a line of ``metrics.jsonl``.

    ``clients`` may hold more than the ``sampled`` ones, which took part; ``flags`` is what the
    method wants a user to know. ``upload_error`` is what the number format of the uploads lost of
    them, relative to their norm, on average over the clients. ``sites`` is what the sites answered
    to an evaluation, where the recipe evaluates there.
    """

    index: Annotated[int, Strict(), Field(ge=-1, alias="round")]
    accuracy: Number
    loss: Number
    train_loss: Number = None
    clients: tuple[ClientRound, ...] = ()
    sampled: Names = ()
    dropped: tuple[DroppedClient, ...] = ()
    flags: tuple[str, ...] = ()
    bytes_up: Traffic = NO_TRAFFIC
    bytes_down: Traffic = NO_TRAFFIC
    upload_error: Number = None
    seconds: Numbers = Field(default_factory=dict)
    modules: tuple[ModuleRound, ...] = ()
    privacy: PrivacySpent | None = None
    central_privacy: CentralPrivacySpent | None = None
    sites: SitesEvaluation | None = None

    @model_validator(mode="after")
    def _whole(self) -> Round:
        for name in _OF_TRAINED:
            if self.index >= 0 and name not in self.model_fields_set:
                raise PydanticCustomError(
                    "missing", "field {name} is missing", {"name": repr(name)}
                )
        return self

    @property
    def done(self) -> int:
        """Rounds completed once this one is: 0 for the initial model."""
        return self.index + 1

    @property
    def took_part(self) -> tuple[str, ...]:
        """The sampled clients; without a list of them, those that trained or were dropped."""
        if "sampled" in self.model_fields_set:
            return self.sampled
        trained = {c.client for c in self.clients if self.index >= 0 and c.train_loss is not None}
        return tuple(sorted(trained | {d.client for d in self.dropped}))

    def quality(self, measure: Measure) -> float | None:
        """Of the global model on all held-out examples."""
        return measure.of(self.accuracy, self.loss)

    def client_qualities(self, measure: Measure) -> list[float]:
        """Quality at each client that was evaluated: the global model's, or, where clients train
        alone and there is none, their own models'.
        """
        whole = [c.global_quality(measure) for c in self.clients]
        local = [c.local_quality(measure) for c in self.clients]
        known = [[q for q in qualities if q is not None] for qualities in (whole, local)]
        return known[0] or known[1]

    def gap(self, measure: Measure) -> float | None:
        """Mean of local minus global quality over the clients that have both."""
        pairs = [(c.local_quality(measure), c.global_quality(measure)) for c in self.clients]
        return mean_or_none(
            [local - whole for local, whole in pairs if local is not None and whole is not None]
        )

    def module_values(self, quantity: str) -> list[float]:
        """The defined values of a :class:`ModuleRound` field over the modules."""
        return [v for m in self.modules if (v := getattr(m, quantity)) is not None]


class Summary(Record):
    """``summary.json``: how a run ended. ``rounds`` are those that a finished run has completed.

    The quality is written under the name of the run's measure; ``worst_client``, ``mean_client``
    and ``best_client`` are on that measure.
    """

    recipe: str
    method: str
    seed: Whole | None
    rounds: Count
    clients: Count | None = None
    finished: Annotated[bool, Strict()]
    accuracy: Number = None
    loss: Number = None
    perplexity: Number = None
    best_accuracy: Number = None
    best_perplexity: Number = None
    worst_client: Number = None
    mean_client: Number = None
    best_client: Number = None
    bytes_up: Traffic
    bytes_down: Traffic
    seconds: Numbers = Field(default_factory=dict)
    peak_memory_bytes: Whole | None = None
    git: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    privacy: PrivacySummary | None = None
    central_privacy: CentralPrivacySpent | None = None
    target_accuracy: Number = None
    target_perplexity: Number = None
    rounds_to_target: Whole | None = None
    bytes_to_target: Whole | None = None
    adapters: tuple[str, ...] = ()

    def quality(self, measure: Measure) -> float | None:
        """Of the global model after the last round in which it was evaluated."""
        return self._on(measure.name)

    def best_quality(self, measure: Measure) -> float | None:
        """Of the global model after any round."""
        return self._on(f"best_{measure.name}")

    def target(self, measure: Measure) -> float | None:
        """The quality that ``rounds_to_target`` counts up to."""
        return self._on(f"target_{measure.name}")

    def _on(self, name: str) -> float | None:
        value: float | None = getattr(self, name)
        return value


class Environment(Record):
    """``environment.json``: what results may depend on; ``versions`` maps package to version."""

    model_config = ConfigDict(extra="allow")

    python: str | None = None
    platform: str | None = None
    machine: str | None = None
    cpus: Whole | None = None
    threads: Whole | None = None
    gpu: str | None = None
    git_commit: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)


class PartitionRecord(Record):
    """``partition.json``: examples by client and class.

    ``class_counts``, the training examples, and ``test_counts`` are (clients, classes).
    """

    label_names: Names
    client_ids: Names
    class_counts: tuple[tuple[Count, ...], ...]
    test_counts: tuple[tuple[Count, ...], ...]

    @field_validator("class_counts", "test_counts")
    @classmethod
    def _fits(
        cls, table: tuple[tuple[int, ...], ...], info: ValidationInfo
    ) -> tuple[tuple[int, ...], ...]:
        rows, columns = (len(info.data.get(name, ())) for name in ("client_ids", "label_names"))
        if len(table) != rows or any(len(row) != columns for row in table):
            raise PydanticCustomError(
                "size",
                "{rows} rows (clients) of {columns} counts >= 0 (classes)",
                {"rows": rows, "columns": columns},
            )
        return table

    @property
    def majority_rate(self) -> float | None:
        """Accuracy on all held-out examples of always answering their most frequent class."""
        totals = [sum(column) for column in zip(*self.test_counts, strict=True)]
        return max(totals) / sum(totals) if sum(totals) else None

    @property
    def smallest_test(self) -> int | None:
        """Held-out examples of the client with the fewest."""
        return min((sum(row) for row in self.test_counts), default=None)


class Sample(Record):
    """``sample.json``: the beginning of a held-out text, its own continuation, and the models'.

    ``client`` names whose model it is where there is no global one.
    """

    domain: str
    prompt: str
    reference: str
    before: str
    after: str
    client: str | None = None


def mean_or_none(values: Sequence[float]) -> float | None:
    """The arithmetic mean, or ``None`` of nothing."""
    return fmean(values) if values else None
