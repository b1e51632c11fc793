"""The kinds of pictures that checks have: measurements in colour, bounds black and dashed.

A bound can be told from a measurement without colour: it is dashed and has no marks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedcore.reports.plots.style import (
    INK,
    MUTED,
    SMALL,
    dress,
    new_figure,
    series_style,
    whole_numbers,
)
from fedcore_theory.check import Measured, Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

_DASHES: Sequence[Any] = ((0, (5, 2)), (0, (2, 2)), (0, (7, 2, 2, 2)))

_FLOOR = 1e-18
"""What a logarithmic axis shows of a zero."""


@dataclass(frozen=True)
class Line:
    """A curve. Of measurements unless ``bound``, which is what they are held against."""

    label: str
    x: ArrayLike
    y: ArrayLike
    bound: bool = False


def trajectories(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    log_x: bool = False,
    log_y: bool = True,
    marks: Mapping[str, float] | None = None,
) -> Figure:
    """Curves against what bounds them; places that are integers get whole numbers on the axis.

    Args:
        marks: label to a height that is marked by a dotted line, such as a floor.
    """
    figure = new_figure(3.4)
    axes = dress(figure.add_subplot(), x_label, y_label)
    _scales(axes, log_x, log_y)
    colour = dash = 0
    for line in lines:
        x, y = np.asarray(line.x, float), np.asarray(line.y, float)
        y = np.maximum(y, _FLOOR) if log_y else y
        if line.bound:
            dashes = _DASHES[dash % len(_DASHES)]
            axes.plot(x, y, linewidth=1.2, label=line.label, color=INK, linestyle=dashes)
            dash += 1
        else:
            style = series_style(colour, 0) | {"linestyle": "-"}
            every = max(1, len(x) // 12)
            axes.plot(x, y, linewidth=1.5, markersize=4, markevery=every, label=line.label, **style)
            colour += 1
    for label, height in (marks or {}).items():
        axes.axhline(height, color=MUTED, linewidth=1.0, linestyle=":", label=label)
    if not log_x and all(np.asarray(line.x).dtype.kind == "i" for line in lines):
        whole_numbers(axes)
    _legend(axes)
    return figure


def orders(series: Mapping[str, tuple[ArrayLike, ArrayLike]], x_label: str, y_label: str) -> Figure:
    """Errors against a step size or another small number, with the slope fitted to each."""
    figure = new_figure(3.4)
    axes = dress(figure.add_subplot(), x_label, y_label)
    _scales(axes, True, True)
    for n, (label, (x, y)) in enumerate(series.items()):
        xs, ys = np.asarray(x, float), np.maximum(np.asarray(y, float), _FLOOR)
        slope, offset = np.polyfit(np.log(xs), np.log(ys), 1)
        style = series_style(n, 0)
        axes.plot(
            xs,
            ys,
            linestyle="none",
            markersize=6,
            color=style["color"],
            marker=style["marker"],
            label=f"{label}: slope {slope:.2f}",
        )
        axes.plot(xs, np.exp(offset) * xs**slope, color=INK, linewidth=0.9, linestyle=(0, (5, 2)))
    places = sorted({float(x) for xs, _ in series.values() for x in np.asarray(xs)})
    # Matplotlib's own labels of a short logarithmic axis run into each other.
    if len(places) <= 6 and places[-1] < 20 * places[0]:
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.set_xticks([], minor=True)
    _legend(axes)
    return figure


def histogram(
    values: Mapping[str, ArrayLike],
    x_label: str,
    *,
    marks: Mapping[str, float] | None = None,
    log_x: bool = False,
    bins: int = 40,
) -> Figure:
    """How often which value was met, as outlines; ``marks`` are bounds on the x axis."""
    figure = new_figure(3.2)
    axes = dress(figure.add_subplot(), x_label, "cases")
    arrays = {label: np.asarray(numbers, float) for label, numbers in values.items()}
    every = np.concatenate([*arrays.values(), list((marks or {}).values())])
    if log_x:
        axes.set_xscale("log")
        positive = np.maximum(every, _FLOOR)
        edges = np.geomspace(positive.min(), positive.max() * (1 + 1e-12), bins + 1).tolist()
    else:
        edges = np.linspace(every.min(), every.max() + 1e-300, bins + 1).tolist()
    for n, (label, array) in enumerate(arrays.items()):
        style = series_style(n, 0)
        shown = np.maximum(array, _FLOOR) if log_x else array
        axes.hist(shown, edges, histtype="step", linewidth=1.6, color=style["color"], label=label)
    for n, (label, place) in enumerate((marks or {}).items()):
        dashes = _DASHES[n % len(_DASHES)]
        axes.axvline(place, color=INK, linewidth=1.2, linestyle=dashes, label=label)
    _legend(axes)
    return figure


def bars(
    groups: Mapping[str, Mapping[str, float]],
    y_label: str,
    *,
    log_y: bool = False,
    marks: Mapping[str, float] | None = None,
) -> Figure:
    """Numbers side by side: group on the x axis to series to height; ``marks`` are bounds."""
    figure = new_figure(3.2)
    axes = dress(figure.add_subplot(), "", y_label)
    _scales(axes, False, log_y)
    names = list(dict.fromkeys(name for heights in groups.values() for name in heights))
    width = 0.8 / len(names)
    for n, name in enumerate(names):
        places = [i for i, heights in enumerate(groups.values()) if name in heights]
        heights = [heights[name] for heights in groups.values() if name in heights]
        axes.bar(
            [place - 0.4 + (n + 0.5) * width for place in places],
            np.maximum(heights, _FLOOR) if log_y else heights,
            0.9 * width,
            color=series_style(n, 0)["color"],
            hatch=("", "///", "...", "xx", "\\\\\\", "++")[n % 6],
            edgecolor="white",
            linewidth=0,
            label=name,
        )
    for n, (label, height) in enumerate((marks or {}).items()):
        dashes = _DASHES[n % len(_DASHES)]
        axes.axhline(height, color=INK, linewidth=1.2, linestyle=dashes, label=label)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.grid(False, axis="x")
    if len(names) > 1 or marks:
        _legend(axes)
    return figure


def beside_bounds(outcome: Outcome) -> Figure:
    """Every number of the outcome as a share of its bound, for checks that have no curve.

    A mark left of the line keeps to an upper bound, right of it to a lower one; the values
    themselves stand beside.
    """
    rows = list(outcome.measured)
    figure = new_figure(0.9 + 0.32 * len(rows))
    axes = dress(figure.add_subplot(), "measured / bound", "")
    axes.set_xscale("log")
    for n, one in enumerate(reversed(rows)):
        low, high = _share(one)
        style = series_style(0 if one.holds else 1, 0)
        marker = {"<": "<", ">": ">"}.get(one.relation[0], "o")
        axes.plot([low], [n], marker=marker, markersize=7, color=style["color"], linestyle="none")
        if high is not None:
            axes.plot([high, high], [n - 0.3, n + 0.3], color=INK, linestyle=(0, (2, 2)))
        axes.annotate(
            f"{one.value:.3g}",
            (low, n),
            textcoords="offset points",
            xytext=(0, 6),
            ha="center",
            fontsize=SMALL - 1,
            color=MUTED,
        )
    axes.axvline(1, color=INK, linewidth=1.2, linestyle=(0, (5, 2)))
    axes.set_yticks(range(len(rows)), [one.what for one in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.3)
    return figure


def _share(one: Measured) -> tuple[float, float | None]:
    """The value over its (lower) bound, kept on a logarithmic axis, and the upper bound if any."""
    low = one.bound[0] if isinstance(one.bound, tuple) else one.bound
    high = one.bound[1] if isinstance(one.bound, tuple) else None
    scale = low if low > 0 else 1.0
    share = float(np.clip(one.value / scale, 1e-6, 1e6)) if np.isfinite(one.value) else 1e6
    return share, None if high is None else high / scale


def _scales(axes: Axes, log_x: bool, log_y: bool) -> None:
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    # Less than a decade is labelled between its powers, too.
    axes.tick_params(which="minor", labelsize=SMALL, labelcolor=INK)


def _legend(axes: Axes) -> None:
    axes.legend(
        fontsize=SMALL,
        frameon=False,
        labelcolor=INK,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0.2,
    )
