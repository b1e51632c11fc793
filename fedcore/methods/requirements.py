"""Who can run where: what a place needs of a method, and one way to refuse those that lack it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedcore.data.adapter_kind import not_additive
from fedcore.errors import FedcoreError
from fedcore.methods.base import Method
from fedcore.methods.registry import default_methods


@dataclass(frozen=True)
class Need:
    """One thing that a place needs of the methods that run there.

    Attributes:
        met_by: whether a method has it.
        lack: what is true of a method without it, in words that follow its name.
    """

    met_by: Callable[[Method], bool]
    lack: str


EXCHANGES = Need(
    lambda method: method.capabilities.population == "clients",
    "exchanges nothing between clients",
)
TRAINS_ADAPTER = Need(lambda method: method.family != "none", "trains no adapter")
SUM_SUFFICES = Need(
    lambda method: method.capabilities.linear,
    "needs every upload, and a sum shows the server their mean alone",
)
SENDS_FACTORS = Need(
    lambda method: method.capabilities.uploads == "factors",
    "sends what its clients compute from the last broadcast, not tensors of the adapter",
)
SENDS_NO_STATISTICS = Need(
    lambda method: not method.capabilities.wants_features,
    "sends statistics of the clients' examples",
)
ONE_MODEL = Need(
    lambda method: not method.capabilities.personalised,
    "leaves each client a model of its own, which the server never sees and cannot save",
)
KEEPS_BASE = Need(
    lambda method: not method.capabilities.updates_base,
    "updates base weights, which one adapter does not hold",
)
PART_OF_MODEL = Need(
    lambda method: not method.capabilities.whole_model,
    "trains parameters of every kind, not all of which have a gradient for each example",
)
MIXED_RANKS = Need(lambda method: method.capabilities.mixed_ranks, "needs equal ranks")
ANY_RANK = Need(
    lambda method: method.capabilities.any_rank, "does not choose the rank of its result"
)
NO_ROUNDS = Need(
    lambda method: method.capabilities.history != "rounds",
    "needs the rounds of a federation",
)
NO_PREVIOUS = Need(
    lambda method: method.capabilities.history != "previous",
    "needs the adapter that all clients started from",
)

ONE_BROADCAST = (EXCHANGES, TRAINS_ADAPTER, SENDS_NO_STATISTICS)
"""One broadcast for all clients, and one upload of each, are enough."""

SECURE_SUM = (EXCHANGES, SUM_SUFFICES)
"""The server may see nothing but the sum of all uploads."""

NOISY_MEAN = (*SECURE_SUM, SENDS_FACTORS, SENDS_NO_STATISTICS)
"""The result follows from the mean of what the clients trained, noise included."""


def of_family(family: str) -> Need:
    """Adapters of one ``family``."""
    return Need(lambda method: method.family == family, f"is not for adapters of family {family!r}")


def meets(method: Method, needs: Iterable[Need]) -> bool:
    """Whether ``method`` meets all of ``needs``."""
    return all(need.met_by(method) for need in needs)


def methods_meeting(needs: Iterable[Need]) -> tuple[Method, ...]:
    """The registered methods that meet all ``needs`` with their default options."""
    asked = tuple(needs)
    return tuple(method for method in default_methods() if meets(method, asked))


def refuse(method: Method, needs: Iterable[Need], where: str, otherwise: str = "") -> None:
    """Refuse ``method`` unless it meets all of ``needs``.

    Args:
        where: the place or the option that has these needs; it begins the message.
        otherwise: what else helps, as something to do; it ends the message.

    Raises:
        FedcoreError: what the method lacks, and the methods that lack nothing.

    Example:
        >>> from fedcore.methods import create_method
        >>> refuse(create_method("florg"), (*SECURE_SUM, of_family("gram")), "round.secure_sum")
        Traceback (most recent call last):
        fedcore.errors.FedcoreError: round.secure_sum: florg.truncated needs every upload, and a \
sum shows the server their mean alone; use one of florg.whitened, florg.avg_a
    """
    asked = tuple(needs)
    lack = next((need.lack for need in asked if not need.met_by(method)), None)
    if lack is None:
        return
    host = "" if method.rule is None else f" with host {method.rule.inner().name}"
    able = ", ".join(other.name for other in methods_meeting(asked))
    remedies = [f"use one of {able}"] if able else []
    remedies += [otherwise] if otherwise else []
    remedy = ", or ".join(remedies) or "no method can be used"
    raise FedcoreError(f"{where}: {method.name}{host} {lack}; {remedy}")


def check_start(
    method: Method,
    family: str,
    keys: Iterable[str],
    what: str,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a start that ``method`` cannot aggregate, before any client has trained.

    Args:
        family: of the adapter that a federation starts from.
        keys: of its tensors, as PEFT writes them.
        what: the argument that holds the adapter; it begins the message.
        config: the adapter's, where it is known.

    Raises:
        FedcoreError: the adapter is of another family, with the methods for its family; or the
            method adds an update beside adapters that do not add.
    """
    refuse(method, (EXCHANGES, of_family(family)), what)
    names = list(keys)
    problem = not_additive(config or {}, names)
    if any("lora_embedding_" in name for name in names):
        problem = problem or "an embedding takes no update of its base weight while rounds train it"
    if problem and method.capabilities.updates_base:
        needs = (EXCHANGES, of_family(family), KEEPS_BASE)
        refuse(method, needs, f"{what}: {problem}")
