"""Robust rules: judge the clients' products, then let another method aggregate."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError, unknown_name
from fedcore.methods.base import (
    Aggregate,
    Broadcast,
    ClientPlan,
    Family,
    History,
    Method,
    Traits,
    Upload,
)
from fedcore.methods.pairs import check_whole_upload
from fedcore_kernels.layout import FactorLayout

TRAITS = Traits(
    exact="no: unusual clients count less, or not at all",
    linear=False,
    mixed_ranks=True,
    personalised=False,
    streaming=False,
    uplink="as the host",
    downlink="as the host",
    server_cost="(d_in + d_out) m^2 + N^2, m = N r, and the host",
)
"""Of every rule with its default host; an instance has its own host's."""


class Verdict(NamedTuple):
    """The cohort that the host is given, and a flag for every client that was treated otherwise."""

    cohort: Cohort
    flags: tuple[str, ...] = ()


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
        FedcoreError: ``host`` is none of those methods, or ``weight_cap`` is not above 0.
    """

    host: str = "product_svd"
    weight_cap: float | None = None

    family: ClassVar[Family] = "lora"
    # A rule decides over whole adapters; those on disk are aggregated some modules at a time.
    history: ClassVar[History] = "rounds"
    traits: ClassVar[Traits] = TRAITS

    def __post_init__(self) -> None:
        if self.weight_cap is not None:
            check_number(self.name, "weight_cap", self.weight_cap, or_none=True)
        host = self.inner()
        own = replace(
            type(self).traits,
            mixed_ranks=host.traits.mixed_ranks,
            uplink=host.traits.uplink,
            downlink=host.traits.downlink,
            privacy_note=host.traits.privacy_note,
        )
        # Facts of the class elsewhere; here they are those of the host that was chosen.
        object.__setattr__(self, "traits", own)
        object.__setattr__(self, "restarts", host.restarts)

    @abstractmethod
    def judge(self, cohort: Cohort) -> Verdict:
        """What the host shall aggregate of at least one client, all of positive weight.

        Raises:
            FedcoreError: too few clients for the rule.
        """

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
        capped, flags = self._capped(chosen(cohort, cohort.weights > 0))
        verdict = self.judge(capped)
        result = host.aggregate(verdict.cohort, previous)
        return replace(result, flags=(*flags, *verdict.flags, *result.flags))

    @property
    def adapter_options(self) -> Mapping[str, Any]:
        """The host's."""
        return self.inner().adapter_options

    def plan(self, round: int) -> ClientPlan:
        """The host's."""
        return self.inner().plan(round)

    def prepare_upload(
        self, row: Tensor, layout: FactorLayout, broadcast: Broadcast, round: int
    ) -> Upload:
        """The host's."""
        return self.inner().prepare_upload(row, layout, broadcast, round)

    def completed(self, cohort: Cohort, previous: Broadcast) -> Cohort:
        """The host's."""
        return self.inner().completed(cohort, previous)

    def for_client(self, state: Broadcast, held: Broadcast, ranks: Sequence[int]) -> Tensor:
        """The host's."""
        return self.inner().for_client(state, held, ranks)

    def _capped(self, cohort: Cohort) -> tuple[Cohort, tuple[str, ...]]:
        cap = inf if self.weight_cap is None else self.weight_cap
        above = (cohort.weights > cap).nonzero()[:, 0].tolist()
        if not above:
            return cohort, ()
        flags = tuple(
            f"{cohort.client_ids[n]}: its weight {cohort.weights[n]:g} counts as {cap:g}"
            for n in above
        )
        return replace(cohort, weights=cohort.weights.clamp(max=cap)), flags


def possible_hosts() -> tuple[Method, ...]:
    """LoRA methods whose clients send both factors in every round, as they are created by name."""
    # The catalog imports the rules; they look into it once they are used.
    from fedcore.methods.catalog import METHODS

    found = []
    for method in METHODS:
        if issubclass(method, RobustMethod) or method.family != "lora":
            continue
        host = method()
        sends_both = all(host.plan(t).sends == {"A", "B"} for t in range(2))
        common = host.population == "clients" and not host.traits.personalised
        if sends_both and common and host.uploads == "factors":
            found.append(host)
    return tuple(found)


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


def check_number(name: str, option: str, value: object, *, or_none: bool = False) -> None:
    """Refuse what is no finite number above 0.

    Raises:
        FedcoreError: with the method's ``name``, the option and its value.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < inf:  # type: ignore[operator]
        other = ", or None" if or_none else ""
        raise FedcoreError(f"{name}: {option} is {value!r}; pass a finite number above 0{other}")


def check_count(
    name: str, option: str, value: object, least: int, *, or_none: bool = False
) -> None:
    """Refuse what is no integer of ``least`` or more.

    Raises:
        FedcoreError: with the method's ``name``, the option and its value.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least:  # type: ignore[operator]
        other = ", or None" if or_none else ""
        raise FedcoreError(
            f"{name}: {option} is {value!r}; pass an integer of {least} or more{other}"
        )


def median(values: Tensor) -> Tensor:
    """The median along the last axis, the mean of the middle two of an even number."""
    return values.quantile(0.5, dim=-1)
