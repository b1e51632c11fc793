"""Bytes that travel in a round: adapters and heads apart, in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fedcore.data.codecs import Codec, Fp32, find_codec
from fedcore.data.rows import layout_at_ranks
from fedcore.experiments.setup import Experiment
from fedcore.federation.state import ServerState
from fedcore_kernels.layout import FactorLayout

MASKED_BYTES = 8
"""A number of a masked upload, of whatever rank: masks are as long as the layout."""

NOTHING: Mapping[str, int] = {"adapter": 0, "head": 0}


def uplink(
    experiment: Experiment, state: ServerState, layout: FactorLayout, reported: Sequence[str]
) -> dict[str, int]:
    """Bytes that the clients in ``reported`` sent, each an upload of ``layout`` at its ranks, in
    the number format of the recipe's codec.

    Statistics that a client sends before its first round count as adapter traffic of that round.
    """
    sizes = dict(NOTHING)
    rounds = experiment.recipe.round
    codec = find_codec(rounds.codec)
    if experiment.method.capabilities.population == "clients":
        for client in reported:
            # Statistics have the broadcast's shape whatever rank they were computed of.
            whole = experiment.method.capabilities.uploads == "statistics"
            ranks = None if whole else experiment.ranks.get(client)
            masked = rounds.secure_sum
            _add(sizes, _masked(layout) if masked else _sizes(layout, ranks, codec))
            if client not in state.client_versions:
                statistics = experiment.statistics.get(client, {})
                sizes["adapter"] += sum(t.numel() * t.element_size() for t in statistics.values())
    return sizes


def downlink(experiment: Experiment, state: ServerState, sampled: Sequence[str]) -> dict[str, int]:
    """Bytes that the clients in ``sampled`` download: whatever changed since they last took part.

    The way down is fp32. A residual counts as adapter traffic.
    """
    sizes, codec = dict(NOTHING), Fp32()
    if experiment.method.capabilities.population == "clients":
        for client in sampled:
            _add(sizes, _sizes(state.stale_for(client), experiment.ranks.get(client), codec))
            sizes["adapter"] += state.stale_residual(client) * torch.float32.itemsize
    return sizes


def evaluation_downlink(
    experiment: Experiment, state: ServerState, sites: Sequence[str]
) -> dict[str, int]:
    """Bytes that ``sites`` download to evaluate the global model of ``state``: all of it."""
    sizes, codec = dict(NOTHING), Fp32()
    for site in sites:
        _add(sizes, _sizes(state.layout, experiment.ranks.get(site), codec))
        residual = sum(part.numel for part in state.residual.values())
        sizes["adapter"] += residual * torch.float32.itemsize
    return sizes


def together(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """The bytes of both."""
    sizes = dict(one)
    _add(sizes, other)
    return sizes


def added(
    traffic: Mapping[str, int], up: Mapping[str, int], down: Mapping[str, int]
) -> dict[str, int]:
    """The running totals ``traffic`` with one round's bytes added to them."""
    total = dict(traffic)
    for direction, sizes in (("up", up), ("down", down)):
        _add(total, {f"{direction}_{kind}": size for kind, size in sizes.items()})
    return total


def _sizes(layout: FactorLayout, ranks: Mapping[str, int] | None, codec: Codec) -> dict[str, int]:
    client_layout = layout_at_ranks(layout, ranks)
    factors = {slot.factor for slot in client_layout.factor_slots}
    return {
        "adapter": codec.bytes(client_layout.select(factors, dense=False)),
        "head": codec.bytes(client_layout.select((), dense=True)),
    }


def _masked(layout: FactorLayout) -> dict[str, int]:
    factors = {slot.factor for slot in layout.factor_slots}
    return {
        "adapter": MASKED_BYTES * layout.select(factors, dense=False).numel,
        "head": MASKED_BYTES * layout.select((), dense=True).numel,
    }


def _add(totals: dict[str, int], sizes: Mapping[str, int]) -> None:
    for kind, size in sizes.items():
        totals[kind] = totals.get(kind, 0) + size
