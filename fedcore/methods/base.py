"""What an aggregation method is: a client half, a server half, and its traits as data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError
from fedcore_kernels.layout import FactorLayout

Family = Literal["lora", "gram", "none"]

FACTORS: Mapping[str, tuple[str, ...]] = {"lora": ("A", "B"), "gram": ("A",), "none": ()}
"""The factors of each adapter family."""


@dataclass(frozen=True)
class Traits:
    """What a method promises, in words a table can show and values a program can read.

    Attributes:
        exact: ``"yes"`` when the broadcast product is the weighted mean of the clients' products,
            otherwise the condition under which it is, or ``"no"``.
        linear: the server only post-processes weighted sums of fixed-shape uploads, so it may run
            behind secure aggregation.
        mixed_ranks: clients may have different ranks.
        personalised: each client ends with a model of its own.
        streaming: server memory does not grow with the number of clients.
        uplink, downlink: numbers sent per adapted matrix, client and round.
        server_cost: floating-point operations per adapted matrix.
        privacy_note: what the clients learn of each other.
    """

    exact: str
    linear: bool
    mixed_ranks: bool
    personalised: bool
    streaming: bool
    uplink: str
    downlink: str
    server_cost: str
    privacy_note: str = "clients see aggregates only"


@dataclass(frozen=True)
class ClientPlan:
    """The client half for one round: which factors train, and which of them are sent.

    Factors of the family that are not in ``trains`` are frozen: the client must hold them exactly
    as broadcast.
    """

    trains: frozenset[str]
    sends: frozenset[str]
    sends_dense: bool = True


@dataclass(frozen=True)
class Broadcast:
    """The global state that the clients of a round started from: a row and its layout."""

    layout: FactorLayout
    row: Tensor


@dataclass(frozen=True)
class Upload:
    """What a client sends: a row, and what a user should know of how it was made.

    Attributes:
        row: ``(P,)`` in the upload layout of the round.
        flags: trouble that the client half met; they go into the round's record with its name.
    """

    row: Tensor
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepReport:
    """What the server step found out about one module.

    ``rank`` kept, ``condition`` number of what was kept, ``gap`` between the last kept and the
    first dropped eigenvalue relative to the first (``nan`` where not known).
    """

    rank: int
    condition: float
    gap: float


@dataclass(frozen=True)
class Aggregate:
    """The server half's result.

    Attributes:
        row: ``(P,)`` the next global row, in the broadcast's layout.
        changed: the part of the layout that is new.
        steps: module to what its step reported; empty for plain means.
        flags: things a user should know about this round.
    """

    row: Tensor
    changed: FactorLayout
    steps: Mapping[str, StepReport] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


class Method(ABC):
    """An aggregation method: frozen hyper-parameters and two pure halves.

    Subclasses are frozen dataclasses, one a file, and state their ``traits`` as data.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    summary: ClassVar[str]
    paper: ClassVar[str]
    family: ClassVar[Family]
    traits: ClassVar[Traits]
    population: ClassVar[Literal["clients", "alone", "pooled"]] = "clients"
    """``"clients"`` exchange each round, ``"alone"`` never, ``"pooled"`` is one holder of all."""

    def plan(self, round: int) -> ClientPlan:
        """The client half for ``round``, counted from 0 by the server; all trains, all is sent."""
        factors = frozenset(FACTORS[self.family])
        return ClientPlan(trains=factors, sends=factors)

    def prepare_upload(
        self, row: Tensor, layout: FactorLayout, broadcast: Broadcast, round: int
    ) -> Upload:
        """The end of the client half: what is done to the trained tensors before they are sent.

        Called on the client after local training. A pure function of its arguments: only the upload
        changes, while the client's model, its optimiser state and its frozen factors stay as
        training left them. The default sends ``row`` itself.

        Args:
            row: ``(P,)`` what training left of the tensors to be sent; not to be written to.
            layout: the upload layout of ``round``.
            broadcast: the global state that the client started from.
            round: the server's round, counted from 0.
        """
        return Upload(row)

    @abstractmethod
    def aggregate(self, cohort: Cohort, previous: Broadcast) -> Aggregate:
        """The server half: the next global row from a round's valid uploads.

        An empty cohort keeps ``previous``, flagged.

        Raises:
            FedcoreError: the cohort breaks the method's contract (mixed ranks where it has none).
        """

    def upload_layout(self, broadcast: FactorLayout, round: int) -> FactorLayout:
        """The layout of one upload in ``round``."""
        plan = self.plan(round)
        return broadcast.select(plan.sends, dense=plan.sends_dense)

    def frozen_layout(self, broadcast: FactorLayout, round: int) -> FactorLayout:
        """The factors that no client may change in ``round``."""
        plan = self.plan(round)
        held = frozenset(FACTORS[self.family]) - plan.trains
        return broadcast.select(held, dense=False)

    def check_cohort(self, cohort: Cohort) -> None:
        """Refuse mixed ranks unless the method has them.

        Raises:
            FedcoreError: naming the client and its ranks.
        """
        if self.traits.mixed_ranks or not cohort.mixed_ranks:
            return
        full = cohort.ranks.max(dim=0).values
        mixed = "florg" if self.family == "gram" else "product_svd"
        for client, ranks in zip(cohort.client_ids, cohort.ranks, strict=True):
            if bool((ranks != full).any()):
                module = cohort.layout.modules[int((ranks != full).nonzero()[0])]
                raise FedcoreError(
                    f"round {cohort.round}: client {client} has rank {int(ranks.min())} in "
                    f"{module}, others up to {int(full.max())}; {self.name} needs equal ranks, "
                    f"{mixed} accepts mixed ones"
                )


def unchanged(previous: Broadcast, reason: str) -> Aggregate:
    """The previous global row, flagged with why nothing changed."""
    return Aggregate(previous.row, previous.layout.select((), dense=False), flags=(reason,))


EMPTY_ROUND = "no valid upload: the global state is kept"
