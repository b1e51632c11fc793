"""How numbers are printed. An unknown number is an em dash, never 0."""

from __future__ import annotations

from math import floor, log10

DASH = "—"


def rate(value: float | None) -> str:
    """An accuracy, to three decimals."""
    return DASH if value is None else f"{value:.3f}"


def signed(value: float | None) -> str:
    """A difference of accuracies, with its sign."""
    return DASH if value is None else f"{value:+.3f}"


def with_half_width(text: str, half_width: float | None) -> str:
    """A mean and its interval; the em dash says that there is no interval."""
    if text == DASH:
        return DASH
    return f"{text} ± {DASH if half_width is None else f'{half_width:.3f}'}"


def scientific(value: float | None) -> str:
    """A relative error, with an exponent below 0.001.

    Example:
        >>> scientific(0.0551), scientific(8.13e-8), scientific(0.0)
        ('0.055', '8.1e-8', '0')
    """
    if value is None:
        return DASH
    if value == 0 or abs(value) >= 1e-3:
        return significant(value)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def significant(value: float | None) -> str:
    """Three significant digits, two below 0.1; digits before the point are never dropped.

    Example:
        >>> significant(0.012345), significant(12.3456), significant(98765.4)
        ('0.012', '12.3', '98,765')
    """
    if value is None:
        return DASH
    if value == 0:
        return "0"
    digits = 3 if abs(value) >= 0.1 else 2
    decimals = max(0, digits - 1 - floor(log10(abs(value))))
    return f"{value:,.{decimals}f}"


def megabytes(count: float | None) -> str:
    """Bytes in units of 10⁶."""
    return significant(None if count is None else count / 1e6)


def duration(seconds: float | None) -> str:
    """Seconds, or minutes or hours once there are many.

    Example:
        >>> duration(3.21), duration(754), duration(9000)
        ('3.21 s', '12 min 34 s', '2 h 30 min')
    """
    if seconds is None:
        return DASH
    if seconds < 100:
        return f"{significant(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def plural(count: int, noun: str) -> str:
    """``1 round``, ``2 rounds``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
