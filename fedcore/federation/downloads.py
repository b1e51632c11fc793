"""What one client starts a round from, and what of it is new to the client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcore.data.rows import Ranks
from fedcore.federation.state import HELD, ServerState
from fedcore.methods.base import Broadcast, Method
from fedcore_kernels.layout import FactorLayout


def start_row(state: ServerState, method: Method, client: str, ranks: Ranks | None) -> Tensor:
    """The shared row ``(P,)`` that ``client`` starts ``state.round`` from.

    The global row; for a client with ranks of its own, the method's approximation of it, aligned
    with what the client started its last round from.
    """
    if ranks is None:
        return state.row
    before = state.held_for_clients.get(client, {}).get(HELD, state.row)
    wanted = [ranks[module] for module in state.layout.modules]
    return method.for_client(
        Broadcast(state.layout, state.row), Broadcast(state.layout, before), wanted
    )


def lower_rank_starts(
    state: ServerState,
    method: Method,
    clients: Sequence[str],
    ranks: Mapping[str, Ranks],
) -> dict[str, Tensor]:
    """Client id to :func:`start_row` for those of ``clients`` that have ``ranks`` of their own."""
    return {
        client: start_row(state, method, client, ranks[client])
        for client in clients
        if client in ranks
    }


@dataclass(frozen=True)
class Download:
    """What one client receives at the start of a round.

    Attributes:
        start: ``(P,)`` the shared row that the client starts from.
        part: the slots of it that are sent.
        whole: whether ``part`` is all of the layout, sent in place of whatever the client has.
        known: whether the client has this federation's constants already.
        residual: whether the update of the base weights is sent, as a whole.
    """

    start: Tensor
    part: FactorLayout
    whole: bool
    known: bool
    residual: bool


def download(
    state: ServerState, method: Method, client: str, ranks: Ranks | None, *, everything: bool
) -> Download:
    """What ``client`` needs of ``state``.

    Args:
        ranks: module to the client's rank, where its ranks are its own.
        everything: send all of it; otherwise what changed since the client last took part.
    """
    layout = state.layout
    start = start_row(state, method, client, ranks)
    known = client in state.client_versions
    before = None if ranks is None else state.held_for_clients.get(client, {}).get(HELD)
    whole = everything or not known or (ranks is not None and before is None)
    if whole:
        part = layout
    elif before is not None:
        # What a client of lower rank receives may differ in other slots than those that changed.
        part = _differing(layout, start, before)
    else:
        part = state.stale_for(client)
    residual = bool(state.residual) and (whole or state.stale_residual(client) > 0)
    return Download(start, part, whole, known and not everything, residual)


def _differing(layout: FactorLayout, row: Tensor, other: Tensor) -> FactorLayout:
    """The slots in which two rows differ."""
    return layout.part(
        s.name for s in layout if not torch.equal(layout.view(row, s), layout.view(other, s))
    )
