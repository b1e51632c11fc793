"""What one client receives at the start of a round."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from fedcore.data.keyed_rows import Ranks
from fedcore.data.low_rank import packed
from fedcore.data.server_state import ServerState
from fedcore.engines.client_models import HELD
from fedcore.engines.flower.arrays import to_arrays
from fedcore.engines.flower.orders import BROADCAST, PERSONAL, RESIDUAL, Order
from fedcore.engines.flower.wire import Wire
from fedcore.methods.base import Broadcast, Method
from fedcore_kernels.layout import FactorLayout

PERSONAL_PREFIX, TOLD_PREFIX = "personal:", "told:"
"""How the server's state names what it keeps for a client: rows that it has not seen yet, and what
it told of its data."""


@dataclass(frozen=True)
class Download:
    """One client's message.

    Attributes:
        content: of the message.
        start: ``(P,)`` the shared row that the client starts from.
    """

    content: RecordDict
    start: Tensor


def start_row(state: ServerState, method: Method, client: str, ranks: Ranks | None) -> Tensor:
    """The global row ``(P,)``, or the method's approximation of it at the client's ``ranks``."""
    if ranks is None:
        return state.row
    held = state.private.get(client, {}).get(HELD, state.row)
    wanted = [ranks[module] for module in state.layout.modules]
    return method.for_client(
        Broadcast(state.layout, state.row), Broadcast(state.layout, held), wanted
    )


def download(
    state: ServerState,
    wire: Wire,
    method: Method,
    client: str,
    ranks: Ranks | None,
    *,
    config: ConfigRecord,
    arrays_key: str,
    config_key: str,
    whole: bool,
) -> Download:
    """The message's content for ``client``.

    Args:
        config: the user's; the order is added to a copy of it.
        whole: send everything; otherwise what changed since the client last took part.
    """
    layout, own = state.layout, state.private.get(client, {})
    row = start_row(state, method, client, ranks)
    known = client in state.client_versions
    held = own.get(HELD) if ranks is not None else None
    everything = whole or not known or (ranks is not None and held is None)
    if everything:
        part = layout
    elif held is not None:
        # What a client of lower rank receives may differ in other slots than those that changed.
        part = _differing(layout, row, held)
    else:
        part = state.stale_for(client)
    tensors = wire.pack(layout.gather(row, part), part, ranks)
    if whole or not known:
        tensors |= {wire.keys[name]: tensor for name, tensor in wire.constants.items()}
    told = any(name.startswith(TOLD_PREFIX) for name in own)
    plan = method.plan(state.round)
    order = Order(
        round=state.round,
        method=method.name,
        trains=",".join(sorted(plan.trains)),
        sends=",".join(sorted(plan.sends)),
        whole=everything,
        tell=method.wants_features and not told,
    )
    told_config = ConfigRecord(dict(config))
    order.write(told_config)
    content = RecordDict({arrays_key: to_arrays(tensors), config_key: told_config})
    personal = {
        name.removeprefix(PERSONAL_PREFIX): tensor
        for name, tensor in own.items()
        if name.startswith(PERSONAL_PREFIX)
    }
    if personal:
        content[PERSONAL] = to_arrays(personal)
    if state.residual and (everything or state.stale_residual(client)):
        content[RESIDUAL] = to_arrays(packed(state.residual))
    if method.uploads == "statistics" and ranks is not None:
        content[BROADCAST] = to_arrays(wire.pack(state.row, layout))
    return Download(content, row)


def _differing(layout: FactorLayout, row: Tensor, held: Tensor) -> FactorLayout:
    """The slots in which two rows differ."""
    return layout.part(
        s.name for s in layout if not torch.equal(layout.view(row, s), layout.view(held, s))
    )
