"""The tables of a recipe, each checked by itself."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedcore.data.base_identity import Mode, Part
from fedcore.data.validation import OnInvalid
from fedcore.errors import FedcoreError
from fedcore.federation.acceptance import MAX_GROWTH
from fedcore.methods import Method, create_method, find_method
from fedcore.privacy.accounting import AccountantName
from fedcore.training.conversations import FormatName, LossName
from fedcore.training.instruction_rows import Overlong
from fedcore.training.local_training import LocalSettings
from fedcore.training.optimisers import OptimiserSettings
from fedcore.training.private_training import PrivateSettings
from fedcore.training.schedules import Schedule, ScheduleName
from fedcore.training.token_head import LOGITS_BUDGET
from fedcore.training.weight_format import DtypeName, Quantisation, WeightFormat


class Section(BaseModel):
    """A table of a recipe: immutable, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSection(Section):
    """Which pretrained model.

    ``source``: ``minilm`` or ``smollm2``, a local folder, or a hub id ``org/name``. ``identity``:
    whether the digest by which server and clients compare their base model is of sampled blocks of
    its weights or of all; ``allow``: the parts of it that may differ. ``dtype``, ``quantisation``
    and ``compute_dtype``: in which numbers the base's weights are held, and 4-bit ones multiplied.
    """

    source: str = "minilm"
    max_length: int = Field(64, ge=4)
    identity: Mode = "sampled"
    allow: tuple[Part, ...] = ()
    dtype: DtypeName = "fp32"
    quantisation: Quantisation | None = None
    compute_dtype: DtypeName | None = None

    @property
    def weights(self) -> WeightFormat:
        """The same as loading takes it."""
        return WeightFormat(self.dtype, self.quantisation, self.compute_dtype)


SITES = "sites"
"""The ``data.source`` of a deployment whose sites have their own data."""


class DataSection(Section):
    """Which labelled texts, or rows of instruction data.

    ``source``: ``bbc-news``, a CSV, TSV or JSONL file, or a dataset of the hub with its ``subset``;
    ``"sites"`` where every node has a file of its own. ``sites`` simulates those: a folder with one
    file per site. ``labels`` are the classes of all sites, in their order.
    ``text_column`` may be a template of columns, as in ``"{question} {answer}"``; an empty
    ``label_column`` says that there are no labels.

    For task ``sft``: ``format`` is what a row holds, ``"messages"`` if unset; ``columns`` are its
    names in the files, or templates; ``loss`` is which messages are learned, ``"last"`` if unset;
    ``overlong`` is what becomes of rows with more than ``model.max_length`` tokens, ``"drop"`` if
    unset. ``label_column``, empty if unset, is that of domains, by which rows are dealt to clients.
    """

    source: str = "bbc-news"
    sites: str | None = None
    subset: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    labels: tuple[str, ...] | None = None
    format: FormatName | None = None
    columns: dict[str, str] | None = None
    loss: LossName | None = None
    overlong: Overlong | None = None
    test_fraction: float = Field(0.2, gt=0, lt=1)
    max_examples: int | None = Field(None, ge=10)

    @property
    def at_sites(self) -> bool:
        """Whether sites own the data, in a deployment or a simulation of one."""
        return self.sites is not None or self.source == SITES

    @model_validator(mode="after")
    def _fits_sites(self) -> DataSection:
        if not self.at_sites:
            if self.labels is not None:
                raise FedcoreError(
                    "data.labels is set, and the data set has its own classes; leave it out, or "
                    "set data.sites or data.source = 'sites'"
                )
            return self
        if self.sites is not None and "source" in self.model_fields_set:
            raise FedcoreError(
                f"data.source = {self.source!r} and data.sites are both set; leave one of them out"
            )
        for key in ("subset", "max_examples"):
            if getattr(self, key) is not None:
                raise FedcoreError(
                    f"data.{key} is set, and sites take all of their rows; leave it out"
                )
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise FedcoreError("data.labels names a label twice; pass each label once")
        if self.labels is not None and not self.label_column:
            raise FedcoreError("data.labels is set with an empty data.label_column; leave it out")
        if self.source == SITES and self.label_column and self.labels is None:
            raise FedcoreError(
                "data.labels is not set, and no one sees the rows of all sites; pass the list of "
                'all labels, or data.label_column = "" for texts without labels'
            )
        return self


class PartitionSection(Section):
    """How the training examples are spread over the clients."""

    kind: Literal["iid", "dirichlet", "by_label"] = "dirichlet"
    alpha: float = Field(0.5, gt=0)
    labels_per_client: int = Field(2, ge=1)
    min_examples: int = Field(8, ge=1)


class AdapterSection(Section):
    """The adapter every client trains; which family it is follows from the method.

    ``client_ranks`` gives the clients ranks of their own, in order of their ids and over again
    from the first; none may exceed ``rank``, the server's. ``dropout``, ``use_dora`` and
    ``modules_to_save`` are PEFT's; the first two are LoRA's alone.
    """

    rank: int = Field(4, ge=1)
    client_ranks: tuple[int, ...] | None = None
    alpha: float = Field(16.0, gt=0)
    use_rslora: bool = False
    target_modules: tuple[str, ...] | Literal["all-linear"] = ("query", "value")
    dropout: float = Field(0.0, ge=0, lt=1)
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    init_std: float | None = Field(None, gt=0)
    frame: Literal["structured", "qr"] = "structured"

    @model_validator(mode="after")
    def _ranks_fit(self) -> AdapterSection:
        for rank in self.client_ranks or ():
            if not 1 <= rank <= self.rank:
                raise ValueError(f"client_ranks holds {rank}; pass 1 to adapter.rank = {self.rank}")
        return self


class MethodSection(BaseModel):
    """The aggregation method by name, and its own options as further keys."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = "florg"

    @model_validator(mode="after")
    def _known(self) -> MethodSection:
        self.create()
        return self

    def create(self) -> Method:
        """The method with its options."""
        return create_method(self.name, **(self.model_extra or {}))


class OptimiserSection(Section):
    """The clients' optimiser. ``rates`` overrides ``rate`` for methods by name or family.

    ``schedule``: how the rate changes over all rounds, by transformers' names, after
    ``warmup_rounds`` in which it rises; ``schedule_options`` are its further arguments.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    rate: float = Field(2e-3, gt=0)
    rates: dict[str, float] = Field(default_factory=dict)
    head_rate: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    state: Literal["reset", "keep"] = "reset"
    schedule: ScheduleName = "constant"
    warmup_rounds: float = Field(0.0, ge=0, allow_inf_nan=False)
    schedule_options: dict[str, int | float | str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _schedules(self) -> OptimiserSection:
        self._schedule()
        return self

    def _schedule(self) -> Schedule:
        return Schedule(self.schedule, self.warmup_rounds, self.schedule_options)

    @field_validator("rates")
    @classmethod
    def _rates(cls, rates: dict[str, float]) -> dict[str, float]:
        for name, rate in rates.items():
            if name not in _FAMILIES:
                find_method(name)
            if not rate > 0:
                raise ValueError(f"the learning rate of {name} is {rate}; it must be positive")
        return rates

    def settings(self, method: Method) -> OptimiserSettings:
        """The settings for one method: its own rate, else its family's, else the common one."""
        by_name = {find_method(n).name: r for n, r in self.rates.items() if n not in _FAMILIES}
        rate = by_name.get(method.name, self.rates.get(method.family, self.rate))
        return OptimiserSettings(
            name=self.name,
            rate=rate,
            head_rate=self.head_rate,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            beta1=self.beta1,
            beta2=self.beta2,
            state=self.state,
            schedule=self._schedule(),
        )


_FAMILIES = ("lora", "gram", "tri", "none")


class TrainingSection(Section):
    """How much a client trains in a round: ``steps`` if given, otherwise ``epochs``.

    ``threads`` is the number of threads of every process that computes for the run, those of the
    server and of the clients; unset, it is the libraries' own. ``prefix_budget`` is how many bytes
    the states of the frozen layers may take; unset, it is a quarter of the device's free memory.
    For task ``sft``: a batch is worked on in ``accumulation`` parts, and with ``checkpointing``
    activations are computed twice instead of kept.
    """

    batch_size: int = Field(16, ge=1)
    steps: int | None = Field(None, ge=1)
    epochs: int = Field(1, ge=1)
    clip_norm: float | None = Field(1.0, gt=0)
    autocast: bool = False
    device: str = "auto"
    threads: int | None = Field(None, ge=1)
    reuse_prefix: bool = True
    prefix_budget: int | None = Field(None, ge=0)
    accumulation: int | None = Field(None, ge=1)
    checkpointing: bool | None = None

    def settings(self) -> LocalSettings:
        """The same as the training loop takes it."""
        return LocalSettings(
            batch_size=self.batch_size,
            steps=self.steps,
            epochs=self.epochs,
            clip_norm=self.clip_norm,
            autocast=self.autocast,
        )


class RoundsSection(Section):
    """Who takes part in a round, how uploads travel, and what happens to those who fail.

    ``weighting``: by training examples, by the ``"tokens"`` that a language model predicts of them,
    or ``"uniform"``.

    ``max_growth`` and ``largest_share`` bound what one client can do: a result more than so many
    times as large as state and uploads is not accepted, a larger share of the weight is lowered.
    ``codec`` is the number format of the uploads. With ``secure_sum`` the server learns their
    weighted mean alone, through a simulation of secure aggregation, of at least ``min_cohort``
    clients: a round that fewer complete keeps the model.

    In a deployment the first round begins once all ``expected`` sites are there, or ``quorum`` of
    them after ``patience`` seconds; a round with fewer replies than the quorum's is repeated once,
    and then the run ends with its state saved.
    """

    participation: float = Field(1.0, gt=0, le=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    weighting: Literal["examples", "uniform", "tokens"] = "examples"
    on_invalid: OnInvalid = "raise"
    allow_identical_uploads: bool = False
    max_growth: float = Field(MAX_GROWTH, ge=1, allow_inf_nan=False)
    largest_share: float | None = Field(None, gt=0, le=1)
    codec: Literal["fp32", "bf16", "int8"] = "fp32"
    secure_sum: bool = False
    min_cohort: int = Field(2, ge=2)
    expected: int | None = Field(None, ge=1)
    quorum: int | None = Field(None, ge=1)
    patience: float = Field(600.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _enough_expected(self) -> RoundsSection:
        if self.expected is not None and self.quorum is not None and self.quorum > self.expected:
            raise ValueError(f"quorum is {self.quorum}; pass 1 to round.expected = {self.expected}")
        return self

    @model_validator(mode="after")
    def _fits_secure_sum(self) -> RoundsSection:
        if self.secure_sum and self.largest_share is not None:
            raise ValueError(
                "largest_share is set with secure_sum, behind which no client's weight is seen; "
                "leave it out"
            )
        if self.secure_sum and self.codec != "fp32":
            raise ValueError(
                f"codec is {self.codec!r} with secure_sum, whose uploads are masked integers; "
                "leave it at 'fp32'"
            )
        return self

    def sampled(self, clients: int) -> int:
        """How many of so many clients take part in a round."""
        return max(1, int(self.participation * clients + 0.5))


class CentralPrivacySection(Section):
    """Differential privacy of whole clients, by a server that they trust; off without
    ``noise_multiplier``.

    Every client's update is clipped to ``max_norm``, and noise of ``noise_multiplier`` times that
    is added to a round's sum. Clients are drawn independently, with probability
    ``round.participation``.
    """

    noise_multiplier: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_norm: float = Field(1.0, gt=0, allow_inf_nan=False)


class PrivacySection(Section):
    """Differential privacy of the clients' examples, by DP-SGD; off without ``noise_multiplier``.

    Every example's gradient is clipped to ``max_grad_norm``, which replaces
    ``training.clip_norm``, and noise of ``noise_multiplier`` times that is added to a batch's sum;
    ``training.batch_size`` is the expected size of a Poisson sample. ``delta`` and ``accountant``
    are those of the epsilon in the record. ``noise`` is ``"secret"``, drawn anew, or
    ``"seeded"`` by the run's seed, so that runs repeat; who knows the seed can take it away again.
    """

    noise_multiplier: float | None = Field(None, gt=0, allow_inf_nan=False)
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=False)
    delta: float = Field(1e-5, gt=0, lt=1)
    accountant: AccountantName = "rdp"
    noise: Literal["seeded", "secret"] = "secret"
    central: CentralPrivacySection = CentralPrivacySection()

    def settings(self) -> PrivateSettings | None:
        """The same as the training loop takes it; None where clients train without privacy."""
        if self.noise_multiplier is None:
            return None
        return PrivateSettings(self.noise_multiplier, self.max_grad_norm)


class EvaluationSection(Section):
    """When the models are evaluated, and the quality that traffic is counted up to.

    ``on``: whose held-out rows: the ``"server"``'s, those of the ``"sites"``, each of which sends
    sums over its own, or ``"both"``. A site with fewer than ``min_targets`` predictions sends
    nothing. ``target_accuracy`` is for classifiers, ``target_perplexity`` for language models, as
    is ``logits_budget``, the bytes that logits may take at once.

    ``tasks``: what the models of a run are asked once it has ended, by the names that
    ``fedcore evaluate`` knows, of each the first ``limit`` rows.
    """

    every: int = Field(1, ge=1)
    on: Literal["server", "sites", "both"] = "server"
    min_targets: int = Field(50, ge=1)
    batch_size: int = Field(64, ge=1)
    logits_budget: int = Field(LOGITS_BUDGET, ge=1)
    target_accuracy: float = Field(0.9, gt=0, le=1)
    target_perplexity: float | None = Field(None, gt=1)
    diagnostics: bool = True
    tasks: tuple[str, ...] | None = None
    limit: int | None = Field(None, ge=1)
