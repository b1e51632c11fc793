"""What a broadcast announces and every upload of its round repeats, one record for all transports.

Two uploads with equal keys and shapes may still mean different things: they may be of another round
or start from another broadcast, be scaled otherwise, be adapters of another kind, or have been
trained on another base. Tensors do not show it, so messages say it: folders in ``broadcast.json``
and ``upload.json``, Flower and NVFlare as the text of this record.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fedcore.checks import is_integer, is_number
from fedcore.data.base_identity import BaseIdentity, base_differences, check_allow
from fedcore.data.declared import declared_rank_and_scaling
from fedcore.data.low_rank import LowRank, packed
from fedcore.data.validation import digest
from fedcore.errors import FedcoreError
from fedcore_kernels.layout import FactorLayout

ANNOUNCED = "announced"
"""The key under which messages hold the text of an announcement."""

_LONGEST = 1 << 26
_SHOWN = 60
_LARGEST = 1e300


@dataclass(frozen=True)
class Announcement:
    """What a broadcast says of itself, or an upload of what it was made from.

    Attributes:
        round: counted from 0.
        broadcast: identity of the broadcast, a digest of its tensors; empty where it is not known.
        kind: what gives the adapter's tensors their meaning, as
            :func:`fedcore.data.adapter_kind.kind_of` reads it from a configuration; empty where it
            is not known.
        scaling: module to ``alpha / r`` or ``alpha / sqrt(r)``; empty where it is not known.
        base: of the base model; None where it is not known.
        allow: parts of the base in which clients may differ; the server decides.
        total_rounds: of the federation; None where the server does not know it.
    """

    round: int
    broadcast: str = ""
    kind: Mapping[str, Any] = field(default_factory=dict)
    scaling: Mapping[str, float] = field(default_factory=dict)
    base: BaseIdentity | None = None
    allow: tuple[str, ...] = ()
    total_rounds: int | None = None

    @property
    def brief(self) -> Announcement:
        """The same without the entries of the base."""
        return self if self.base is None else replace(self, base=self.base.brief)

    def to_json(self) -> dict[str, Any]:
        """As JSON values, without what is not known."""
        about: dict[str, Any] = {"round": self.round}
        for name in ("broadcast", "kind", "scaling"):
            if value := getattr(self, name):
                about[name] = value if isinstance(value, str) else dict(value)
        if self.base is not None:
            about["base"] = self.base.to_json()
        if self.allow:
            about["allow"] = list(self.allow)
        if self.total_rounds is not None:
            about["total_rounds"] = self.total_rounds
        return about

    @classmethod
    def from_json(cls, about: Any, label: str) -> Announcement:
        """Read what :meth:`to_json` made; other keys are left alone.

        Raises:
            FedcoreError: a field is of another type.
        """
        if not isinstance(about, Mapping):
            raise FedcoreError(f"{label}: its announcement is not a JSON object")
        known = {name: about[name] for name in _CHECKS if name in about}
        for name, (fits, wanted) in _CHECKS.items():
            if name in known and not fits(known[name]):
                shown = f"{known[name]!r:.{_SHOWN}}"
                raise FedcoreError(f"{label}: {name} is {shown}; it must be {wanted}")
        if "round" not in known:
            raise FedcoreError(f"{label}: it names no round")
        if "base" in about:
            known["base"] = BaseIdentity.from_json(about["base"], label)
        if "allow" in known:
            known["allow"] = check_allow(known["allow"])
        return cls(**known)

    def text(self) -> str:
        """As one line of JSON."""
        return json.dumps(self.to_json(), separators=(",", ":"), allow_nan=False)

    @classmethod
    def parse(cls, text: object, label: str) -> Announcement:
        """Read what :meth:`text` made.

        Raises:
            FedcoreError: it is something else.
        """
        if not isinstance(text, str) or len(text) > _LONGEST:
            raise FedcoreError(f"{label}: its announcement is not a text of this protocol")
        try:
            about = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FedcoreError(f"{label}: its announcement is not JSON: {error}") from None
        return cls.from_json(about, label)

    def answer(
        self, base: BaseIdentity | None, kind: Mapping[str, Any], scaling: Mapping[str, float]
    ) -> Announcement:
        """What an upload of this broadcast's round says.

        Args:
            base: the client's, if it is known; its entries travel where the parts are not those
                announced.
            kind, scaling: of the client's adapter.
        """
        if base is not None and self.base is not None and self.base.parts == base.parts:
            base = base.brief
        return replace(self, base=base, kind=kind, scaling=scaling, allow=(), total_rounds=None)


def scalings_of(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, float]:
    """Module to the scaling that ``config`` declares for it.

    Raises:
        FedcoreError: as :func:`fedcore.data.declared.declared_rank_and_scaling`.
    """
    return {module: declared_rank_and_scaling(config, module)[1] for module in modules}


def fixed_tensors(constants: Mapping[str, Tensor]) -> list[Tensor]:
    """The constants in fp32 and in order of their names, so that equal values hash alike."""
    return [constants[name].detach().float() for name in sorted(constants)]


def broadcast_identity(
    row: Tensor,
    layout: FactorLayout,
    constants: Mapping[str, Tensor],
    residual: Mapping[str, LowRank],
) -> str:
    """A hash of every tensor of a broadcast: clients say by it what they started from.

    Args:
        row: ``(P,)`` the global row.
        constants: what nobody changes, by name.
        residual: module to the update of its base weight.
    """
    beside = packed(residual)
    fixed = fixed_tensors(constants)
    return digest(row, layout, [*fixed, *(beside[name] for name in sorted(beside))])


def differences(
    said: Announcement,
    announced: Announcement,
    *,
    allow: Collection[str] = (),
    owner: str = "the server's",
    lenient: bool = False,
) -> tuple[str | None, tuple[str, ...]]:
    """What is wrong with an upload that says ``said``; what of it differs as it may.

    What ``announced`` does not know is not compared.

    Args:
        allow: parts of the base that may differ.
        owner: whose is expected, for the messages.
        lenient: whether ``said`` may leave out what is announced.

    Returns:
        The first problem, or None, and the allowed differences as sentences.
    """
    if said.round != announced.round:
        return f"its upload is for round {said.round}", ()
    if announced.broadcast and said.broadcast != announced.broadcast:
        return "it started from another broadcast than this server's", ()
    for name, lacking in (("kind", "the kind of its adapter"), ("scaling", "its scalings")):
        if getattr(announced, name) and not getattr(said, name) and not lenient:
            return f"it does not say {lacking}; send fedcore's record of the adapter's config", ()
    if said.kind and (problem := _kind_problem(said.kind, announced.kind, owner)):
        return problem, ()
    if said.scaling and (problem := _scaling_problem(said.scaling, announced.scaling, owner)):
        return problem, ()
    expected = announced.base
    if expected is None or (lenient and said.base is None):
        return None, ()
    if said.base is None:
        return (
            f"it does not say which base it trains on, to compare with {owner}; send its "
            "identity (identity_of)"
        ), ()
    if lenient:
        expected = expected.only(said.base.parts)
    return base_differences(said.base, expected, allow, owner)


def _kind_problem(said: Mapping[str, Any], expected: Mapping[str, Any], owner: str) -> str | None:
    # A field that is null and one that is missing mean the same.
    for name in dict.fromkeys([*expected, *said]) if expected else ():
        values = said.get(name), expected.get(name)
        if values[0] != values[1]:
            shown = [f"{value!r:.{_SHOWN}}" for value in (*values, name)]
            return f"its adapter has {shown[2][1:-1]} = {shown[0]}, {owner} {shown[1]}"
    return None


def _scaling_problem(
    said: Mapping[str, float], expected: Mapping[str, float], owner: str
) -> str | None:
    for module, scaling in expected.items():
        if module not in said:
            return f"it does not say the scaling of module {module}"
        if said[module] != scaling:
            return (
                f"module {module} has scaling {said[module]:g}, {owner} is {scaling:g}; set "
                "lora_alpha (and use_rslora) so that they are equal"
            )
    return None


def _is_scaling(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(module, str) and is_number(number) and abs(number) < _LARGEST
        for module, number in value.items()
    )


_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "round": (is_integer, "an integer"),
    "broadcast": (lambda value: isinstance(value, str), "a text"),
    "kind": (lambda value: isinstance(value, Mapping), "an object"),
    "scaling": (_is_scaling, "an object of finite numbers"),
    "allow": (
        lambda value: isinstance(value, list) and all(isinstance(part, str) for part in value),
        "a list of texts",
    ),
    "total_rounds": (lambda value: is_integer(value) and value > 0, "a positive integer"),
}
"""Field to what its JSON value must be."""
