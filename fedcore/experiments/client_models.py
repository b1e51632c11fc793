"""The model that a client holds: the global one, cut to its rank, with what is its own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from fedcore.experiments.setup import Workbench
from fedcore.federation.state import ServerState
from fedcore.methods.base import Broadcast
from fedcore_kernels.layout import FactorLayout

OWN = "row"
"""The private tensor that holds a personalised client's values, in the global layout."""

HELD = "held"
"""The private tensor that holds what a client of lower rank started its last round from."""


def client_row(bench: Workbench, state: ServerState, client: str) -> Tensor:
    """The row ``(P,)`` that ``client`` starts ``state.round`` from.

    The global row; for a client of lower rank the method's approximation of it; and in the slots
    that a personalised method leaves to the client, the client's own values once it has any.
    """
    layout, own = state.layout, state.private.get(client, {})
    row = state.row
    ranks = bench.ranks.get(client)
    if ranks is not None:
        held = Broadcast(layout, own.get(HELD, state.row))
        wanted = [ranks[module] for module in layout.modules]
        row = bench.method.for_client(Broadcast(layout, state.row), held, wanted)
    return with_own(bench, layout, row, own, state.round)


def with_own(
    bench: Workbench, layout: FactorLayout, row: Tensor, own: Mapping[str, Tensor], round: int
) -> Tensor:
    """``row`` with the client's ``own`` values in the slots that the method leaves to it."""
    if OWN in own:
        private = bench.method.private_layout(layout, round)
        row = layout.scatter(row, private, layout.gather(own[OWN], private))
    return row


def personalised(
    bench: Workbench,
    state: ServerState,
    private: Mapping[str, Mapping[str, Tensor]],
    personal: Mapping[str, Tensor],
) -> Mapping[str, Mapping[str, Tensor]]:
    """The clients' private tensors after they received what the server sent to each of them.

    Args:
        private: client id to named tensors, as local training left them.
        personal: client id to a row in the upload layout of ``state.round``.
    """
    layout = state.layout
    upload = bench.method.upload_layout(layout, state.round)
    found = {client: dict(tensors) for client, tensors in private.items()}
    for client, row in personal.items():
        own = found.setdefault(client, {})
        own[OWN] = layout.scatter(own.get(OWN, state.row), upload, row.to(state.row.dtype))
    return MappingProxyType(found)
