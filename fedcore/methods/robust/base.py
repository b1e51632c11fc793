"""What all robust rules share: they judge the clients' products, then a host aggregates."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from math import inf
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from fedcore.checks import number
from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError, unknown_name
from fedcore.methods.base import (
    Aggregate,
    Broadcast,
    Capabilities,
    Decision,
    Description,
    Family,
    Method,
    Rule,
)
from fedcore.methods.registry import method_classes
from fedcore.methods.requirements import EXCHANGES, ONE_MODEL, SENDS_FACTORS, meets, of_family
from fedcore.methods.shared.factor_pairs import pair_groups
from fedcore.methods.shared.uploads import check_whole_upload
from fedcore_kernels import product_gram

_P = ParamSpec("_P")
_R = TypeVar("_R")

NOISE = 64 * torch.finfo(torch.float64).eps
"""A squared distance is a difference of squared norms; below this share of them it is rounding."""

# Gram matrices of so many modules exist at a time.
_GRAM_BYTES = 64 << 20


def chosen(cohort: Cohort, kept: Tensor) -> Cohort:
    """The clients that ``kept (N,)``, boolean, names; ``cohort`` itself where it names all."""
    if bool(kept.all()):
        return cohort
    places = kept.nonzero()[:, 0]
    on_device = places.to(cohort.updates.device)
    return replace(
        cohort,
        updates=cohort.updates[on_device],
        weights=cohort.weights[places],
        client_ids=tuple(cohort.client_ids[n] for n in places.tolist()),
        ranks=cohort.ranks[places],
        scalings=cohort.scalings[places],
    )


def follow(cohort: Cohort, decision: Decision) -> Cohort:
    """The clients that stay, with the weights and scales of the decision.

    ``cohort`` may hold any of the modules and dense tensors; only ``B`` is scaled.

    Args:
        cohort: the N clients of the decision, in its order.
    """
    members = decision.kept
    left = replace(chosen(cohort, members), weights=decision.weights[members])
    if decision.scales is None:
        return left
    # A product with a scale no longer has the precision of bf16 or fp16.
    wide = torch.promote_types(left.updates.dtype, torch.float32)
    updates, scales = left.updates.to(wide, copy=True), decision.scales[members]
    for slot in left.layout.factor_slots:
        if slot.factor == "B":
            left.layout.view(updates, slot).mul_(scales.to(updates)[:, None, None])
    return replace(left, updates=updates)


def cohort_gram(cohort: Cohort) -> Tensor:
    """``K_ij = sum over modules of <B_i A_i, B_j A_j>``, fp64 ``(N, N)``, on the CPU.

    Cost: ``(d_in + d_out) m^2`` flops per module with m = N r; no matrix of the size of a weight
    is formed.
    """
    clients = len(cohort)
    total = torch.zeros(clients, clients, dtype=torch.float64)
    size = max(1, _GRAM_BYTES // (8 * clients**2))
    for group in pair_groups(cohort.layout):
        outer, inner = group.stacks(cohort.updates)
        for parts in zip(outer.split(size, dim=1), inner.split(size, dim=1), strict=True):
            total += product_gram(*parts).sum(0).cpu()
    return total


def norms(gram: Tensor) -> Tensor:
    """``||B_n A_n||_F`` over all modules, ``(N,)``."""
    return gram.diagonal().clamp(min=0).sqrt()


def distances(gram: Tensor) -> Tensor:
    """``||B_i A_i - B_j A_j||_F``, ``(N, N)``: 0 where less than 1e-7 of the norms is left.

    ``K_ii + K_jj - 2 K_ij`` cancels. What is below :data:`NOISE` may have either sign, and equal
    models in different gauges would be told apart by it.
    """
    squares = gram.diagonal()
    size = squares[:, None] + squares
    gaps = size - 2 * gram
    return torch.where(gaps > NOISE * size, gaps, 0.0).sqrt()


def median(values: Tensor) -> Tensor:
    """The median along the last axis, the mean of the middle two of an even number."""
    return values.quantile(0.5, dim=-1)


def _sends_both(method: Method) -> bool:
    return all(method.plan(round).sends == {"A", "B"} for round in range(2))


def _of_host(method: Callable[Concatenate[Any, _P], _R]) -> Callable[Concatenate[Any, _P], _R]:
    """The host's method of the same name."""

    @wraps(method)
    def delegate(self: Any, *args: _P.args, **named: _P.kwargs) -> _R:
        result: _R = getattr(self.inner(), method.__name__)(*args, **named)
        return result

    return delegate


@dataclass(frozen=True)
class RobustMethod(Method):
    """A rule over the inner products of the clients' updates, in front of a ``host``.

    Factors say nothing about a client: ``(B_n X, X^{-1} A_n)`` is the same model for every
    invertible X. A rule therefore sees the clients through ``<B_i A_i, B_j A_j>`` alone, summed
    over all modules, so that it decides once for a client's whole adapter. Dense tensors follow
    the decision and have no part in it: a client that is inconspicuous but for its head passes.

    Needs every upload, so it cannot run behind secure aggregation.

    Attributes:
        host: the method that aggregates; any LoRA method whose clients send both factors in every
            round, with its default options. Hosts that average factors still depend on the gauge.
        weight_cap: reported weights above it count as it, because a client can report any number.

    Raises:
        FedcoreError: ``host`` is not one of those methods, or ``weight_cap`` is not above 0.
    """

    host: str = "product_svd"
    weight_cap: float | None = None

    family: ClassVar[Family] = "lora"
    summary: ClassVar[str]
    paper: ClassVar[str]

    def __post_init__(self) -> None:
        if self.weight_cap is not None:
            number(self.name, "weight_cap", self.weight_cap, above=0, otherwise=", or None")
        self.inner()

    @property
    def capabilities(self) -> Capabilities:
        """The host's, but that the rule needs every upload and may leave some out."""
        host = self.inner().capabilities
        # Hosts have their default options, with which none aligns to an earlier state.
        history = "none" if host.history == "alignment" else host.history
        return replace(host, always_exact=False, linear=False, history=history)

    @property
    def description(self) -> Description:
        """The rule's, with what the host lets clients see of each other."""
        return Description(
            summary=self.summary,
            paper=self.paper,
            exact="no: unusual clients count less, or not at all",
            uplink="as the host",
            downlink="as the host",
            server_cost="(d_in + d_out) m^2 + N^2, m = N r, and the host",
            privacy_note=self.inner().description.privacy_note,
        )

    @property
    def rule(self) -> Rule:
        """The method itself."""
        return self

    @abstractmethod
    def judge(self, clients: Sequence[str], weights: Tensor, gram: Tensor) -> Decision:
        """The rule proper, of at least one client; the ``weights`` are capped and positive.

        Args:
            clients: N ids in ascending order.
            weights: ``(N,)`` fp64.
            gram: ``(N, N)`` fp64, the inner products of the updates; finite.

        Raises:
            FedcoreError: the rule cannot judge these clients.
        """

    def check_clients(self, clients: int) -> None:
        """Any number is enough, unless a rule says otherwise."""

    def decide(self, clients: Sequence[str], weights: Tensor, gram: Tensor) -> Decision:
        """The rule's decision on capped weights; an update whose norm overflows is left out.

        Args:
            clients: N ids in ascending order.
            weights: ``(N,)`` fp64, positive, as reported.
            gram: ``(N, N)`` fp64, the inner products of the updates.

        Raises:
            FedcoreError: no update has a finite norm, or too few for the rule.
        """
        cap = inf if self.weight_cap is None else self.weight_cap
        flags = [
            f"{clients[n]}: its weight {weights[n]:g} counts as {cap:g}"
            for n in (weights > cap).nonzero()[:, 0].tolist()
        ]
        capped = weights.clamp(max=cap)
        # Of such an update no distance is known: all would look like 0.
        finite = gram.diagonal().isfinite()
        if bool(finite.all()):
            self.check_clients(len(clients))
            decision = self.judge(clients, capped, gram)
            return replace(decision, flags=(*flags, *decision.flags))
        places = finite.nonzero()[:, 0]
        others = [clients[n] for n in places.tolist()]
        overflowing = [clients[n] for n in (~finite).nonzero()[:, 0].tolist()]
        if not others:
            raise FedcoreError(f"{self.name}: the norm of every update overflows")
        self.check_clients(len(others))
        part = self.judge(others, capped[places], gram[places][:, places])
        flags += [f"{client}: left out, the norm of its update overflows" for client in overflowing]
        scales = None
        if part.scales is not None:
            scales = torch.ones_like(capped).index_copy(0, places, part.scales)
        all_weights = torch.zeros_like(capped).index_copy(0, places, part.weights)
        return Decision(all_weights, scales, (*flags, *part.flags))

    def inner(self) -> Method:
        """The host.

        Raises:
            FedcoreError: one line with the nearest names of possible hosts.
        """
        hosts = possible_hosts()
        for host in hosts:
            if self.host == host.name or self.host in host.aliases:
                return host
        raise unknown_name(f"host of {self.name}", str(self.host), [host.name for host in hosts])

    def aggregate(self, cohort: Cohort, previous: Broadcast) -> Aggregate:
        """The host's result for the cohort as the rule leaves it; flags name whom it touched.

        Raises:
            FedcoreError: too few clients for the rule, uploads that do not hold every tensor of
                the broadcast, or ranks that the host does not accept.
        """
        host = self.inner()
        if not len(cohort):
            return host.aggregate(cohort, previous)
        host.check_cohort(cohort)
        check_whole_upload(cohort, previous, self.name)
        present = chosen(cohort, cohort.weights > 0)
        try:
            self.check_clients(len(present))
            decision = self.decide(present.client_ids, present.weights, cohort_gram(present))
        except FedcoreError as error:
            raise FedcoreError(f"round {cohort.round}: {error}") from error
        result = host.aggregate(follow(present, decision), previous)
        return replace(result, flags=(*decision.flags, *result.flags))

    # The client half, and what a client of lower rank starts from.
    adapter_options = property(lambda self: self.inner().adapter_options)
    plan = _of_host(Method.plan)
    prepare_upload = _of_host(Method.prepare_upload)
    completed = _of_host(Method.completed)
    for_client = _of_host(Method.for_client)


def possible_hosts() -> tuple[Method, ...]:
    """LoRA methods whose clients send both factors in every round, as they are created by name."""
    others = (kind() for kind in method_classes() if not issubclass(kind, RobustMethod))
    needs = (of_family("lora"), EXCHANGES, ONE_MODEL, SENDS_FACTORS)
    return tuple(host for host in others if meets(host, needs) and _sends_both(host))
