"""Bytes that travel in a round: adapters and heads apart, in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedcore.data.server_state import ServerState
from fedcore.engines.workbench import Workbench
from fedcore_kernels.layout import FactorLayout

BYTES_PER_NUMBER = 4
"""Adapters travel as fp32."""

NOTHING: Mapping[str, int] = {"adapter": 0, "head": 0}


def uplink(
    bench: Workbench, state: ServerState, layout: FactorLayout, reported: Sequence[str]
) -> dict[str, int]:
    """Bytes that the clients in ``reported`` sent, each an upload of ``layout`` at its ranks.

    What a client tells of its data before its first round counts as adapter traffic of that round.
    """
    found = dict(NOTHING)
    if bench.method.population == "clients":
        for client in reported:
            # Statistics have the broadcast's shape whatever rank they were computed of.
            whole = bench.method.uploads == "statistics"
            _add(found, _bytes(layout, None if whole else bench.ranks.get(client)))
            if client not in state.client_versions:
                told = bench.statistics.get(client, {})
                found["adapter"] += sum(t.numel() * t.element_size() for t in told.values())
    return found


def downlink(bench: Workbench, state: ServerState, sampled: Sequence[str]) -> dict[str, int]:
    """Bytes that the clients in ``sampled`` download: whatever changed since they last took part.

    A residual counts as adapter traffic.
    """
    found = dict(NOTHING)
    if bench.method.population == "clients":
        for client in sampled:
            _add(found, _bytes(state.stale_for(client), bench.ranks.get(client)))
            found["adapter"] += state.stale_residual(client) * BYTES_PER_NUMBER
    return found


def added(
    traffic: Mapping[str, int], up: Mapping[str, int], down: Mapping[str, int]
) -> dict[str, int]:
    """The running totals ``traffic`` with one round's bytes added to them."""
    found = dict(traffic)
    for direction, sizes in (("up", up), ("down", down)):
        _add(found, {f"{direction}_{kind}": size for kind, size in sizes.items()})
    return found


def _bytes(layout: FactorLayout, ranks: Mapping[str, int] | None) -> dict[str, int]:
    adapter = 0
    for slot in layout.factor_slots:
        rank = slot.rows if ranks is None else min(slot.rows, ranks[slot.module])
        # A core is as wide as it is high.
        adapter += rank * (rank if slot.factor == "R" else slot.width)
    head = sum(slot.numel for slot in layout.dense_slots)
    return {"adapter": adapter * BYTES_PER_NUMBER, "head": head * BYTES_PER_NUMBER}


def _add(totals: dict[str, int], sizes: Mapping[str, int]) -> None:
    for kind, size in sizes.items():
        totals[kind] = totals.get(kind, 0) + size
