"""The deviations of clients from their mean, one fewer than there are clients."""

from __future__ import annotations

import torch
from torch import Tensor


def helmert_deviations(rows: Tensor, shares: Tensor) -> Tensor:
    """All rows but one of ``H diag(sqrt(w))`` applied to the clients, for an orthogonal H.

    The row left out, ``sqrt(w)`` in H, would give the weighted mean. For two stacks ``X_n`` and
    ``Y_n`` of the same clients

        sum_n X~_n^T Y~_n = sum_n w_n (X_n - Xbar)^T (Y_n - Ybar)

    with one term less on the left. H is the Householder reflection that takes ``sqrt(w)`` to
    ``e_p``, where p is the client of the largest weight. Written in ``D_n = X_n - X_p`` and the
    weighted mean ``Dbar`` of the clients but p,

        X~_n = sqrt(w_n) (D_n - (1 + sqrt(w_p)) Dbar),    n other than p

    where nothing is divided by ``1 - sqrt(w_p)``. Rounding is relative to the deviations, however
    close the clients and however unequal the weights are (``sqrt(w_p)`` is at least
    ``1 / sqrt(N)``, so the difference does not cancel), and equal clients give exact zeros.

    Args:
        rows: ``(L, N r, k)`` floating point, client-major; not written to.
        shares: ``(N,)`` positive, sum 1, of the dtype and on the device of ``rows``; N >= 2.

    Returns:
        ``(L, (N - 1) r, k)``, clients in their order without p.

    Cost: 5 N r k flops a module. Source: Helmert's contrasts; this weighted form is ours.
    """
    clients = rows.unflatten(1, (len(shares), -1))
    pivot = shares.argmax()
    rest = (torch.arange(len(shares), device=shares.device) != pivot).nonzero()[:, 0]
    others = shares[rest]
    gaps = clients.index_select(1, rest)
    gaps -= clients[:, pivot, None]
    centre = (others / others.sum()) @ gaps.transpose(1, 2)
    gaps -= (1 + shares[pivot].sqrt()) * centre[:, None]
    gaps *= others.sqrt()[:, None, None]
    return gaps.flatten(1, 2)
