"""CE-LoRA: cores travel, bases stay, and every client gets a mix of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from fedcore.checks import choice, count, number
from fedcore.data.cohort import Cohort
from fedcore.methods.base import (
    EMPTY_ROUND,
    Aggregate,
    Broadcast,
    Capabilities,
    ClientPlan,
    Description,
    Family,
    Method,
    unchanged,
)
from fedcore.methods.shared.uploads import check_cores
from fedcore.methods.tri.ce_lora.class_mixtures import (
    check_comparable,
    fit_class_mixtures,
    read_class_mixtures,
)
from fedcore.methods.tri.ce_lora.similarity import (
    cka_similarity,
    client_distances,
    cosine_similarity,
    data_similarity,
)
from fedcore_kernels import weighted_mean

Similarity = Literal["cosine", "cka"]
Reference = Literal["identity", "previous_mean"]


class Mixing(NamedTuple):
    """``weights (N, N)`` fp64, rows summing to one: who takes how much of whom; and its flags."""

    weights: Tensor
    flags: tuple[str, ...]


def _missing(clients: tuple[str, ...], statistics: Mapping[str, object]) -> tuple[str, ...]:
    """A flag where clients sent no statistics of their data."""
    silent = [client for client in clients if client not in statistics]
    if not silent:
        return ()
    if not statistics:
        return ("no client sent data statistics: mixed by similarity of the models alone",)
    return (
        f"{len(silent)} of {len(clients)} clients sent no data statistics, first {silent[0]}: "
        "compared by similarity of the models alone",
    )


@dataclass(frozen=True)
class CELoRA(Method):
    """Send the cores of ``s B_n R_n A_n`` alone and give each client a mean of similar ones.

    With N participants, ``S_data`` from the statistics of their data that they sent before their
    first round and ``S_model`` from their cores,

        S     = lam S_data + (1 - lam) S_model
        om_ij = exp(S_ij / temperature) / sum_j exp(S_ij / temperature),    j = i included
        R_i   = sum_j om_ij R_j                                             for every module

    and client i resumes from ``R_i`` with its own ``A_i``, ``B_i``, norms and head. The global row
    takes the weighted mean of the cores, from which a new client starts.

    *Data* (:mod:`.similarity`): ``S_data = exp(-D^2 / median D^2)``, with ``D`` a transport
    distance between small Gaussian mixtures of each class's features. *Model*: the cosine of
    ``R_i - I`` and ``R_j - I``, or of the differences to the last mean (``reference =
    "previous_mean"``); or CKA of the cores, which is blind to sign and scale and saturated near the
    identity. A client without statistics is compared by its model alone, which is flagged.

    ``temperature``: from 0, everyone keeps its own core, to infinity, everyone gets the plain mean.
    Similarities differ by 1 at most between the same client and an unrelated one; at the default
    0.2 that is a factor of 150 in weight, and half of it one of 12, so that with some tens of
    participants neither a client itself nor the crowd decides alone. We have not tuned it.
    ``weight_by_examples`` multiplies column j by the reported weight of client j.

    Not exact: with bases of their own the mean of cores is not the mean of models, and it depends
    on each client's gauge. Rotating one client's bases, ``(B O, O^T R, A)``, leaves its model as it
    is and ruins the average (error near 1), a defect that ``ce_lora.projected`` does not have.
    Needs equal ranks; padded cores have no meaning.

    Privacy: the statistics carry no guarantee of any kind. Features are neither clipped nor
    noised, means and variances describe real examples, and a component fitted to one to three
    examples *is* those examples, hence ``min_per_component``. ``share_counts`` (off) also sends the
    label histogram; without it classes weigh the same.

    Cost: ``r^2`` numbers per module each way; the statistics once, ``G (1 + 2 D)`` numbers for the
    G components of a client. The server computes ``D^2`` anew each round, since ``median D^2`` is
    over the participants.

    Source: CE-LoRA, arXiv 2503.23869, for the clients; its server's rule is not public, and
    distance, similarities and temperature here are ours.

    Raises:
        FedcoreError: ``lam`` is not a number in [0, 1], ``temperature`` not a finite number above
            0, ``min_per_component`` not an integer from 1, or a name is unknown.
    """

    lam: float = 0.5
    temperature: float = 0.2
    similarity: Similarity = "cosine"
    reference: Reference = "identity"
    weight_by_examples: bool = False
    min_per_component: int = 10
    share_counts: bool = False

    name: ClassVar[str] = "ce_lora"
    aliases: ClassVar[tuple[str, ...]] = ("CE-LoRA",)
    family: ClassVar[Family] = "tri"
    capabilities: ClassVar[Capabilities] = Capabilities(personalised=True, wants_features=True)
    description: ClassVar[Description] = Description(
        summary="cores mixed for each client by similarity of data and model",
        paper="arXiv 2503.23869",
        exact="no: the mean of cores over private bases",
        uplink="r^2, and once the mixtures of the classes",
        downlink="r^2, its own for each client",
        server_cost="N^2 r^2, and N^2 transport problems",
        privacy_note="clients see mixes of cores; the server sees feature mixtures, unprotected",
    )

    def __post_init__(self) -> None:
        number(self.name, "lam", self.lam, least=0, most=1)
        number(self.name, "temperature", self.temperature, above=0)
        unless = ", and 10 or more unless the examples may be known"
        count(self.name, "min_per_component", self.min_per_component, least=1, otherwise=unless)
        choice(self.name, "similarity", self.similarity, get_args(Similarity))
        choice(self.name, "reference", self.reference, get_args(Reference))

    @property
    def adapter_options(self) -> Mapping[str, Any]:
        """The start of the authors' adapter: ``R = I``, ``B = 0`` and a small ``A``."""
        return {"init": "ce"}

    def plan(self, round: int) -> ClientPlan:
        """Train everything, send ``R``: with ``B = 0`` at the start ``R`` alone has no gradient."""
        # A client resumes from its own bases, norms and head, and from its own mix of the cores.
        everything = frozenset("ABR")
        return ClientPlan(everything, frozenset("R"), sends_dense=False, private=everything)

    def statistics(self, features: Tensor, labels: Tensor, seed: int) -> Mapping[str, Tensor]:
        """The client's classes as mixtures; nothing where all are below ``min_per_component``.

        What is sent is described at :func:`.fit_class_mixtures`.
        An engine may add ``"encoder"``, a uint8 digest of the encoder; differing ones are refused.
        """
        return fit_class_mixtures(
            features, labels, seed, self.min_per_component, share_counts=self.share_counts
        )

    def check_statistics(self, statistics: Mapping[str, Tensor]) -> None:
        """Refuse mixtures that are malformed.

        Raises:
            FedcoreError: as :func:`.read_class_mixtures`.
        """
        read_class_mixtures(statistics)

    def aggregate(self, cohort: Cohort, previous: Broadcast) -> Aggregate:
        """A mix of the cores for every participant, the weighted mean for the global row.

        Raises:
            FedcoreError: clients of different ranks, uploads that hold anything but cores, or
                statistics that are malformed or not comparable.
        """
        self.check_cohort(cohort)
        if not len(cohort):
            return unchanged(previous, EMPTY_ROUND)
        check_cores(cohort.layout, previous.layout.select("R", dense=False), self.name)
        weights, flags = self.mixing(cohort, previous)
        dtype = previous.row.dtype
        mixed = (weights.to(cohort.updates.device) @ cohort.updates.double()).to(dtype)
        mean = weighted_mean(cohort.updates, cohort.weights).to(dtype)
        return Aggregate(
            previous.layout.scatter(previous.row, cohort.layout, mean),
            cohort.layout,
            flags=flags,
            personal=dict(zip(cohort.client_ids, mixed, strict=True)),
        )

    def mixing(self, cohort: Cohort, previous: Broadcast) -> Mixing:
        """The weights ``om`` of a round.

        Raises:
            FedcoreError: statistics that are malformed or not comparable.
        """
        similarity = self._model_similarity(cohort, previous)
        statistics = {
            client: cohort.statistics[client]
            for client in cohort.client_ids
            if cohort.statistics.get(client)
        }
        flags: tuple[str, ...] = ()
        if self.lam > 0:
            flags = _missing(cohort.client_ids, statistics)
            if statistics:
                places = [n for n, client in enumerate(cohort.client_ids) if client in statistics]
                mixtures = {c: read_class_mixtures(sent, c) for c, sent in statistics.items()}
                check_comparable(mixtures)
                of_data = data_similarity(client_distances(list(mixtures.values())))
                both = np.ix_(places, places)
                combined = self.lam * of_data + (1 - self.lam) * similarity[both]
                similarity = similarity.copy()
                similarity[both] = combined
        # Relative to the row's largest, so that nothing overflows at a low temperature.
        exponent = (similarity - similarity.max(axis=1, keepdims=True)) / self.temperature
        weights = np.exp(exponent)
        if self.weight_by_examples:
            weights = weights * cohort.shares.cpu().numpy()
        weights = weights / weights.sum(axis=1, keepdims=True)
        return Mixing(torch.from_numpy(weights), flags)

    def _model_similarity(self, cohort: Cohort, previous: Broadcast) -> np.ndarray:
        groups = cohort.layout.groups
        # The difference to the start must not be rounded to the wire's bf16 or fp16.
        updates = cohort.updates.to(torch.promote_types(cohort.updates.dtype, torch.float32))
        cores = [group.view(updates) for group in groups]
        if self.similarity == "cka":
            return cka_similarity(cores).cpu().numpy()
        if self.reference == "previous_mean":
            mean = previous.layout.gather(previous.row, cohort.layout).to(updates.dtype)
            starts = [group.view(mean) for group in groups]
        else:
            # Rows are R times the client's scaling, so what does not move is that times I.
            columns = {module: j for j, module in enumerate(cohort.layout.modules)}
            starts = []
            for group in groups:
                scale = cohort.scalings[:, [columns[module] for module in group.modules]]
                eye = torch.eye(group.rows, dtype=torch.float64)
                starts.append((scale[:, :, None, None] * eye).to(updates))
        moves = [core - start for core, start in zip(cores, starts, strict=True)]
        return cosine_similarity(moves).cpu().numpy()
