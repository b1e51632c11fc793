"""The model that a client holds: the global one, truncated to its rank, with its private values."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from fedcore.experiments.setup import Experiment
from fedcore.federation.downloads import start_row
from fedcore.federation.state import ServerState
from fedcore_kernels.layout import FactorLayout

OWN = "row"
"""The private tensor that holds a personalised client's values, in the global layout."""

TRAINED = "trained"
"""What a client trained in the last round, in the same layout, of a run with evaluation.tasks."""


def client_row(experiment: Experiment, state: ServerState, client: str) -> Tensor:
    """The row ``(P,)`` that ``client`` starts ``state.round`` from.

    What the server sends it, with the client's own values in the slots that a personalised method
    leaves to the client, once it has any.
    """
    row = start_row(state, experiment.method, client, experiment.ranks.get(client))
    memory = state.simulated_clients.get(client, {})
    return with_own(experiment, state.layout, row, memory, state.round)


def with_own(
    experiment: Experiment, layout: FactorLayout, row: Tensor, own: Mapping[str, Tensor], round: int
) -> Tensor:
    """``row`` with the client's ``own`` values in the slots that the method leaves to it."""
    if OWN in own:
        private = experiment.method.private_layout(layout, round)
        row = layout.scatter(row, private, layout.gather(own[OWN], private))
    return row


def personalised(
    experiment: Experiment,
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
    upload = experiment.method.upload_layout(layout, state.round)
    updated = {client: dict(tensors) for client, tensors in private.items()}
    for client, row in personal.items():
        client_tensors = updated.setdefault(client, {})
        client_tensors[OWN] = layout.scatter(
            client_tensors.get(OWN, state.row), upload, row.to(state.row.dtype)
        )
    return MappingProxyType(updated)
