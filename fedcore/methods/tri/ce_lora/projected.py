"""CE-LoRA with cores that mean the same on every client: projected onto common bases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from fedcore.checks import choice
from fedcore.errors import FedcoreError
from fedcore.methods.base import (
    Aggregate,
    Broadcast,
    Capabilities,
    ClientPlan,
    Description,
    Family,
    Upload,
)
from fedcore.methods.shared.factor_pairs import PairGroup, pair_groups
from fedcore.methods.shared.linear import LinearMethod
from fedcore.methods.shared.uploads import check_cores
from fedcore_kernels import FactorLayout

Init = Literal["random", "xs"]


@dataclass(frozen=True)
class CELoRAProjected(LinearMethod):
    """Train ``B_n R_n A_n``, send its core in the bases ``B_0, A_0`` that everybody holds.

        R^_n = argmin_X ||B_n R_n A_n - B_0 X A_0||_F = (B_0^+ B_n) R_n (A_n A_0^+)
        R    = sum_n w_n R^_n

    and all clients start the next round from ``(B_0, R, A_0)``, with ``A_0, B_0`` those of the
    first broadcast. ``R^_n`` depends on the client's product alone, so nothing that leaves its
    model as it is, such as ``(B X, X^{-1} R Y, Y^{-1} A)``, changes the upload. By linearity
    ``B_0 R A_0`` is the projection of the exact mean ``sum_n w_n B_n R_n A_n``: exact where the
    clients' bases stay in the spans of the common ones, and what leaves the spans is lost.

    The traffic is that of :class:`.CELoRA`; unlike there one global model
    results, sums are all the server needs, and nothing about the data is sent. The mixes of CE-LoRA
    would work on ``R^_n`` as well; they are left out because they need every upload.

    Needs ``A_0`` and ``B_0`` of full rank, which ``init`` gives: ``"xs"`` takes the leading
    singular vectors of the base weight, ``"random"`` orthonormal bases from a seed. A zero ``B_0``,
    the start of plain CE-LoRA, is refused, as every core would be projected to zero.
    The model can move in a space of ``r x r`` for each module only, as with Fed-SB; training the
    bases lets a client's steps see more of its loss than the core alone shows.

    Cost for a client and module: ``4 r^2 (d_in + d_out)``, and QR of both bases.

    Source: ours, after CE-LoRA, arXiv 2503.23869.

    Raises:
        FedcoreError: ``init`` is unknown.
    """

    init: Init = "xs"

    name: ClassVar[str] = "ce_lora.projected"
    family: ClassVar[Family] = "tri"
    capabilities: ClassVar[Capabilities] = Capabilities(linear=True, uploads="statistics")
    description: ClassVar[Description] = Description(
        summary="cores projected onto common bases, averaged",
        paper="arXiv 2503.23869, projection ours",
        exact="when the clients' bases stay in the spans of the common ones, else its projection",
        uplink="r^2",
        downlink="r^2",
        server_cost="2 N r^2",
    )

    def __post_init__(self) -> None:
        choice(self.name, "init", self.init, get_args(Init))

    @property
    def adapter_options(self) -> Mapping[str, Any]:
        """The bases that the adapter starts from."""
        return {"init": self.init}

    def plan(self, round: int) -> ClientPlan:
        """Train everything; what is sent is a core, which depends on the bases, and the head.

        Nothing is a client's own: every round starts from the common bases.
        """
        everything = frozenset("ABR")
        return ClientPlan(everything, frozenset("R"), reads=everything, private=frozenset())

    def prepare_upload(
        self, row: Tensor, layout: FactorLayout, broadcast: Broadcast, round: int
    ) -> Upload:
        """``R^_n`` of every module, and the head as it is; computed in fp64.

        Raises:
            FedcoreError: a base of the broadcast is not of full rank, or ``layout`` is not that of
                the broadcast.
        """
        if layout != self.read_layout(broadcast.layout, round):
            raise FedcoreError(
                f"{self.name}: layout is not the one that read_layout gives for the broadcast"
            )
        sent = self.upload_layout(broadcast.layout, round)
        upload = layout.gather(row, sent)
        start = broadcast.layout.gather(broadcast.row, layout)
        for group in pair_groups(layout):
            b, a = (
                _coordinates(stack, base, factor, group)
                for stack, base, factor in zip(
                    group.stacks(row), group.stacks(start), "BA", strict=True
                )
            )
            cores = torch.stack(
                [layout.view(row, layout.by_name[f"{module}.R"]) for module in group.modules]
            )
            # Stacks hold B transposed, so their coordinates stand for (B_0^+ B_n)^T.
            projected = b.mT @ cores.double() @ a
            for module, core in zip(group.modules, projected, strict=True):
                sent.view(upload, sent.by_name[f"{module}.R"]).copy_(core)
        return Upload(upload)

    def from_mean(self, mean: Tensor, layout: FactorLayout, previous: Broadcast) -> Aggregate:
        """The mean core between the common bases, which stay as they are.

        Raises:
            FedcoreError: uploads of another layout than :meth:`upload_layout`, or a base that is
                not of full rank.
        """
        check_cores(layout, self.upload_layout(previous.layout, 0), self.name)
        for group in pair_groups(previous.layout):
            for stack, factor in zip(group.stacks(previous.row), "BA", strict=True):
                _orthonormal(stack, factor, group)
        return super().from_mean(mean, layout, previous)


def _coordinates(stack: Tensor, base: Tensor, factor: str, group: PairGroup) -> Tensor:
    """``stack base^+ (L, r, r)`` in fp64 of ``(L, r, width)`` each."""
    q, t = _orthonormal(base, factor, group)
    # base^T = q t, so base^+ = q t^{-T}.
    return torch.linalg.solve_triangular(t, (stack.double() @ q).mT, upper=True).mT


def _orthonormal(base: Tensor, factor: str, group: PairGroup) -> tuple[Tensor, Tensor]:
    """QR of ``base^T``; refuses bases that are not of full rank in the precision they come in."""
    q, t = torch.linalg.qr(base.double().mT)
    values = torch.linalg.svdvals(t)
    noise = torch.finfo(base.dtype).eps * max(base.shape[1:])
    rank = (values > noise * values[:, :1]).sum(-1)
    for module, count in zip(group.modules, rank.tolist(), strict=True):
        if count < group.rank:
            raise FedcoreError(
                f"ce_lora.projected: {module}.{factor} of the broadcast has rank {count} of "
                f"{group.rank}; the common bases need full rank, start the adapter from 'random' "
                "or 'xs'"
            )
    return q, t
