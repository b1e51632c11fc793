"""Results as tables: for a terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence

from fedcore.reports.grid import Column, Grid
from fedcore_theory.check import Measured, Outcome
from fedcore_theory.running import Result

_NOTE = (
    "verdict: what the check establishes; erratum: the printed claim fails, as measured; artefact: "
    "the quantity comes from how it was measured. Measured and bound: of the first of the check's "
    "numbers; as stated: whether all of them came out as the verdict says."
)


def results_grid(results: Sequence[Result]) -> Grid:
    """One row per check."""
    return Grid(
        title="Claims, checked",
        columns=(
            Column("id", number=False),
            Column("claim", number=False),
            Column("verdict", number=False),
            Column("measured"),
            Column("bound"),
            Column("as stated", number=False),
            Column("s"),
        ),
        rows=tuple(
            (
                result.check.id,
                result.check.title,
                result.check.verdict,
                number(result.outcome.measured[0].value),
                bound(result.outcome.measured[0]),
                "yes" if result.outcome.holds else "NO",
                f"{result.seconds:.1f}",
            )
            for result in results
        ),
        note=_NOTE,
    )


def measured_grid(outcome: Outcome) -> Grid:
    """Every number of a check beside its bound."""
    return Grid(
        title="Measured",
        columns=(
            Column("quantity", number=False),
            Column("measured"),
            Column("bound"),
            Column("kept", number=False),
        ),
        rows=tuple(
            (one.what, number(one.value), bound(one), "yes" if one.holds else "NO")
            for one in outcome.measured
        ),
    )


def number(value: float) -> str:
    """Four significant digits, without the exponent's zeros; whole numbers as such."""
    if value == int(value) if abs(value) < 1e15 else False:
        return f"{int(value):,}"
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e")


def bound(one: Measured) -> str:
    """``<= 0.1``, or ``0.9 .. 1.1`` for a range."""
    if isinstance(one.bound, tuple):
        return f"{number(one.bound[0])} .. {number(one.bound[1])}"
    sign = {"<=": "≤", ">=": "≥"}.get(one.relation, one.relation)
    return f"{sign} {number(one.bound)}"


def failures(results: Sequence[Result]) -> list[str]:
    """One line for every number that did not come out as its check states."""
    return [
        f"{result.check.id}: {one.what} is {number(one.value)}, not {bound(one)}"
        for result in results
        for one in result.outcome.measured
        if not one.holds
    ]
