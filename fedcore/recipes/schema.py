"""A recipe: everything that decides a run, checked before anything is loaded or trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from fedcore.errors import FedcoreError
from fedcore.methods import Method
from fedcore.recipes.sections import (
    SITES,
    AdapterSection,
    DataSection,
    EvaluationSection,
    MethodSection,
    ModelSection,
    OptimiserSection,
    PartitionSection,
    PrivacySection,
    RoundsSection,
    Section,
    TrainingSection,
)
from fedcore.training.conversations import RowFormat
from fedcore.training.datasets import Reader, TextReader
from fedcore.training.instruction_data import InstructionReader
from fedcore.training.local_training import LocalSettings
from fedcore.training.sft_options import SftSettings

_OF_ROWS = ("format", "columns", "loss", "overlong")
_OF_TRL = ("accumulation", "checkpointing")


class Recipe(Section):
    """A federated fine-tuning job.

    ``task``: what the models learn, the class of a text, to continue it, or with ``"sft"`` to
    answer. ``sft`` passes options to trl's ``SFTConfig``.
    """

    name: str = "unnamed"
    description: str = ""
    task: Literal["classification", "causal", "sft"] = "classification"
    seed: int = Field(0, ge=0)
    rounds: int = Field(12, ge=1)
    clients: int = Field(10, ge=1)
    engine: Literal["local", "flower"] = "local"
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    partition: PartitionSection = PartitionSection()
    adapter: AdapterSection = AdapterSection()
    method: MethodSection = MethodSection()
    optimiser: OptimiserSection = OptimiserSection()
    training: TrainingSection = TrainingSection()
    round: RoundsSection = RoundsSection()
    privacy: PrivacySection = PrivacySection()
    evaluation: EvaluationSection = EvaluationSection()
    sft: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_domains(cls, values: Any) -> Any:
        """Instruction data have no labels but those that are named."""
        if isinstance(values, dict) and values.get("task") == "sft":
            data = values.get("data", {})
            if isinstance(data, dict) and "label_column" not in data:
                return {**values, "data": {**data, "label_column": ""}}
        return values

    @model_validator(mode="after")
    def _fits_task(self) -> Recipe:
        if self.round.weighting == "tokens" and self.task == "classification":
            raise FedcoreError(
                "round.weighting is 'tokens' and task is 'classification', which predicts one "
                "class of an example; pass 'examples'"
            )
        if self.evaluation.tasks and self.task == "classification":
            raise FedcoreError(
                "recipe key evaluation.tasks: they are answered by language models, and task is "
                "'classification'; leave it out"
            )
        if self.task == "sft":
            self._check_sft()
            return self
        only = {f"data.{key}": getattr(self.data, key) for key in _OF_ROWS}
        only |= {f"training.{key}": getattr(self.training, key) for key in _OF_TRL}
        for key, value in {**only, "sft": self.sft}.items():
            if value is not None:
                raise FedcoreError(
                    f"recipe key {key}: it is for task 'sft', and task is {self.task!r}; leave it "
                    "out"
                )
        return self

    def _check_sft(self) -> None:
        if "text_column" in self.data.model_fields_set:
            raise FedcoreError(
                "recipe key data.text_column: rows of task 'sft' have a format; use data.format "
                "and data.columns"
            )
        self.reader()
        self.sft_settings().part(self.training.settings())
        if self.privacy.noise_multiplier is not None:
            given = {f"training.{key}": getattr(self.training, key) for key in _OF_TRL}
            for key, value in {**given, "sft": self.sft}.items():
                if value is not None:
                    raise FedcoreError(
                        f"recipe key {key}: with privacy.noise_multiplier fedcore's own loop "
                        "trains, example by example; leave it out"
                    )

    @model_validator(mode="after")
    def _head_is_fp32(self) -> Recipe:
        model = self.model
        for key, plain in (("dtype", "fp32"), ("quantisation", None)):
            if self.task == "classification" and getattr(model, key) != plain:
                raise FedcoreError(
                    f"model.{key} is {getattr(model, key)!r} and task is 'classification', whose "
                    "head trains in fp32; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _enough_clients(self) -> Recipe:
        # How many sites there are is known only where their files are.
        if not self.data.at_sites:
            self.check_cohort(self.clients)
        return self

    @model_validator(mode="after")
    def _fits_sites(self) -> Recipe:
        if not self.data.at_sites:
            if self.round.expected is not None:
                raise FedcoreError(
                    "round.expected is set, and all clients of a partition are expected; leave it "
                    "out, or set data.source = 'sites'"
                )
            if self.round.quorum is not None and self.round.quorum > self.clients:
                raise FedcoreError(
                    f"round.quorum is {self.round.quorum}; pass 1 to clients = {self.clients}"
                )
            return self
        if "partition" in self.model_fields_set:
            key = ".".join(["partition", *sorted(self.partition.model_fields_set)[:1]])
            raise FedcoreError(
                f"recipe key {key}: every site trains on its own rows, so nothing is partitioned; "
                "leave the section out"
            )
        if self.data.source != SITES:
            return self
        if self.round.expected is None:
            raise FedcoreError(
                "round.expected is not set, and no file says how many sites there are; pass the "
                "number of sites that the first round waits for"
            )
        if "clients" in self.model_fields_set and self.round.expected > self.clients:
            raise FedcoreError(
                f"round.expected is {self.round.expected}; pass 1 to clients = {self.clients}"
            )
        if self.evaluation.on != "sites":
            raise FedcoreError(
                f"evaluation.on is {self.evaluation.on!r}, and with data.source = 'sites' the "
                "server has no rows; pass evaluation.on = 'sites'"
            )
        if self.adapter.client_ranks is not None:
            raise FedcoreError(
                "adapter.client_ranks goes by the order of all clients, which sites of a "
                "deployment do not have; leave it out"
            )
        return self

    def check_cohort(self, clients: int) -> None:
        """Refuse a secure sum over fewer clients than its least.

        Raises:
            FedcoreError: every round of so many clients would be skipped.
        """
        asked, least = self.round.sampled(clients), self.round.min_cohort
        if self.round.secure_sum and asked < least:
            raise FedcoreError(
                f"round.min_cohort is {least}, and a round asks {asked} of {clients} clients: "
                "every round would be skipped; raise clients or round.participation"
            )

    def reader(self) -> Reader:
        """How the task's data are read.

        Raises:
            FedcoreError: a format, column or loss that rows of instruction data do not have.
        """
        data = self.data
        if self.task != "sft":
            return TextReader(data.text_column, data.label_column)
        try:
            form = RowFormat(data.format or "messages", data.columns or {}, data.loss or "last")
        except FedcoreError as error:
            raise FedcoreError(f"[data]: {error}") from None
        return InstructionReader(form, data.label_column)

    @property
    def by_trl(self) -> bool:
        """Whether trl trains the clients, rather than fedcore's own loop."""
        return self.task == "sft" and self.privacy.noise_multiplier is None

    def sft_settings(self) -> SftSettings:
        """How trl trains a client.

        Raises:
            FedcoreError: an option that fedcore sets, or an unknown one.
        """
        training = self.training
        return SftSettings(
            training.accumulation or 1, bool(training.checkpointing), dict(self.sft or {})
        )

    @property
    def most_clients(self) -> int | None:
        """How many clients there may be at most; None where sites may be any number."""
        unset = self.data.at_sites and "clients" not in self.model_fields_set
        return None if unset else self.clients

    def local_settings(self, method: Method) -> LocalSettings:
        """How much one trainer trains in a round; one holder of all data as much as everyone."""
        local = self.training.settings()
        if method.capabilities.population == "pooled" and local.steps is not None:
            return replace(local, steps=local.steps * self.clients)
        return local

    def plain(self) -> dict[str, Any]:
        """The recipe as nested plain values, without keys that are None."""
        values: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        if self.task == "sft":
            del values["data"]["text_column"]
        if self.data.at_sites:
            # What does not apply is refused where it is set, so it is not written as if it were.
            del values["partition"]
            if self.data.sites is not None:
                del values["data"]["source"]
            if self.most_clients is None:
                del values["clients"]
        return values
