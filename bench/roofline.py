"""Every operation under the roofs of memory and arithmetic.

The intensity of an operation is its formula's flops over the bytes it must move. Its speed is
bounded by bytes per second times intensity, the slope, and by the peak of matrix products, the flat
roofs; most of ours compute in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from bench.case import Row
from bench.limits import Limits
from fedcore.reports.formatting import significant
from fedcore.reports.plots.labels import lettering
from fedcore.reports.plots.style import (
    INK,
    MARKERS,
    MUTED,
    PALETTE,
    PAPER,
    SMALL,
    dress,
    freeze,
    new_figure,
)

# Where a name may stand beside its point: offset in points, and alignment.
_PLACES = (
    ((7, 0), "left", "center"),
    ((-7, 0), "right", "center"),
    ((0, 6), "center", "bottom"),
    ((0, -6), "center", "top"),
    ((6, 6), "left", "bottom"),
    ((6, -6), "left", "top"),
    ((-6, 6), "right", "bottom"),
    ((-6, -6), "right", "top"),
)


def roofline_figure(rows: Sequence[Row], limits: Limits) -> Figure:
    """Achieved GFLOP/s against flops per byte, both logarithmic, with the measured roofs.

    One operation on several sizes or dtypes is one line; 16-bit uploads have hollow dots.
    """
    figure = new_figure(4.8)
    axes = dress(figure.subplots(), "flops per byte that must move", "GFLOP/s")
    axes.set_xscale("log")
    axes.set_yscale("log")
    lines: dict[str, list[Row]] = {}
    for row in {(row.op, row.shape, row.dtype): row for row in rows}.values():
        lines.setdefault(row.op, []).append(row)
    names = []
    for place, (op, members) in enumerate(lines.items()):
        color = PALETTE[place % len(PALETTE)]
        marker = MARKERS[(place + place // len(PALETTE)) % len(MARKERS)]
        members.sort(key=lambda row: row.flops / row.bytes)
        points = [(row.flops / row.bytes, row.flops / row.seconds / 1e9) for row in members]
        axes.plot(*zip(*points, strict=True), color=color, linewidth=0.8, alpha=0.6, zorder=2)
        for (x, y), row in zip(points, members, strict=True):
            fill = color if row.dtype == "float32" else PAPER
            axes.plot(x, y, marker, color=color, markerfacecolor=fill, markersize=5, zorder=3)
        names.append((op, points[-1], color))
    figure.supxlabel("hollow: uploads in 16 bits", fontsize=SMALL, color=MUTED)
    _roofs(axes, limits)
    _name_points(axes, names)
    return figure


def _roofs(axes: Axes, limits: Limits) -> None:
    """The copy bandwidth as a slope up to the highest peak, and each peak from there on."""
    low, high = axes.get_xlim()
    bandwidth = limits.copy / 1e9
    peaks = {name: peak / 1e9 for name, peak in limits.flops.items()}
    highest = max(peaks.values())
    low, high = low / 1.5, max(high, 8 * highest / bandwidth)
    slope = [low, highest / bandwidth]
    axes.plot(slope, [bandwidth * x for x in slope], color=INK, linewidth=1.1, zorder=1)
    for peak in peaks.values():
        axes.plot([peak / bandwidth, high], [peak] * 2, color=INK, linewidth=1.1, zorder=1)
    axes.set_xlim(low, high)
    # A point above its roof is a measurement error and must be visible.
    axes.set_ylim(top=max(3 * highest, axes.get_ylim()[1]))
    freeze(axes)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=12))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    words: dict[str, Any] = {"fontsize": SMALL, "color": MUTED, "textcoords": "offset points"}
    for name, peak in peaks.items():
        text = f"{name} product, {significant(peak)} GFLOP/s"
        axes.annotate(text, (high, peak), (0, 3), ha="right", **words)
    text = f"copy, {significant(bandwidth)} GB/s"
    near = slope[1] ** 0.75 * slope[0] ** 0.25
    axes.annotate(text, (near, bandwidth * near), (-6, 3), ha="right", va="bottom", **words)


def _name_points(
    axes: Axes,
    names: Sequence[tuple[str, tuple[float, float], str]],
) -> None:
    """Write each name beside its point, where it covers the least of lines and other names."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.canvas.draw()
    frame = axes.get_window_extent()
    reach = 4 * figure.get_dpi() / 72
    drawn = [
        Bbox.from_bounds(x - reach, y - reach, 2 * reach, 2 * reach)
        for line in axes.lines
        for x, y in _along(axes.transData.transform(line.get_xydata()), reach)
    ]
    written = [text.get_window_extent() for text in axes.texts]

    def covered(box: Bbox) -> float:
        """The area of lines and, which is worse, of words under ``box`` or beyond the frame."""
        lines = sum(_shared(box, other) for other in drawn)
        words = sum(_shared(box, other) for other in written)
        return lines + 10 * (words + box.width * box.height - _shared(box, frame))

    for name, point, color in names:
        tried: list[tuple[float, int, Annotation]] = []
        for offset, across, along in _PLACES:
            text = axes.annotate(
                name,
                point,
                offset,
                textcoords="offset points",
                ha=across,
                va=along,
                fontsize=SMALL,
                color=lettering(color),
            )
            tried.append((covered(text.get_window_extent()), len(tried), text))
        best = min(tried)[2]
        for _, _, text in tried:
            if text is not best:
                text.remove()
        written.append(best.get_window_extent())


def _shared(one: Bbox, other: Bbox) -> float:
    overlap = Bbox.intersection(one, other)
    return 0.0 if overlap is None else float(overlap.width * overlap.height)


def _along(corners: np.ndarray, step: float) -> np.ndarray:
    """Points on the polyline through ``corners (n, 2)``, ``step`` apart or less."""
    pieces = [corners[:1]]
    for start, stop in pairwise(corners):
        count = int(np.ceil(np.hypot(*(stop - start)) / step)) + 1
        pieces.append(np.linspace(start, stop, count))
    return np.concatenate(pieces)
