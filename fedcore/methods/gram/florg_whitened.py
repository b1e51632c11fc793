"""FLoRG's sketched step from a sum alone: clients send whitened statistics of their factors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedcore.checks import number
from fedcore.errors import FedcoreError
from fedcore.methods.base import (
    Aggregate,
    Broadcast,
    Capabilities,
    Description,
    Family,
    StepReport,
    Upload,
)
from fedcore.methods.shared.linear import LinearMethod
from fedcore.methods.shared.reports import rank_flags, steps_of
from fedcore_kernels import (
    EPS_REL,
    FactorLayout,
    SlotGroup,
    column_signs,
    whitened_basis,
    whitened_step,
    whitened_upload,
)

# A wire of fp32 or of 2^22 levels leaves less than 1e-4; one client in a hundred with a basis of
# its own, or a row of the other sign, leaves more.
_ASYMMETRY = 1e-3


@dataclass(frozen=True)
class FlorgWhitened(LinearMethod):
    """The result of :class:`~fedcore.methods.gram.florg.FlorgSketched` behind a plain weighted sum.

    The previous factor is written as ``A_prev = T V`` with orthonormal rows V. After training, a
    client replaces its factor by a statistic of the same size,

        Z_n = c (V A_n^T) A_n                                                (r x k)

    and the server needs nothing but ``Z = sum_n w_n Z_n``:

        V (Z / c)^T = W diag(e) W^T
        A = polar(T W diag(e)^{1/2}) diag(e)^{-1/2} W^T (Z / c)

    which is ``K^{-1/2} A_prev Q``. Its memory does not grow with the clients, and a secure sum
    suffices. ``Z_n`` is quadratic in the factor where ``A_prev Q_n`` would be cubic, so that a wire
    of fp32 costs an error of 3e-6 in the weakest direction at a condition of 1e3, not 3e-2.
    ``scale`` is the public constant c: a secure sum works in fixed point, and statistics should
    fill its range.

    **One basis for all.** Any orthonormal basis of the row space of ``A_prev`` gives the same A,
    but uploads of two bases do not add up. V is a function of the broadcast bits: the right
    singular vectors in descending order, the largest entry of each positive. Processes on one
    machine get the same bits of it. Another LAPACK agrees to rounding over the relative gap of the
    singular values, and not at all where two are equal: where machines differ, the server sends V
    (``r k`` numbers) and T (``r^2``) in place of ``A_prev``. The sum tells foreign bases apart:
    ``Z V^T`` is symmetric and has no negative diagonal; a module where it is not, by more than
    1e-3, is flagged.

    Failure modes: as ``florg.sketched``, lost rank is flagged and its rows are zero. Directions
    whose energy ``e`` is at most ``eps_rel`` of the largest count as lost; raise it to the noise of
    the wire where clients of low rank are expected. The statistics of factors beyond 1e19 overflow
    fp32, and the server refuses them by name. A client of lower rank needs the basis of the full
    rank, and sends ``r`` rows as everyone else.

    Cost: ``4 r r_n k`` flops for a client and module, ``2 N r k + O(k r^2)`` for the server.

    Source: FLoRG, arXiv 2602.17095; the whitened form is ours.

    Raises:
        FedcoreError: ``scale`` is not positive and finite, or ``eps_rel`` outside [0, 1).
    """

    scale: float = 1.0
    eps_rel: float = EPS_REL

    name: ClassVar[str] = "florg.whitened"
    family: ClassVar[Family] = "gram"
    capabilities: ClassVar[Capabilities] = Capabilities(
        linear=True, mixed_ranks=True, uploads="statistics"
    )
    description: ClassVar[Description] = Description(
        summary="Gram adapter, the sketched step from a secure or streaming sum",
        paper="arXiv 2602.17095",
        exact="when rank Q <= r, otherwise the Nystrom approximation",
        uplink="r k",
        downlink="r k, or r k + r^2 with the basis",
        server_cost="2 N r k + 6 r^2 k",
    )

    def __post_init__(self) -> None:
        number(self.name, "scale", self.scale, above=0)
        number(self.name, "eps_rel", self.eps_rel, least=0, below=1)

    def prepare_upload(
        self, row: Tensor, layout: FactorLayout, broadcast: Broadcast, round: int
    ) -> Upload:
        """The client half: ``Z_n`` in the slots of ``A_n``, dense tensors as they are.

        Args:
            row: ``(P,)`` trained tensors; rows of ``A_n`` beyond a lower rank are zero.
            layout: the upload layout, of the broadcast's ranks.
            broadcast: the global state of the round, at its full rank.
            round: not used.

        Raises:
            FedcoreError: a factor is not of the broadcast's shape, or that of the broadcast is zero
                or taller than wide.
        """
        statistics = row.clone()
        for group in layout.groups:
            _, basis = _basis(group, broadcast)
            statistic = whitened_upload(group.view(row), basis)
            group.view(statistics).copy_(statistic * self.scale)
        return Upload(statistics)

    def from_mean(self, mean: Tensor, layout: FactorLayout, previous: Broadcast) -> Aggregate:
        """The server half: one step per group of modules of equal shape, dense means as they come.

        Raises:
            FedcoreError: as :meth:`prepare_upload`.
        """
        plain = super().from_mean(mean, layout, previous)
        row = plain.row.clone()
        steps: dict[str, StepReport] = {}
        flags: list[str] = []
        for group in layout.groups:
            mixing, basis = _basis(group, previous)
            total = group.view(mean).double() / self.scale
            step = whitened_step(total, mixing, basis, self.eps_rel)
            target = previous.layout.by_name
            for module, factor in zip(group.modules, step.factor, strict=True):
                previous.layout.view(row, target[f"{module}.A"]).copy_(factor)
            reports = steps_of(group.modules, step.rank, step.condition, step.gap)
            steps |= reports
            flags += rank_flags(layout, reports)
            flags += [
                f"{module}: the uploads are not statistics of one basis (off by {gap:.1e})"
                for module, gap in zip(group.modules, _asymmetry(total @ basis.mT), strict=True)
                if gap > _ASYMMETRY
            ]
        return Aggregate(row, layout, steps, tuple(flags))


def _basis(group: SlotGroup, broadcast: Broadcast) -> tuple[Tensor, Tensor]:
    """``T (L, r, r)`` and ``V (L, r, k)`` of the broadcast factors of a group of uploads, fp64."""
    layout, factors = broadcast.layout, []
    for module in group.modules:
        slot = layout.by_name.get(f"{module}.A")
        if slot is None or (slot.rows, slot.width) != (group.rows, group.width):
            there = "missing from" if slot is None else f"{slot.rows} x {slot.width} in"
            raise FedcoreError(
                f"florg.whitened: {module}.A of the upload is {group.rows} x {group.width}; it is "
                f"{there} the broadcast"
            )
        if slot.rows > slot.width:
            raise FedcoreError(
                f"florg.whitened: {module}.A is {slot.rows} x {slot.width}; its rank must not "
                "exceed its width"
            )
        factor = layout.view(broadcast.row, slot)
        if not bool(factor.any()):
            raise FedcoreError(f"{module}.A of the previous state is zero; it has no direction")
        factors.append(factor)
    mixing, basis = whitened_basis(torch.stack(factors))
    signs = column_signs(basis.mT)
    return mixing * signs, basis * signs.mT


def _asymmetry(core: Tensor) -> Iterable[float]:
    """How far ``core (L, r, r)`` is from a positive symmetric matrix, relative to its norm."""
    skew = torch.linalg.matrix_norm(core - core.mT) / 2
    negative = core.diagonal(dim1=-2, dim2=-1).clamp(max=0).norm(dim=-1)
    size = torch.linalg.matrix_norm(core)
    asymmetry: list[float] = torch.where(size > 0, (skew + negative) / size, 0.0).tolist()
    return asymmetry
