"""Pictures beside what an attack made of their gradients, and how near it came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt

import numpy as np
from matplotlib.figure import Figure

from fedcore.errors import FedcoreError
from fedcore.reports.intervals import estimate
from fedcore.reports.plots.labels import plain
from fedcore.reports.plots.style import (
    GLOBAL,
    INK,
    LOCAL,
    MUTED,
    NORMAL,
    SMALL,
    WIDTH,
    dress,
    new_figure,
)


def picture_rows(rows: Mapping[str, np.ndarray]) -> Figure:
    """Square grey pictures in columns, one row for each name; 0 is paper, 1 is ink.

    Args:
        rows: name to ``(columns, pixels)`` in [0, 1], the same shape in every row.

    Raises:
        FedcoreError: no rows, rows of different shapes, or pictures that are not square.
    """
    shapes = {pictures.shape for pictures in rows.values()}
    if len(shapes) != 1:
        raise FedcoreError(f"rows have the shapes {sorted(shapes)}; pass one and the same")
    columns, pixels = shapes.pop()
    side = isqrt(pixels)
    if side * side != pixels:
        raise FedcoreError(f"pictures have {pixels} pixels; pass square ones")
    cell = side + 1
    mosaic = np.full((len(rows) * cell - 1, columns * cell - 1), np.nan)
    for i, pictures in enumerate(rows.values()):
        for j, picture in enumerate(pictures):
            top, left = i * cell, j * cell
            mosaic[top : top + side, left : left + side] = picture.reshape(side, side)
    names = [plain(name, 40) for name in rows]
    margin = 0.3 + 0.068 * max(map(len, names))
    wide = min(0.55 * columns, WIDTH - margin)
    figure = new_figure(wide / columns * len(rows) + 0.2, margin + wide)
    axes = figure.subplots()
    axes.imshow(mosaic, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks([i * cell + side / 2 - 0.5 for i in range(len(rows))], names, fontsize=NORMAL)
    axes.set_xticks([])
    axes.tick_params(length=0, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def nearness(groups: Mapping[str, Sequence[float]], controls: Sequence[str], label: str) -> Figure:
    """One row per group: its values, their mean and its 95% interval.

    Args:
        groups: name to the values of its repetitions.
        controls: the names drawn as controls, in the other colour.
        label: of the axis.

    Raises:
        FedcoreError: no groups.
    """
    if not groups:
        raise FedcoreError("groups is empty; pass at least one")
    figure = new_figure(0.3 * len(groups) + 0.75)
    axes = dress(figure.subplots(), label)
    axes.grid(axis="y", visible=False)
    for row, (name, values) in enumerate(groups.items()):
        color = LOCAL if name in controls else GLOBAL
        interval = estimate(values)
        assert interval.mean is not None
        axes.plot(values, [row] * len(values), "o", color=color, markersize=3, alpha=0.45)
        if interval.half_width is not None:
            ends = [interval.mean - interval.half_width, interval.mean + interval.half_width]
            axes.plot(ends, [row, row], color=color, linewidth=1.5)
        axes.plot(interval.mean, row, "D", color=color, markersize=5.5)
        axes.annotate(
            f"{interval.mean:.1f}",
            (interval.mean, row),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=SMALL,
            color=MUTED,
        )
    axes.set_yticks(range(len(groups)), [plain(name, 40) for name in groups], fontsize=NORMAL)
    axes.set_ylim(len(groups) - 0.5, -0.75)
    return figure
