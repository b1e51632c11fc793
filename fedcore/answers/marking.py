"""Whether a continuation holds the right answer: a number, a formula, a text.

A continuation is truncated at its first stop string before: a model that invents another question
would otherwise be marked by the answer to that.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from fedcore.errors import missing_extra

_NUMBER = re.compile(
    # A minus after a digit, letter or bracket subtracts.
    r"(?:(?<![\w)\]])-)?[$€£]?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))"
    r"(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
)
_MARK = "####"


def until(text: str, stops: Sequence[str]) -> str:
    """``text`` before the first of the strings ``stops`` in it.

    Example:
        >>> until("15\\nQuestion: what is 90 + 9? 99", ["Question:", "\\n\\n"])
        '15\\n'
    """
    places = (text.find(stop) for stop in stops)
    return text[: min((place for place in places if place >= 0), default=len(text))]


def number_in(text: str) -> Decimal | None:
    """The answer of a text: the number after its last ``####``, otherwise its last number; exact.

    Thousands may be separated by commas; signs of currencies and per cent are left out.

    Example:
        >>> [number_in(text) for text in ("1,234", "$1,000.50.", "12 + 3 = 15", "none")]
        [Decimal('1234'), Decimal('1000.50'), Decimal('15'), None]
        >>> number_in("so 7 of 9\\n#### 7 apples"), number_in("3 - 5 = -2")
        (Decimal('7'), Decimal('-2'))
    """
    _, mark, after = text.rpartition(_MARK)
    marked = _NUMBER.search(after) if mark else None
    written = marked.group() if marked else (_NUMBER.findall(text) or [None])[-1]
    if written is None:
        return None
    try:
        return Decimal(re.sub("[$€£,]", "", written))
    except InvalidOperation:  # An exponent beyond what a decimal holds.
        return None


def is_numeric(text: str) -> bool:
    """Whether a reference answer is a number: the whole text, or what follows ``####`` in it."""
    return (_MARK in text and number_in(text) is not None) or bool(
        _NUMBER.fullmatch(text.strip(" %."))
    )


def same_number(text: str, answer: str) -> bool:
    """Whether the numbers of both are equal, ``1,000.00`` and ``1000`` too."""
    # Compared as they are: arithmetic on decimals rounds to 28 digits.
    given = number_in(text)
    return given is not None and given == number_in(answer)


def normalised(text: str) -> str:
    """A text without what two equal answers may differ in: case, blanks, punctuation around it.

    Example:
        >>> normalised("  The  Eiffel tower. ")
        'the eiffel tower'
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip(" .,;:!?\"'“”‘’`*")


def same_text(text: str, answer: str) -> bool:
    """Whether both are one text, once normalised."""
    return normalised(text) == normalised(answer)


def same_formula(text: str, answer: str) -> bool:
    """Whether math-verify takes both for one mathematical expression, as ``1/2`` and ``0.5``.

    It limits its time by signals, so it works in the main thread alone.

    Raises:
        MissingExtraError: math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise missing_extra("math-verify", "answers") from error
    return bool(verify(parse(answer), parse(text)))
