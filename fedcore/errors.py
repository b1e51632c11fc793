"""The errors a user of fedcore meets, and how they are worded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

_LONGEST_MESSAGE = 4000

# A name of somebody else: longer than any path or key that has a meaning.
_LONG_WORD = re.compile(r"(\S{400})\S{200,}")
_LONGEST_QUOTED = 1 << 16


def printable(text: object, most: int = 200) -> str:
    """Text of somebody else as it may stand on a terminal, in a record or on a page.

    Characters that do not print (control codes, line breaks, those that change the direction of
    writing, lone surrogates) become their escapes; text is truncated to ``most`` characters.

    Example:
        >>> printable("site" + chr(27) + "[2J" + chr(0x202E))
        'site\\\\x1b[2J\\\\u202e'
    """
    # Truncated first as well: an escape is longer than its character.
    start = str(text)[: most + 1]
    escaped = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in start
    )
    return escaped if len(escaped) <= most else f"{escaped[: most - 3]}..."


class FedcoreError(ValueError):
    """Something given to fedcore is wrong; the message names it, its value and what to pass.

    A message is one line of printable characters, whatever it quotes; a word that nobody can read
    to its end is shortened, so that what is said after it is seen.
    """

    def __init__(self, message: object = "") -> None:
        text = _LONG_WORD.sub(r"\1...", str(message)[:_LONGEST_QUOTED])
        super().__init__(printable(text, _LONGEST_MESSAGE))


class MissingExtraError(ImportError):
    """An optional dependency is needed and not installed; the message names the extra."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> FedcoreError:
    """A one-line error for a ``name`` that is not among ``known``, with the nearest valid names."""
    names = sorted(known)
    near = get_close_matches(name[:200], names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"valid: {', '.join(names)}"
    return FedcoreError(f"unknown {kind} {name[:200]!r}; {hint}")


def missing_extra(package: str, extra: str) -> MissingExtraError:
    """An error that says which extra of the distribution brings ``package``."""
    return MissingExtraError(
        f"{package} is not installed; install it with: pip install 'fedcore-lora[{extra}]'"
    )
