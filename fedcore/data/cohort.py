"""One round's uploads as one matrix: one row per client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fedcore.data.adapter_state import AdapterState
from fedcore.data.compatibility import adapter_problem, mismatch, token_rows
from fedcore.data.peft_files import read_adapter
from fedcore.data.rows import absorb_scalings, widest_layout
from fedcore.data.validation import (
    Dropped,
    OnInvalid,
    check_row,
    check_state,
    check_weight,
    enforce,
    rank_problem,
)
from fedcore.errors import FedcoreError
from fedcore_kernels.layout import FactorLayout


@dataclass(frozen=True)
class Cohort:
    """The uploads of one round that passed validation, sorted by client id.

    Attributes:
        layout: where each tensor stands in a row.
        updates: ``(N, P)`` float; scalings are absorbed, lower ranks are padded with zero rows.
        weights: ``(N,)`` fp64, positive, as reported (usually examples); not normalised.
        client_ids: N distinct ids in ascending order.
        round: the round the uploads belong to, counted from 0.
        ranks: ``(N, L)`` int64, the rank of each module (columns as ``layout.modules``).
        scalings: ``(N, L)`` fp64, what was absorbed, relative to the server's own scaling.
        dropped: clients left out, with reasons.
        statistics: client id to the statistics of its data, sent before its first round, by name.
    """

    layout: FactorLayout
    updates: Tensor
    weights: Tensor
    client_ids: tuple[str, ...]
    round: int
    ranks: Tensor
    scalings: Tensor
    dropped: tuple[Dropped, ...] = ()
    statistics: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.client_ids)

    @property
    def shares(self) -> Tensor:
        """``(N,)`` fp64, the weights normalised to sum to one."""
        return self.weights / self.weights.sum()

    @property
    def mixed_ranks(self) -> bool:
        """Whether any module has clients of different ranks, or below the layout's."""
        full = torch.tensor(
            [
                max(slot.rows for slot in self.layout.factor_slots if slot.module == module)
                for module in self.layout.modules
            ],
            dtype=torch.int64,
        )
        return bool((self.ranks != full).any())

    @classmethod
    def from_states(
        cls,
        states: Mapping[str, AdapterState],
        weights: Mapping[str, float] | None = None,
        *,
        layout: FactorLayout | None = None,
        round: int = 0,
        on_invalid: OnInvalid = "raise",
    ) -> Cohort:
        """Gather adapters (client id to state) into a cohort.

        Args:
            weights: client id to weight; all ones by default.
            layout: what must be there; by default the first client's tensors, at each module's
                largest rank.
            on_invalid: ``"raise"`` names the first bad client; ``"drop"`` leaves bad ones out.

        Raises:
            FedcoreError: naming client, module and value; always when weights are all zero.
        """
        if not states:
            raise FedcoreError("no adapters were given")
        if layout is None:
            first = states[min(states)].layout()
            layout = widest_layout(first, (state.ranks for state in states.values()))
        family = next(iter(states.values())).family
        builder = CohortBuilder(layout, sorted(states), round=round)
        for client_id in sorted(states):
            state = states[client_id]
            problem = check_state(state, layout, mixed_ranks=True)
            if state.family != family:
                problem = f"its adapter is of family {state.family!r}, others are {family!r}"
            if problem:
                builder.refuse(client_id, problem)
                continue
            builder.fill(client_id, state)
            builder.receive(client_id, 1.0 if weights is None else weights.get(client_id, 0.0))
        return builder.finish(on_invalid)

    @classmethod
    def from_folders(
        cls,
        folders: Mapping[str, str | Path],
        weights: Mapping[str, float] | None = None,
        *,
        on_invalid: OnInvalid = "raise",
    ) -> Cohort:
        """Gather PEFT adapter folders (client id to folder) into a cohort.

        Raises:
            FedcoreError: naming the first client, with ``"raise"``, whose folder cannot be read, or
                whose adapter cannot be averaged, by itself or with that of the first client, or is
                of a rank that its update cannot have.
        """
        states: dict[str, AdapterState] = {}
        bad: list[Dropped] = []
        for client_id, folder in sorted(folders.items()):
            try:
                state = read_adapter(folder, name=f"client {client_id}")
            except FedcoreError as error:
                bad.append(Dropped(client_id, str(error)))
                continue
            first = min(states) if states else client_id
            problem = _folder_problem(state, states.get(first, state), first)
            if problem := problem or rank_problem(state):
                bad.append(Dropped(client_id, problem))
            else:
                states[client_id] = state
        enforce(bad, on_invalid, 0)
        cohort = cls.from_states(states, weights, on_invalid=on_invalid)
        return replace(cohort, dropped=tuple(sorted([*cohort.dropped, *bad])))


def _folder_problem(state: AdapterState, first: AdapterState, whose: str) -> str | None:
    """Why an adapter cannot stand in a row beside that of the client ``whose``."""
    problem = adapter_problem(state)
    if problem or state is first:
        return problem
    if state.family == first.family:
        layout = widest_layout(first.layout(), [first.ranks, state.ranks])
        problem = mismatch(state, first, f"client {whose}", layout, same_base=False)
    if problem is None and token_rows(state) != token_rows(first):
        problem = f"its trainable_token_indices are not those of client {whose}"
    if problem is None:
        names = sorted(state.constants.keys() | first.constants.keys())
        constants = state.constants, first.constants
        other = (name for name in names if not _equal(*(part.get(name) for part in constants)))
        problem = next((f"{name} differs from that of client {whose}" for name in other), None)
    return problem


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


class CohortBuilder:
    """Rows for the clients of a round, filled as their uploads arrive.

    An engine writes each upload straight into ``row(client_id)`` and then calls ``receive``;
    clients that never do are dropped with the reason that they did not report.
    """

    def __init__(
        self,
        layout: FactorLayout,
        client_ids: Sequence[str],
        *,
        round: int,
        server_scaling: Mapping[str, float] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        twice = {client for client in client_ids if list(client_ids).count(client) > 1}
        if twice:
            raise FedcoreError(f"client {min(twice)} appears twice in the round")
        self.layout = layout
        self.round = round
        self._order = sorted(client_ids)
        self._index = {client: i for i, client in enumerate(self._order)}
        self._server_scaling = server_scaling
        n, modules = len(self._order), layout.modules
        self._updates = torch.zeros(n, layout.size, dtype=dtype)
        self._weights = torch.zeros(n, dtype=torch.float64)
        self._scalings = torch.ones(n, len(modules), dtype=torch.float64)
        full = {slot.module: slot.rows for slot in layout.factor_slots}
        self._ranks = torch.tensor([[full[module] for module in modules]] * n, dtype=torch.int64)
        self._ranks = self._ranks.reshape(n, len(modules))
        self._received: set[str] = set()
        self._problems: dict[str, str] = {}

    def row(self, client_id: str) -> Tensor:
        """The client's row, to be written in place: ``(P,)``."""
        return self._updates[self._place(client_id)]

    def fill(self, client_id: str, state: AdapterState) -> None:
        """Write an adapter into the client's row, with its scalings absorbed."""
        place = self._place(client_id)
        if state.dtype == torch.float64 and self._updates.dtype != torch.float64:
            self._updates = self._updates.double()
        row = state.to_row(self.layout, out=self._updates[place])
        for j, module in enumerate(self.layout.modules):
            relative = state.scaling[module]
            if self._server_scaling is not None:
                relative /= self._server_scaling[module]
            self._scalings[place, j] = relative
            self._ranks[place, j] = state.rank(module)
        scaling = dict(zip(self.layout.modules, self._scalings[place].tolist(), strict=True))
        absorb_scalings(row, self.layout, state.family, scaling)

    def receive(
        self,
        client_id: str,
        weight: float,
        *,
        round: int | None = None,
        frozen: str | None = None,
        expected_frozen: str | None = None,
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        """Declare a row complete and check it.

        Args:
            weight: the client's weight, usually its number of examples.
            round: the round the client trained for; another one than the builder's is stale.
            frozen: digest of what the client must not have changed.
            expected_frozen: the server's digest of the same.
            ranks: module to the client's rank, where its row was not filled from an adapter and
                the ranks are not the layout's.
        """
        place = self._place(client_id)
        if client_id in self._received:
            raise FedcoreError(f"round {self.round}: client {client_id} reported twice")
        self._received.add(client_id)
        if ranks is not None:
            columns = [ranks[module] for module in self.layout.modules]
            self._ranks[place] = torch.tensor(columns, dtype=torch.int64)
        stale = round is not None and round != self.round
        changed = expected_frozen is not None and frozen != expected_frozen
        problem = (
            (f"its upload is for round {round}" if stale else None)
            or ("a frozen factor or frame differs from the broadcast" if changed else None)
            or check_weight(weight)
            or check_row(self._updates[place], self.layout)
        )
        if problem:
            self._problems.setdefault(client_id, problem)
        else:
            self._weights[place] = weight

    def refuse(self, client_id: str, reason: str) -> None:
        """Leave a client out for a reason found elsewhere (no reply, a malformed upload)."""
        self._place(client_id)
        self._received.add(client_id)
        self._problems.setdefault(client_id, reason)

    def finish(self, on_invalid: OnInvalid = "raise") -> Cohort:
        """The cohort of the valid uploads; clients of weight zero have no influence and no row.

        Raises:
            FedcoreError: an upload is invalid and ``on_invalid`` is ``"raise"``, or valid uploads
                exist and all their weights are zero.
        """
        bad = [Dropped(client, reason) for client, reason in sorted(self._problems.items())]
        enforce(bad, on_invalid, self.round)
        silent = [
            Dropped(client, "it did not report")
            for client in self._order
            if client not in self._received
        ]
        valid = [c for c in self._order if c in self._received and c not in self._problems]
        weighted = [client for client in valid if self._weights[self._index[client]] > 0]
        if valid and not weighted:
            raise FedcoreError(f"round {self.round}: the weights of all clients are zero")
        weightless = [Dropped(c, "its weight is zero") for c in valid if c not in weighted]
        places = torch.tensor([self._index[client] for client in weighted], dtype=torch.int64)
        # The common case keeps the matrix that the uploads were written into.
        whole = len(weighted) == len(self._order)
        return Cohort(
            layout=self.layout,
            updates=self._updates if whole else self._updates[places],
            weights=self._weights[places],
            client_ids=tuple(weighted),
            round=self.round,
            ranks=self._ranks[places],
            scalings=self._scalings[places],
            dropped=tuple(sorted([*bad, *silent, *weightless])),
        )

    def _place(self, client_id: str) -> int:
        if client_id not in self._index:
            raise FedcoreError(f"round {self.round}: client {client_id} was not asked to take part")
        return self._index[client_id]


@dataclass(frozen=True)
class UploadedRow:
    """One client's upload as it arrived: its row, and what its checks need.

    Attributes:
        row: ``(P,)`` in the layout of the round's uploads.
        weight: the client's weight, usually its number of examples.
        round: the round the client trained for, None where it does not say.
        frozen: digest of what the client must not have changed, None where it does not say.
        expected_frozen: the server's digest of the same.
        ranks: module to the client's rank, where its ranks are not the layout's.
    """

    row: Tensor
    weight: float
    round: int | None = None
    frozen: str | None = None
    expected_frozen: str | None = None
    ranks: Mapping[str, int] | None = None


def gather(
    layout: FactorLayout,
    clients: Sequence[str],
    uploads: dict[str, UploadedRow],
    refused: Mapping[str, str],
    *,
    round: int,
    dtype: torch.dtype,
    on_invalid: OnInvalid,
) -> Cohort:
    """The cohort of a round's ``uploads``, each checked.

    Every upload is let go once it stands in the cohort's matrix, so that both together take one
    row more than the matrix alone: ``uploads`` is empty afterwards.

    Args:
        clients: who takes part; those without an upload did not report.
        uploads: by client id.
        refused: client id to what the caller found wrong with its upload.
        dtype: of the cohort's matrix.

    Raises:
        FedcoreError: as :meth:`CohortBuilder.finish`.
    """
    builder = CohortBuilder(layout, clients, round=round, dtype=dtype)
    for client in sorted(uploads):
        upload = uploads.pop(client)
        builder.row(client).copy_(upload.row)
        builder.receive(
            client,
            upload.weight,
            round=upload.round,
            frozen=upload.frozen,
            expected_frozen=upload.expected_frozen,
            ranks=upload.ranks,
        )
    for client, reason in refused.items():
        builder.refuse(client, reason)
    return builder.finish(on_invalid)
