"""The server's half of a round, whatever carries the uploads: open, receive or refuse, close.

A transport turns bytes into rows and rows into bytes; everything between is here, once: which
tensors are expected, in which precision they are kept, which uploads count, when a round is refused
as a whole, who counts as up to date afterwards, and what the server remembers for each client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedcore.data.announcement import Announcement
from fedcore.data.cohort import Cohort, UploadedRow, gather
from fedcore.data.rows import Ranks
from fedcore.data.validation import Dropped, OnInvalid, identical_rows
from fedcore.errors import FedcoreError, printable
from fedcore.federation.acceptance import (
    Limits,
    capped,
    client_norms,
    largest_uploads,
    norm,
    result_problem,
)
from fedcore.federation.announcements import Repeats
from fedcore.federation.state import (
    HELD,
    PERSONAL_PREFIX,
    TOLD_PREFIX,
    PerClient,
    ServerState,
    statistics_of,
)
from fedcore.methods.base import Aggregate, Broadcast, Method, unchanged

Aggregation = Callable[[Cohort, Broadcast], Aggregate]
"""A method's server half, or one that stands in front of it (a secure sum, a noisy mean)."""

_MOST_FLAGS = 20
_LONGEST_FLAG, _LONGEST_REASON = 200, 500

_NUMERICAL = (ArithmeticError, torch.linalg.LinAlgError, np.linalg.LinAlgError)


@dataclass(frozen=True)
class ClosedRound:
    """An aggregated round.

    Attributes:
        cohort: the valid uploads; ``dropped`` names all others with the reason.
        result: what the method made of them.
        state: the next state; its ``record`` is :attr:`record`.
        reported: the clients that replied, with a valid upload or not.
        flags: what a user should know of this round, the clients' own flags first.
    """

    cohort: Cohort
    result: Aggregate
    state: ServerState
    reported: tuple[str, ...]
    flags: tuple[str, ...]

    @property
    def record(self) -> dict[str, Any]:
        """The round as JSON, without what only a particular engine measures."""
        return _record(self.cohort, self.flags)


class OpenRound:
    """Collects one round's uploads by client id, then aggregates those that are valid.

    The state that it was opened on is never changed; a round that raises leaves it as it was.

    Args:
        method: the aggregation method.
        state: the state that the clients started from.
        clients: ids of the clients that take part.
        on_invalid: ``"raise"`` ends the round at the first invalid upload; ``"drop"`` leaves it
            out.
        allow_identical_uploads: accept uploads that are all equal bit for bit.
        starts: client id to the row ``(P,)`` that it started from, for clients of lower rank; the
            server keeps it for those that report.
        statistics: client id to what is known of its data before the round, besides what the state
            holds.
        min_cohort: the fewest valid uploads of a round; with fewer, all are left out and the state
            stays.
        limits: what is accepted of clients' weights and of the result.
        announced: what the broadcast says of itself and every upload has to repeat; None where no
            message carries it.
        plain_clients: whether clients may repeat nothing.

    Attributes:
        layout: of an upload.
        frozen: the factors that no client may change in this round.
    """

    def __init__(
        self,
        method: Method,
        state: ServerState,
        clients: Sequence[str],
        *,
        on_invalid: OnInvalid = "raise",
        allow_identical_uploads: bool = False,
        starts: Mapping[str, Tensor] | None = None,
        statistics: Mapping[str, Mapping[str, Tensor]] | None = None,
        min_cohort: int = 0,
        limits: Limits | None = None,
        announced: Announcement | None = None,
        plain_clients: bool = True,
    ) -> None:
        self.method, self.state = method, state
        self.layout = method.upload_layout(state.layout, state.round)
        self.frozen = method.frozen_layout(state.layout, state.round)
        self._clients = tuple(clients)
        self._on_invalid: OnInvalid = on_invalid
        self._allow_identical = allow_identical_uploads
        self._starts = dict(starts or {})
        self._statistics = dict(statistics or {})
        self._min_cohort = min_cohort
        self._limits = limits or Limits()
        self._uploads: dict[str, UploadedRow] = {}
        self._refused: dict[str, str] = {}
        self._reported: list[str] = []
        self._unreachable: dict[str, str] = {}
        self._new_statistics: dict[str, Mapping[str, Tensor]] = {}
        self._flags: list[str] = []
        self._repeats = Repeats(announced, state, plain_clients)

    @property
    def previous(self) -> Broadcast:
        """The global state that the clients started from."""
        return Broadcast(self.state.layout, self.state.row)

    def check_repeats(self, client: str, said: Announcement | None) -> None:
        """Compare what an upload says of its broadcast with what this round announced.

        A transport calls it before :meth:`receive`, and refuses the client where it raises.

        Raises:
            FedcoreError: it is of another round or broadcast, or of another adapter or base; or it
                says nothing and has to.
        """
        self._repeats.check(client, said)

    def receive(
        self,
        client: str,
        row: Tensor,
        weight: float,
        *,
        round: int | None = None,
        frozen: str | None = None,
        expected_frozen: str | None = None,
        ranks: Ranks | None = None,
        flags: Sequence[str] = (),
        statistics: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take one upload and check it; what is wrong with it is raised, or dropped, at the close.

        Args:
            row: ``(P,)`` in :attr:`layout`.
            weight: the client's weight, usually its number of examples.
            round: the round that the client trained for, where it says so.
            frozen: digest of what the client must not have changed, where it says so.
            expected_frozen: the server's digest of the same.
            ranks: module to the client's rank, where its ranks are its own and the row holds
                factors of them.
            flags: trouble that the client half met; 20 lines of it are recorded.
            statistics: what the client sends of its data once; the server remembers it.

        Raises:
            FedcoreError: the client does not take part in the round, or reports twice.
        """
        self._reports(client)
        self._uploads[client] = UploadedRow(row, weight, round, frozen, expected_frozen, ranks)
        self._flags += [f"{client}: {flag}" for flag in _shown(flags)]
        if statistics:
            try:
                self.method.check_statistics(statistics)
            except FedcoreError as error:
                self.refuse(client, str(error))
            else:
                self._new_statistics[client] = statistics

    def refuse(self, client: str, reason: str) -> None:
        """Leave out a client that reported, for a reason that the transport found.

        Raises:
            FedcoreError: the client does not take part in the round.
        """
        if client not in self._reported:
            self._reports(client)
        self._refused.setdefault(client, printable(reason, _LONGEST_REASON))

    def unreachable(self, client: str, reason: str) -> None:
        """Say why a client did not report; it is left out whatever ``on_invalid`` is."""
        self._unreachable[client] = printable(reason, _LONGEST_REASON)

    def close(
        self,
        aggregate: Aggregation | None = None,
        name_personal: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
        *,
        compare_norms: bool = True,
    ) -> ClosedRound:
        """Aggregate the valid uploads.

        A result that the uploads do not explain (:mod:`~fedcore.federation.acceptance`) is not
        accepted: the round is done, its state is the one before, and a flag names the clients of
        the largest uploads.

        Args:
            aggregate: in place of the method's own server half.
            name_personal: the tensors of a client's personal row, by the names under which they
                wait in the state until the client is reached again; None where the transport
                delivers them at once.
            compare_norms: whether the norms of single uploads may be looked at; False where
                ``aggregate`` stands for a server that does not see them.

        Raises:
            FedcoreError: an upload is invalid and ``on_invalid`` is ``"raise"``, all uploads are
                identical and the method needs them to differ, or the method refuses.
        """
        cohort = self._cohort()
        norms = client_norms(cohort) if compare_norms else {}
        result = self._accepted(
            lambda: (aggregate or self.method.aggregate)(cohort, self.previous), cohort, norms
        )
        waiting = {}
        if name_personal is not None:
            waiting = {client: name_personal(row) for client, row in result.personal.items()}
        return self._advanced(cohort, result, waiting)

    def close_on_mean(self, mean: Tensor) -> ClosedRound:
        """Finish the round on the weighted mean of uploads that nobody showed the server.

        Args:
            mean: ``(P,)`` in :attr:`layout`.

        Raises:
            FedcoreError: the method needs more than a mean, or it holds values that are not finite.
        """
        if not bool(mean.isfinite().all()):
            raise FedcoreError(
                f"round {self.state.round}: the mean holds values that are not finite"
            )
        cohort = self._cohort()
        result = self._accepted(
            lambda: self.method.from_mean(mean, self.layout, self.previous),
            cohort,
            {"the mean": norm(mean)},
        )
        return self._advanced(cohort, result, {})

    def _accepted(
        self, aggregate: Callable[[], Aggregate], cohort: Cohort, norms: Mapping[str, float]
    ) -> Aggregate:
        """The result of ``aggregate``, or the previous state flagged with why that is kept."""
        try:
            result = aggregate()
            problem = result_problem(
                result, self.previous, self.method, cohort, norms, self._limits
            )
        except _NUMERICAL as error:
            problem = f"it cannot be computed ({type(error).__name__})"
        if problem is None:
            return result
        named = f"; the largest uploads: {largest_uploads(norms)}" if norms else ""
        return unchanged(
            self.previous, f"the result is not accepted, the state is kept: {problem}{named}"
        )

    def _reports(self, client: str) -> None:
        if client not in self._clients:
            raise FedcoreError(f"round {self.state.round}: client {client} does not take part")
        if client in self._reported:
            raise FedcoreError(f"round {self.state.round}: client {client} reported twice")
        self._reported.append(client)

    def _cohort(self) -> Cohort:
        valid = [client for client in self._reported if client not in self._refused]
        self._refused |= self._repeats.disagreeing(valid)
        cohort = gather(
            self.layout,
            self._clients,
            self._uploads,
            self._refused,
            round=self.state.round,
            # The precision of the state is that of every upload, whatever carried it.
            dtype=self.state.row.dtype,
            on_invalid=self._on_invalid,
        )
        if 0 < len(cohort) < self._min_cohort:
            cohort = self._left_out(cohort)
        needs_difference = not self.method.capabilities.linear and not self._allow_identical
        if needs_difference and identical_rows(cohort.updates):
            raise FedcoreError(
                f"round {cohort.round}: all {len(cohort)} uploads are identical, which "
                f"{self.method.name} cannot aggregate usefully: either no client trained, or a "
                "sum-only aggregator replaced the uploads; pass allow_identical_uploads=True (in a "
                "recipe round.allow_identical_uploads = true) to accept them"
            )
        dropped = (
            Dropped(d.client_id, self._unreachable.get(d.client_id, d.reason))
            for d in cohort.dropped
        )
        statistics = {}
        for client in cohort.client_ids:
            known = {
                **self._statistics.get(client, {}),
                **statistics_of(self.state, client),
                **self._new_statistics.get(client, {}),
            }
            if known:
                statistics[client] = known
        weights, flags = capped(cohort, self._limits.largest_share)
        self._flags += flags
        return replace(cohort, dropped=tuple(dropped), statistics=statistics, weights=weights)

    def _left_out(self, cohort: Cohort) -> Cohort:
        """``cohort`` without any upload: those of so few clients would show in their sum."""
        few = f"{len(cohort)} of {len(self._clients)} clients can be used"
        reason = f"{few}, fewer than min_cohort = {self._min_cohort}"
        self._flags.append(f"{reason}: the round keeps the global state")
        dropped = (*cohort.dropped, *(Dropped(client, reason) for client in cohort.client_ids))
        return replace(
            cohort,
            updates=cohort.updates[:0],
            weights=cohort.weights[:0],
            client_ids=(),
            ranks=cohort.ranks[:0],
            scalings=cohort.scalings[:0],
            dropped=tuple(sorted(dropped)),
        )

    def _advanced(
        self, cohort: Cohort, result: Aggregate, waiting: Mapping[str, Mapping[str, Tensor]]
    ) -> ClosedRound:
        reported = tuple(self._reported)
        flags = (*self._flags, *self._repeats.flags, *result.flags)
        state = self.state.advanced(
            result.row,
            result.changed,
            reported=reported,
            silent=tuple(client for client in self._clients if client not in self._reported),
            residual=result.residual,
            held_for_clients=self._remembered(cohort, reported, waiting),
            record=_record(cohort, flags),
        )
        state = self._repeats.after(state, cohort.client_ids)
        return ClosedRound(cohort, result, state, reported, flags)

    def _remembered(
        self,
        cohort: Cohort,
        reported: tuple[str, ...],
        waiting: Mapping[str, Mapping[str, Tensor]],
    ) -> PerClient:
        """What the server holds for each client after the round."""
        memory = {c: dict(named) for c, named in self.state.held_for_clients.items()}
        for client in reported:
            # A client that reported has merged its personal values into its own by now.
            tensors = {
                name: tensor
                for name, tensor in memory.get(client, {}).items()
                if not name.startswith(PERSONAL_PREFIX)
            }
            if client in self._starts:
                tensors[HELD] = self._starts[client]
            if client in cohort.client_ids:
                sent = self._new_statistics.get(client, {})
                tensors |= {TOLD_PREFIX + name: tensor for name, tensor in sent.items()}
            memory[client] = tensors
        for client, named in waiting.items():
            memory.setdefault(client, {}).update(
                {PERSONAL_PREFIX + name: tensor for name, tensor in named.items()}
            )
        return {client: named for client, named in memory.items() if named}


def _shown(flags: Sequence[str]) -> list[str]:
    """A client's flags as they are recorded: printable, and not without end."""
    lines = [printable(flag, _LONGEST_FLAG) for flag in flags[:_MOST_FLAGS]]
    more = len(flags) - len(lines)
    return [*lines, f"{more} more flags"] if more else lines


def _record(cohort: Cohort, flags: Sequence[str]) -> dict[str, Any]:
    return {
        "round": cohort.round,
        "clients": dict(zip(cohort.client_ids, cohort.weights.tolist(), strict=True)),
        "dropped": [{"client": d.client_id, "reason": d.reason} for d in cohort.dropped],
        "flags": list(flags),
    }
