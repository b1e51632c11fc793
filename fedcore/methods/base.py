"""What an aggregation method is: a client half, a server half, and what it is capable of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any, ClassVar, Literal, Protocol, final

from torch import Tensor

from fedcore.data.cohort import Cohort
from fedcore.data.low_rank import LowRank
from fedcore.errors import FedcoreError
from fedcore_kernels import FactorLayout

Family = Literal["lora", "gram", "tri", "none"]

History = Literal["rounds", "previous", "alignment", "none"]

FACTORS: Mapping[str, tuple[str, ...]] = {
    "lora": ("A", "B"),
    "gram": ("A",),
    "tri": ("A", "B", "R"),
    "none": (),
}
"""The factors of each adapter family; the core of a tri-factor adapter is ``R``."""

_INSTEAD: Mapping[str, str] = {
    "lora": "product_svd accepts mixed ones and flora is exact with them",
    "gram": "florg accepts mixed ones",
}
"""What to use for clients of different ranks."""

EMPTY_ROUND = "no valid upload: the global state is kept"


@dataclass(frozen=True)
class Capabilities:
    """What code has to know of a method before it runs it.

    Attributes:
        always_exact: the broadcast product is the weighted mean of the clients' products, whatever
            they send.
        linear: the server only post-processes weighted sums of fixed-shape uploads, so it may run
            behind secure aggregation, and its memory does not grow with the number of clients.
        mixed_ranks: clients may have different ranks.
        personalised: each client ends with a model of its own.
        population: ``"clients"`` exchange each round, ``"alone"`` never, ``"pooled"`` is one holder
            of all data.
        uploads: whether the slots of an upload hold the factors, or something that was computed of
            them.
        restarts: every round starts a fresh adapter, so that optimiser moments mean nothing in it.
        updates_base: rounds give a residual: part of their result goes into the base weights.
        wants_features: :meth:`Method.statistics` is to be called on every client before its first
            round.
        history: what the server half needs besides uploads of factors: earlier rounds, the previous
            global state, that state for the option ``align`` alone, or nothing. Methods that can do
            without the rounds also aggregate adapters that were trained elsewhere.
        whole_model: every parameter of the model trains and travels, and there is no adapter.
        any_rank: leading rows of the result, as :meth:`Method.for_client` gives them, are the best
            of their rank, so that a result of any rank may be asked for.
    """

    always_exact: bool = False
    linear: bool = False
    mixed_ranks: bool = False
    personalised: bool = False
    population: Literal["clients", "alone", "pooled"] = "clients"
    uploads: Literal["factors", "statistics"] = "factors"
    restarts: bool = False
    updates_base: bool = False
    wants_features: bool = False
    history: History = "rounds"
    whole_model: bool = False
    any_rank: bool = False


@dataclass(frozen=True)
class Description:
    """What a method is and promises, in the words of tables; nothing branches on them.

    Attributes:
        summary: what it does, in half a line.
        paper: its source.
        exact: ``"yes"`` when the broadcast product is the weighted mean of the clients' products,
            otherwise the condition under which it is, or ``"no"``.
        uplink, downlink: numbers sent per adapted matrix, client and round.
        server_cost: floating-point operations per adapted matrix.
        privacy_note: what the clients learn of each other.
    """

    summary: str
    paper: str
    exact: str
    uplink: str
    downlink: str
    server_cost: str
    privacy_note: str = "clients see aggregates only"


@dataclass(frozen=True)
class Decision:
    """How much each of N clients counts, with its whole adapter.

    Attributes:
        weights: ``(N,)`` fp64, not negative; a client of weight 0 is left out.
        scales: ``(N,)`` fp64, what a client's update is multiplied by; None where all keep theirs.
        flags: one for every client that is treated otherwise than it reported.
    """

    weights: Tensor
    scales: Tensor | None = None
    flags: tuple[str, ...] = ()

    @property
    def kept(self) -> Tensor:
        """``(N,)`` boolean, the clients that are not left out."""
        return self.weights > 0


class Rule(Protocol):
    """Decides about clients before another method, the host, aggregates those that stay.

    It sees whole adapters, through the inner products of their updates alone; its host may then be
    given their modules all at once or some at a time.
    """

    def inner(self) -> Method:
        """The host."""

    def check_clients(self, clients: int) -> None:
        """Refuse a number of clients that is too small, before anything is computed.

        Raises:
            FedcoreError: with the number that is needed.
        """

    def decide(self, clients: Sequence[str], weights: Tensor, gram: Tensor) -> Decision:
        """Who counts for how much.

        Args:
            clients: N ids in ascending order.
            weights: ``(N,)`` fp64, positive, as reported.
            gram: ``(N, N)`` fp64, ``K_ij = sum over modules of <B_i A_i, B_j A_j>``.

        Raises:
            FedcoreError: the rule cannot judge these clients.
        """


@dataclass(frozen=True)
class ClientPlan:
    """The client half for one round: which factors train, which of them are sent, and the rest.

    Factors of the family that are not in ``trains`` are frozen: the client must hold them exactly
    as broadcast. What trains and is not sent is the client's own and never leaves it.

    Attributes:
        trains: factors that local training changes.
        sends: factors in an upload.
        sends_dense: whether an upload holds the dense tensors, the head for instance.
        reads: factors that :meth:`Method.prepare_upload` is shown; those that are sent by default.
        private: factors of which a client starts the next round with values of its own in place of
            the global ones, and the dense tensors unless they are sent; what it trains and keeps by
            default.
    """

    trains: frozenset[str]
    sends: frozenset[str]
    sends_dense: bool = True
    reads: frozenset[str] | None = None
    private: frozenset[str] | None = None

    @property
    def keeps(self) -> frozenset[str]:
        """The factors that a client trains and keeps to itself."""
        return self.trains - self.sends


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

    Attributes:
        rank: directions kept.
        condition: condition number of what was kept; ``nan`` where not known.
        gap: relative gap ``1 - lambda_{r+1} / lambda_r`` behind the last kept eigenvalue or
            singular value; ``nan`` where not known.
    """

    rank: int
    condition: float
    gap: float

    @property
    def error_bounds(self) -> tuple[float, float]:
        """Bounds of the aggregation error, relative to ``||M||``; ``nan`` where not known."""
        return nan, nan


@dataclass(frozen=True)
class Aggregate:
    """The server half's result.

    Attributes:
        row: ``(P,)`` the next global row, in the broadcast's layout.
        changed: the part of the layout that is new.
        steps: module to what its step reported; empty for plain means.
        flags: things a user should know about this round.
        residual: module to a low-rank increment of the base weight that the clients add to what
            they hold already, as a frozen adapter of its own. Modules of rank 0 are left out.
        personal: client id to a row in the cohort's layout, which that client receives in place of
            the global row's values; a method that fills it is ``personalised``.
    """

    row: Tensor
    changed: FactorLayout
    steps: Mapping[str, StepReport] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    residual: Mapping[str, LowRank] = field(default_factory=dict)
    personal: Mapping[str, Tensor] = field(default_factory=dict)


class Method(ABC):
    """An aggregation method: frozen hyper-parameters and two pure halves.

    Subclasses are frozen dataclasses. Each has a ``name``, a ``family``, its ``capabilities`` and a
    ``description``, a server half :meth:`aggregate` and, where not everything is trained and sent,
    a client half :meth:`plan`; the other methods have a default that most keep.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    family: ClassVar[Family]

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What code branches on: an attribute of the class, or a property where it depends on
        options; hence to be asked of an instance.
        """

    @property
    @abstractmethod
    def description(self) -> Description:
        """What people read of the method."""

    @property
    def rule(self) -> Rule | None:
        """What decides about whole adapters before modules are aggregated; None if nothing does.

        A method without one treats every module on its own.
        """
        return None

    @property
    def adapter_options(self) -> Mapping[str, Any]:
        """What the method asks of its adapter, in the words of ``attach_adapter``; nothing here."""
        return {}

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
            row: ``(P,)`` what training left of the tensors in ``layout``; not to be written to.
            layout: the :meth:`read_layout` of ``round``.
            broadcast: the global state that the client started from.
            round: the server's round, counted from 0.
        """
        return Upload(row)

    def statistics(self, features: Tensor, labels: Tensor, seed: int) -> Mapping[str, Tensor]:
        """What a client reports about its data once, before its first round; nothing by default.

        Args:
            features: ``(n, D)`` of the client's examples, from the frozen encoder.
            labels: ``(n,)`` int64.
            seed: the client's own, for whatever is drawn.

        Returns:
            Named tensors; the server finds them in ``cohort.statistics[client_id]``.
        """
        return {}

    def check_statistics(self, statistics: Mapping[str, Tensor]) -> None:
        """Refuse what a client sent of its data where :meth:`aggregate` could not use it.

        Raises:
            FedcoreError: what is wrong with it; always, of a method that asks for nothing.
        """
        raise FedcoreError(f"it sent statistics of its data, and {self.name} takes none")

    @abstractmethod
    def aggregate(self, cohort: Cohort, previous: Broadcast) -> Aggregate:
        """The server half: the next global row from a round's valid uploads.

        An empty cohort keeps ``previous``, flagged.

        Raises:
            FedcoreError: the cohort breaks the method's contract (mixed ranks where it has none).
        """

    def completed(self, cohort: Cohort, previous: Broadcast) -> Cohort:
        """The cohort as the method reads it: what a client's upload says of what it did not send.

        The exact mean of products, against which an aggregation is measured, is that of this
        cohort. By default the cohort itself.
        """
        return cohort

    def from_mean(self, mean: Tensor, layout: FactorLayout, previous: Broadcast) -> Aggregate:
        """The next global row from the weighted mean of the uploads alone, as a sum gives it.

        Args:
            mean: ``(P,)`` in ``layout``, the upload layout of the round.
            layout: where each tensor stands in ``mean``.
            previous: the global state that the clients started from.

        Raises:
            FedcoreError: the method needs more than a sum, so it cannot run behind secure
                aggregation.
        """
        raise FedcoreError(
            f"{self.name} needs every upload, a sum-only aggregator shows it their sum alone; "
            "methods that `fedcore methods` lists as linear can run behind one"
        )

    def for_client(self, state: Broadcast, held: Broadcast, ranks: Sequence[int]) -> Tensor:
        """The global row as a client of lower ranks receives it: its leading rows.

        Args:
            state: the global state, as :meth:`aggregate` left it.
            held: what the client started its last round from; of the same layout.
            ranks: L numbers in the order of ``layout.modules``, each from 1 to the layout's.

        Returns:
            ``(P,)`` rows beyond a module's rank are zero.

        Raises:
            FedcoreError: a rank out of its range, another number of ranks than modules, or ranks
                below the layout's where the method needs equal ones.
        """
        rank_of = checked_ranks(state.layout, ranks)
        row = state.row.clone()
        for slot in state.layout.factor_slots:
            rank = rank_of[slot.module]
            if rank < slot.rows:
                if not self.capabilities.mixed_ranks:
                    raise FedcoreError(
                        f"ranks asks for {rank} in {slot.module}; {self.name} needs equal ranks "
                        f"({slot.rows})"
                    )
                view = state.layout.view(row, slot)
                view[rank:] = 0
                if slot.factor == "R":
                    view[:, rank:] = 0
        return row

    @final
    def upload_layout(self, broadcast: FactorLayout, round: int) -> FactorLayout:
        """The layout of one upload in ``round``."""
        plan = self.plan(round)
        return broadcast.select(plan.sends, dense=plan.sends_dense)

    @final
    def read_layout(self, broadcast: FactorLayout, round: int) -> FactorLayout:
        """The layout of what :meth:`prepare_upload` is shown; that of the upload by default."""
        plan = self.plan(round)
        reads = plan.sends if plan.reads is None else plan.reads
        return broadcast.select(reads, dense=plan.sends_dense)

    @final
    def frozen_layout(self, broadcast: FactorLayout, round: int) -> FactorLayout:
        """The factors that no client may change in ``round``."""
        frozen = frozenset(FACTORS[self.family]) - self.plan(round).trains
        return broadcast.select(frozen, dense=False)

    @final
    def private_layout(self, broadcast: FactorLayout, round: int) -> FactorLayout:
        """The slots in which a client holds values of its own in place of the global ones."""
        plan = self.plan(round)
        private = plan.keeps if plan.private is None else plan.private
        return broadcast.select(private, dense=not plan.sends_dense)

    @final
    def check_cohort(self, cohort: Cohort) -> None:
        """Refuse mixed ranks unless the method has them.

        Raises:
            FedcoreError: naming the client and its ranks.
        """
        if self.capabilities.mixed_ranks or not cohort.mixed_ranks:
            return
        full = cohort.ranks.max(dim=0).values
        for client, ranks in zip(cohort.client_ids, cohort.ranks, strict=True):
            if bool((ranks != full).any()):
                module = cohort.layout.modules[int((ranks != full).nonzero()[0])]
                raise FedcoreError(
                    f"round {cohort.round}: client {client} has rank {int(ranks.min())} in "
                    f"{module}, others up to {int(full.max())}; {self.name} needs equal ranks, "
                    + _INSTEAD.get(self.family, "give all clients one rank")
                )


def checked_ranks(layout: FactorLayout, ranks: Sequence[int]) -> dict[str, int]:
    """Module to rank, from a client's ranks in the order of ``layout.modules``.

    Raises:
        FedcoreError: a rank outside of 1 to the layout's, or another number of ranks than modules.
    """
    modules = layout.modules
    if len(ranks) != len(modules):
        raise FedcoreError(f"ranks has {len(ranks)} entries; pass one for each of {modules}")
    rank_of = dict(zip(modules, map(int, ranks), strict=True))
    for slot in layout.factor_slots:
        if not 1 <= rank_of[slot.module] <= slot.rows:
            raise FedcoreError(
                f"ranks asks for {rank_of[slot.module]} in {slot.module}; pass 1 to {slot.rows}"
            )
    return rank_of


def unchanged(previous: Broadcast, reason: str) -> Aggregate:
    """The previous global row, flagged with why nothing changed."""
    return Aggregate(previous.row, previous.layout.select((), dense=False), flags=(reason,))
