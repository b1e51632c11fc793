"""Patterns of module paths that other people wrote, matched without a backtracking engine.

``rank_pattern`` and ``alpha_pattern`` of an adapter's configuration map regular expressions to
values; PEFT takes the first for which ``re.match(rf"(.*\\.)?({pattern})$", path)`` finds a match.
Run by :mod:`re`, a pattern of twenty characters can take years. Here a pattern is parsed
(:mod:`~fedcore.data.pattern_syntax`) into a small automaton, or refused, and a path is read once
from left to right. Patterns that read a fixed number of characters, which PEFT and this package
write by the hundred, are looked up by their text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from fedcore.data.pattern_syntax import At, Code, Found, Go, Instruction, Is, One, anything, parse
from fedcore.errors import FedcoreError, printable

_MOST_PATTERNS = 1 << 14
_MOST_FORMS = 256

# Of all patterns together that have no fixed length, and of the steps between their states.
_MOST_INSTRUCTIONS = 2000
_MOST_STEPS = 4000

_REMEDY = (
    r"write a module's path or its end, with no more than . \d \w [0-9] [^.] (a|b) * + ? ^ $, "
    "or name each module by its path"
)

# (.*\.)? in front of every pattern: nothing, or anything up to a dot.
_PREFIX: Code = (Go((1, 5)), Go((1, 3)), One(anything), Go((-2,)), One(Is(".")))


@dataclass(frozen=True)
class _Automaton:
    """Several patterns at once; what a state does is worked out once and remembered."""

    code: Code
    starts: tuple[int, ...]
    _steps: dict[tuple[frozenset[int], str], frozenset[int]] = field(default_factory=dict)
    _matches: dict[frozenset[int], frozenset[int]] = field(default_factory=dict)

    def matches(self, path: str) -> frozenset[int]:
        """The indices of the patterns that match ``path``.

        Raises:
            ValueError: too many states would have to be remembered.
        """
        begin = frozenset(self.starts), ""
        if begin not in self._steps:
            self._steps[begin] = self._reached(self.starts, start=True)
        states = self._steps[begin]
        for character in path:
            if not states:
                break
            key = states, character
            if key not in self._steps:
                if len(self._steps) >= _MOST_STEPS:
                    raise ValueError("the patterns branch too often")
                self._steps[key] = self._reached(
                    place + 1
                    for place in states
                    if isinstance(one := self.code[place], One) and one.test(character)
                )
            states = self._steps[key]
        if states not in self._matches:
            last = self._reached(states, start=not path, end=True)
            indices = [one.pattern for p in last if isinstance(one := self.code[p], Found)]
            self._matches[states] = frozenset(indices)
        return self._matches[states]

    def _reached(
        self, places: Iterable[int], *, start: bool = False, end: bool = False
    ) -> frozenset[int]:
        """The instructions that wait for a character, or have matched, from ``places`` on."""
        reached: set[int] = set()
        waiting = list(places)
        while waiting:
            place = waiting.pop()
            if place in reached:
                continue
            reached.add(place)
            match self.code[place]:
                case Go(steps):
                    waiting += [place + step for step in steps]
                case At(at_end) if end if at_end else start:
                    waiting.append(place + 1)
        return frozenset(p for p in reached if not isinstance(self.code[p], Go))


class _Form(NamedTuple):
    """What patterns of a fixed number of characters have in common.

    Attributes:
        length: number of characters.
        wild: the places in which any character will do.
        whole: whether the path has to be no longer.
    """

    length: int
    wild: tuple[int, ...]
    whole: bool

    def text(self, path: str) -> str:
        """The end of ``path`` that a pattern of this form reads, with a dot in the wild places."""
        end = list(path[len(path) - self.length :])
        for place in self.wild:
            end[place] = "."
        return "".join(end)


@dataclass(frozen=True)
class _Patterns:
    """Patterns in the order in which they are tried.

    Attributes:
        fixed: form to the texts of the patterns that have it, with the index of the first of each.
        others: all other patterns.
    """

    fixed: dict[_Form, dict[str, int]]
    others: _Automaton

    @classmethod
    def of(cls, patterns: Sequence[str]) -> _Patterns:
        if len(patterns) > _MOST_PATTERNS:
            raise FedcoreError(f"{len(patterns)} patterns are too many; {_REMEDY}")
        fixed: dict[_Form, dict[str, int]] = {}
        code: list[Instruction] = []
        starts: list[int] = []
        for index, pattern in enumerate(patterns):
            parsed = _parsed(pattern)
            form, text = _fixed_form(parsed)
            if form is not None and (form in fixed or len(fixed) < _MOST_FORMS):
                fixed.setdefault(form, {}).setdefault(text, index)
                continue
            starts.append(len(code))
            code += [*_PREFIX, *parsed, At(end=True), Found(index)]
            if len(code) > _MOST_INSTRUCTIONS:
                raise _refused(pattern, "with those before it, it is too long")
        return cls(fixed, _Automaton(tuple(code), tuple(starts)))

    def first_match(self, path: str) -> int | None:
        # Where a pattern may begin: at the start, or behind a dot.
        lengths = {len(path) - i - 1 for i, character in enumerate(path) if character == "."}
        indices = []
        for form, texts in self.fixed.items():
            whole = form.length == len(path)
            if whole or (not form.whole and form.length in lengths):
                indices += [texts[text]] if (text := form.text(path)) in texts else []
        try:
            indices += self.others.matches(path)
        except ValueError as error:
            raise FedcoreError(f"{error}; {_REMEDY}") from None
        return min(indices, default=None)


def first_match(patterns: tuple[str, ...], path: str) -> int | None:
    r"""The index of the first of ``patterns`` that matches the module ``path``; None if none does.

    A pattern matches the whole path, or what follows one of its dots.

    Raises:
        FedcoreError: naming the pattern that is not understood, and what to write instead.

    Example:
        >>> first_match(("value", r"layer\.[0-2]\..*query"), "encoder.layer.1.attention.query")
        1
    """
    if not patterns:
        return None
    # The one character that re's dot and dollar treat otherwise than all others.
    if "\n" in path:
        raise FedcoreError(f"{printable(path)} is not the path of a module")
    return _table(patterns).first_match(path)


@lru_cache(maxsize=16)
def _table(patterns: tuple[str, ...]) -> _Patterns:
    return _Patterns.of(patterns)


def _parsed(pattern: str) -> Code:
    try:
        return parse(pattern)
    except ValueError as error:
        raise _refused(pattern, str(error)) from None


def _fixed_form(code: Code) -> tuple[_Form | None, str]:
    """Form and text of a pattern that reads one character after another; None of all others."""
    whole, ends = _is_anchor(code[:1], end=False), _is_anchor(code[-1:], end=True)
    read = code[whole : len(code) - ends]
    text, wild = "", []
    for place, one in enumerate(read):
        if isinstance(one, One) and isinstance(one.test, Is):
            text += one.test.character
        elif isinstance(one, One) and one.test is anything:
            wild.append(place)
            text += "."
        else:
            return None, ""
    return _Form(len(text), tuple(wild), whole), text


def _is_anchor(code: Code, *, end: bool) -> bool:
    return any(isinstance(one, At) and one.end == end for one in code)


def _refused(pattern: str, reason: str) -> FedcoreError:
    return FedcoreError(f"the pattern {pattern[:60]!r} is not supported: {reason}; {_REMEDY}")
