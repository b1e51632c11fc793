"""Which uploads repeat what their round's broadcast announced, and what clients agree on among
themselves where the server does not know it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedcore.data.announcement import Announcement, differences
from fedcore.data.base_identity import BaseIdentity
from fedcore.errors import FedcoreError
from fedcore.federation.state import ServerState

_LEARNED = ("kind", "scaling", "base")

_UNLESS = "if {} is the one that is wrong, give the server its adapter_config or base"


def known_base(state: ServerState) -> BaseIdentity | None:
    """The base that clients of earlier rounds agreed on, where the server was not given one.

    Raises:
        FedcoreError: the state says something else.
    """
    return _learned(state).base


def with_agreed(announced: Announcement, state: ServerState) -> Announcement:
    """What a broadcast announces: what the server knows, and what clients agreed on besides.

    Raises:
        FedcoreError: the state says something else.
    """
    learned = _learned(state)
    missing = {n: getattr(learned, n) for n in _LEARNED if _value(announced, n) is None}
    return replace(announced, **missing)


@dataclass
class Repeats:
    """One round's comparison of uploads with what was announced.

    What the server does not know (the base, or in a Flower app the scalings) is what most clients
    of the first round say, and from then on compared like the rest. Clients that say nothing at all
    are accepted with ``plain`` until they once did: a reply of an earlier round would look the
    same.

    Attributes:
        announced: by the server; None where no message carries it, and nothing is compared.
        state: that the round was opened on.
        plain: whether clients may say nothing.
        flags: allowed differences, by client.
    """

    announced: Announcement | None
    state: ServerState
    plain: bool = True
    flags: list[str] = field(default_factory=list)
    _said: dict[str, Announcement] = field(default_factory=dict)

    def check(self, client: str, said: Announcement | None) -> None:
        """Compare what the upload of ``client`` says.

        Raises:
            FedcoreError: it says something else, or nothing where it has to.
        """
        if self.announced is None:
            return
        if said is None:
            self._check_silence(client)
            return
        problem, allowed = differences(said, self.announced, allow=self.announced.allow)
        if problem is None:
            learned = _learned(self.state)
            problem, more = differences(said, learned, allow=self.announced.allow, lenient=True)
            allowed += more
        if problem is not None:
            raise FedcoreError(problem)
        self.flags += [f"{client}: {difference}" for difference in allowed]
        self._said[client] = said

    def disagreeing(self, clients: Collection[str]) -> dict[str, str]:
        """Those of ``clients`` that differ from most in what nobody knew before, and why."""
        problems: dict[str, str] = {}
        for name in self._unknown():
            said = {c: self._said[c] for c in sorted(clients) if c in self._said}
            first = _commonest(said, name)
            if first is None:
                continue
            expected = replace(Announcement(self.state.round), **{name: getattr(said[first], name)})
            for client, theirs in said.items():
                problem, allowed = differences(
                    replace(theirs, broadcast=""),
                    expected,
                    allow=self._allow,
                    owner=f"{first}'s",
                    lenient=True,
                )
                if problem is not None:
                    problems.setdefault(client, f"{problem}; {_UNLESS.format(first)}")
                self.flags += [f"{client}: {difference}" for difference in allowed]
        return problems

    def after(self, state: ServerState, accepted: Collection[str]) -> ServerState:
        """``state`` with what the ``accepted`` clients agree on, and who repeats announcements."""
        said = {client: self._said[client] for client in sorted(accepted) if client in self._said}
        if not said:
            return state
        agreed: dict[str, Any] = dict(state.agreed)
        for name in self._unknown():
            first = _commonest(said, name)
            if first is not None:
                agreed[name] = said[first].to_json()[name]
        repeating = tuple(sorted({*state.repeating, *said}))
        return replace(state, agreed=agreed, repeating=repeating)

    @property
    def _allow(self) -> tuple[str, ...]:
        return () if self.announced is None else self.announced.allow

    def _unknown(self) -> list[str]:
        """What neither the server nor an earlier round knows."""
        if self.announced is None:
            return []
        sources = (self.announced, _learned(self.state))
        return [
            name for name in _LEARNED if all(_value(source, name) is None for source in sources)
        ]

    def _check_silence(self, client: str) -> None:
        if client in self.state.repeating:
            raise FedcoreError(
                "it does not say which round and broadcast it is of, as it did before: a reply of "
                "an earlier round would look the same; send fedcore's record with every reply"
            )
        if not self.plain:
            raise FedcoreError(
                "it does not say which round and broadcast it is of; send fedcore's record, or "
                "accept such clients by plain_clients=True"
            )


def _learned(state: ServerState) -> Announcement:
    about = {**state.agreed, "round": state.round}
    return Announcement.from_json(about, "the state")


def _value(said: Announcement, name: str) -> Any:
    return getattr(said, name) or None


def _commonest(said: Mapping[str, Announcement], name: str) -> str | None:
    """The first client, by name, of those that say what most say; None where nobody says it."""
    values = {c: _key(value) for c, s in said.items() if (value := _value(s, name)) is not None}
    if not values:
        return None
    counts = Counter(values.values())
    most = max(counts.values())
    return next(client for client in sorted(values) if counts[values[client]] == most)


def _key(value: Any) -> str:
    plain = value.brief.to_json() if isinstance(value, BaseIdentity) else dict(value)
    return repr(sorted(plain.items(), key=str))
