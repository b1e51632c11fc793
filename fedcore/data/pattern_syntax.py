"""Patterns of module paths, parsed into the code of a small automaton.

Understood, with the meaning that :mod:`re` gives them: literal text and escaped punctuation;
``.``, ``\\d``, ``\\w`` and classes such as ``[0-9]`` and ``[^.]``; groups and alternatives;
``*``, ``+`` and ``?``, greedy or not; ``^`` and ``$``. Everything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

_MOST_CHARACTERS = 1000
_MOST_GROUPS = 32

Test = Callable[[str], bool]


class One(NamedTuple):
    """Read one character that passes the test."""

    test: Test


class Go(NamedTuple):
    """Continue at each of these places, relative to this instruction, without reading."""

    steps: tuple[int, ...]


class At(NamedTuple):
    """Continue at the start of the path alone, or at its end."""

    end: bool


class Found(NamedTuple):
    """The pattern in this place of the list matches."""

    pattern: int


Instruction = One | Go | At | Found
Code = tuple[Instruction, ...]


@dataclass(frozen=True)
class Is:
    """Whether a character is this one."""

    character: str

    def __call__(self, character: str) -> bool:
        """Whether it is."""
        return character == self.character


@dataclass(frozen=True)
class In:
    """Whether a character is in a class, or outside of it."""

    ranges: tuple[tuple[str, str], ...]
    tests: tuple[Test, ...]
    outside: bool

    def __call__(self, character: str) -> bool:
        """Whether it is."""
        inside = any(first <= character <= last for first, last in self.ranges)
        return (inside or any(test(character) for test in self.tests)) != self.outside


def anything(character: str) -> bool:
    """Whether a character is one."""
    return True


def _digit(character: str) -> bool:
    return character.isdecimal()


def _word(character: str) -> bool:
    return character.isalnum() or character == "_"


_CLASSES: dict[str, Test] = {"d": _digit, "w": _word}
_SIGNS = ("*", "+", "?")
_RESERVED = frozenset("?*+{}]|)")


class _Parser:
    """Recursive descent over one pattern; its methods return code that runs into what follows."""

    def __init__(self, text: str) -> None:
        self.text, self.place, self.depth = text, 0, 0

    def parse(self) -> Code:
        code = self._alternatives()
        if self.place < len(self.text):
            raise ValueError("a ) closes nothing")
        return code

    def _next(self, ahead: int = 0) -> str:
        return self.text[self.place + ahead : self.place + ahead + 1]

    def _take(self) -> str:
        character = self._next()
        if not character:
            raise ValueError("it ends within a group, a class or an escape")
        self.place += 1
        return character

    def _skip(self, text: str) -> bool:
        if not self.text.startswith(text, self.place):
            return False
        self.place += len(text)
        return True

    def _alternatives(self) -> Code:
        branches = [self._sequence()]
        while self._skip("|"):
            branches.append(self._sequence())
        *others, code = branches
        for branch in reversed(others):
            code = (Go((1, len(branch) + 2)), *branch, Go((len(code) + 1,)), *code)
        return code

    def _sequence(self) -> Code:
        code: list[Instruction] = []
        while self._next() not in ("", "|", ")"):
            code += self._repeated()
        return tuple(code)

    def _repeated(self) -> Code:
        is_anchor = self._next() in "^$"
        code = self._atom()
        sign = self._next()
        if sign not in _SIGNS:
            return code
        if is_anchor:
            raise ValueError(f"{sign} repeats nothing")
        self.place += 1
        # Lazy or not: a match is a match, whichever is looked for first.
        self._skip("?")
        if self._next() in _SIGNS:
            raise ValueError("a repetition is repeated")
        size = len(code)
        if sign == "?":
            return (Go((1, size + 1)), *code)
        if sign == "+":
            return (*code, Go((-size, 1)))
        return (Go((1, size + 2)), *code, Go((-size - 1,)))

    def _atom(self) -> Code:
        character = self._take()
        if character == "(":
            return self._group()
        if character == "[":
            return (One(self._class()),)
        if character == "\\":
            return (One(self._escape()),)
        if character == ".":
            return (One(anything),)
        if character in "^$":
            return (At(character == "$"),)
        if character in _RESERVED:
            raise ValueError(f"{character} is not understood here")
        return (One(Is(character)),)

    def _group(self) -> Code:
        self.depth += 1
        if self.depth > _MOST_GROUPS:
            raise ValueError(f"it nests more than {_MOST_GROUPS} groups")
        if not self._skip("?:") and self._next() == "?":
            raise ValueError("(? is not understood")
        code = self._alternatives()
        if self._take() != ")":
            raise ValueError("a group is not closed")
        self.depth -= 1
        return code or (Go((1,)),)

    def _escape(self) -> Test:
        character = self._take()
        if character in _CLASSES:
            return _CLASSES[character]
        if character.isascii() and character.isalnum():
            raise ValueError(f"\\{character} is not understood")
        return Is(character)

    def _class(self) -> Test:
        outside = self._skip("^")
        ranges: list[tuple[str, str]] = []
        tests: list[Test] = []
        while not self._skip("]"):
            first = last = self._member()
            if self._next() == "-" and self._next(1) != "]":
                self.place += 1
                last = self._member()
            if isinstance(first, Is) and isinstance(last, Is):
                ranges.append((first.character, last.character))
            elif first is last:
                tests.append(first)
            else:
                raise ValueError("a class has a range that is not one")
        if not ranges and not tests:
            raise ValueError("a class is empty")
        if any(last < first for first, last in ranges):
            raise ValueError("a class has a range that is not one")
        return In(tuple(ranges), tuple(tests), outside)

    def _member(self) -> Test:
        character = self._take()
        if character == "\\":
            return self._escape()
        # Reserved by re for sets of sets.
        if character in "[&~|":
            raise ValueError(f"{character} is not understood in a class")
        return Is(character)


def parse(pattern: str) -> Code:
    """The code of ``pattern``; a path matches where the code can run past its own end.

    Raises:
        ValueError: the pattern is not understood, saying why.
    """
    if len(pattern) > _MOST_CHARACTERS:
        raise ValueError(f"it has {len(pattern)} characters")
    return _Parser(pattern).parse()
