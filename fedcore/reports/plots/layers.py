"""Aggregation error and factor drift, by round and by layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import nan

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fedcore.errors import FedcoreError
from fedcore.federation.records import Round
from fedcore.reports.plots.labels import EndLabel, label_ends, plain
from fedcore.reports.plots.style import (
    GLOBAL,
    INK,
    MUTED,
    PAPER,
    RULE,
    SMALL,
    dress,
    freeze,
    line_style,
    log_ticks,
    new_figure,
    whole_numbers,
)
from fedcore.reports.record import RunRecord

_COLORS = "viridis"
_MOST_LABELS = 60


def aggregation_error(record: RunRecord) -> Figure:
    """Relative distance of the broadcast product to the exact weighted mean of products.

    Raises:
        FedcoreError: no round has a defined value.
    """
    return _by_layer(record, "aggregation_error", "relative aggregation error")


def factor_drift(record: RunRecord) -> Figure:
    """How far the factors moved in each round, relative to their size before it.

    Raises:
        FedcoreError: no round has a defined value.
    """
    return _by_layer(record, "factor_drift", "relative factor drift")


def module_labels(modules: Sequence[str]) -> list[str]:
    """Short different names: the layer's number and the shortest ending that tells modules apart.

    Example:
        >>> module_labels(["encoder.layer.0.self.query", "encoder.layer.11.self.query"])
        ['0 query', '11 query']
    """
    parts = [module.split(".") for module in modules]
    lengths = [1] * len(parts)

    def label(i: int) -> str:
        numbers = [part for part in parts[i][: -lengths[i]] if part.isdigit()]
        return " ".join([*numbers[:1], ".".join(parts[i][-lengths[i] :])])

    while True:
        labels = [label(i) for i in range(len(parts))]
        clashing = [
            i
            for i, name in enumerate(labels)
            if labels.count(name) > 1 and lengths[i] < len(parts[i])
        ]
        if not clashing:
            return labels
        for i in clashing:
            lengths[i] += 1


def natural_order(modules: Sequence[str]) -> list[str]:
    """Modules with their numbers in numerical order; modules of one layer keep their order."""

    def key(module: str) -> tuple[list[str], list[int], int]:
        parts = module.split(".")
        first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
        numbers = [int(part) for part in parts if part.isdigit()]
        return parts[:first], numbers, modules.index(module)

    return sorted(modules, key=key)


def _by_layer(record: RunRecord, quantity: str, name: str) -> Figure:
    rounds = [r for r in record.trained if r.modules]
    modules = natural_order(list(dict.fromkeys(m.module for r in rounds for m in r.modules)))
    values = _matrix(rounds, modules, quantity)
    if not np.isfinite(values).any():
        raise FedcoreError(f"{record.folder}: {quantity} is undefined in every round and module")
    done = [r.done for r in rounds]
    step = 0.165 if len(modules) > 16 else 0.21
    rows = max(1.0, step * min(len(modules), _MOST_LABELS))
    if len(done) == 1:
        figure = new_figure(rows + 0.8)
        _one_round(figure.subplots(), values[:, 0], modules, f"{name}, after round {done[0]}")
        return figure
    figure = new_figure(rows + 2.0)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1.2, rows))
    _summary(dress(upper, title=f"{name}, over the modules"), done, values)
    _heatmap(dress(lower, "rounds completed"), done, values)
    _name_rows(lower, modules)
    return figure


def _matrix(rounds: Sequence[Round], modules: Sequence[str], quantity: str) -> np.ndarray:
    """Values as (modules, rounds); NaN where undefined."""
    matrix = np.full((len(modules), len(rounds)), nan)
    row = {module: i for i, module in enumerate(modules)}
    for j, r in enumerate(rounds):
        for m in r.modules:
            value = getattr(m, quantity)
            if value is not None:
                matrix[row[m.module], j] = value
    return matrix


def _log_limits(positive: np.ndarray) -> tuple[float, float]:
    """Limits of a logarithmic scale, at least a decade apart, so that rounding is not enlarged."""
    low, high = float(positive.min()), float(positive.max())
    middle, half = np.sqrt(low) * np.sqrt(high), max(np.sqrt(high / low), np.sqrt(10))
    return float(middle / half), float(middle * half)


def _summary(axes: Axes, done: Sequence[int], values: np.ndarray) -> None:
    """Mean over the modules, and the band from the least to the greatest."""
    known = [(d, column[np.isfinite(column)]) for d, column in zip(done, values.T, strict=True)]
    known = [(d, column) for d, column in known if column.size]
    x = [d for d, _ in known]
    positive = values[values > 0]
    if positive.size:
        floor, top = _log_limits(positive)
        axes.set_yscale("log")
        axes.set_ylim(floor / 1.2, top * 1.2)
        log_ticks(axes.yaxis, floor, top)
        # On a logarithmic axis 0 has no place: the band reaches the bottom and the line breaks.
        known = [(d, np.maximum(c, floor / 1.2)) for d, c in known if c.max() > 0]
    else:
        axes.set_ylim(-0.05, 1)
    x = [d for d, _ in known]
    low, high = [c.min() for _, c in known], [c.max() for _, c in known]
    mean = [float(c.mean()) for _, c in known]
    axes.fill_between(x, low, high, color=GLOBAL, alpha=0.15, linewidth=0)
    axes.plot(x, mean, color=GLOBAL, **line_style(len(x)))
    freeze(axes)
    ends = [
        EndLabel(x[-1], high[-1], "largest", GLOBAL),
        EndLabel(x[-1], mean[-1], "mean", GLOBAL),
        EndLabel(x[-1], low[-1], "smallest", GLOBAL),
    ]
    label_ends(axes, ends if values.shape[0] > 1 and low[-1] < high[-1] else ends[1:2])


def _heatmap(axes: Axes, done: Sequence[int], values: np.ndarray) -> None:
    edges = np.concatenate([np.asarray(done) - 0.5, [done[-1] + 0.5]])
    rows = np.arange(values.shape[0] + 1) - 0.5
    positive = np.ma.masked_where(~(values > 0), values)
    keys = []
    for kind, cells, color in (
        ("undefined", np.isnan(values), RULE),
        ("exactly 0", values == 0, PAPER),
    ):
        if cells.any():
            _flat_cells(axes, cells, edges, color)
            keys.append(Patch(facecolor=color, edgecolor=MUTED, linewidth=0.6, label=kind))
    if positive.count():
        low, high = _log_limits(positive.compressed())
        mesh = axes.pcolormesh(
            edges, rows, positive, norm=LogNorm(low, high), cmap=_COLORS, rasterized=True
        )
        figure = axes.get_figure()
        assert figure is not None
        bar = figure.colorbar(mesh, cax=axes.inset_axes((1.03, 0.0, 0.025, 1.0)))
        bar.ax.tick_params(labelsize=SMALL, colors=MUTED, labelcolor=INK, width=0.6, length=3)
        log_ticks(bar.ax.yaxis, low, high)
        bar.outline.set_visible(False)
    axes.grid(visible=False)
    axes.set_ylim(values.shape[0] - 0.5, -0.5)
    axes.set_xlim(edges[0], edges[-1])
    whole_numbers(axes)
    if keys:
        axes.legend(
            handles=keys,
            loc="lower left",
            bbox_to_anchor=(1.18 if positive.count() else 1.02, 0.0),
            frameon=False,
            fontsize=SMALL,
            labelcolor=INK,
            borderaxespad=0,
            handlelength=1.2,
        )


def _flat_cells(axes: Axes, cells: np.ndarray, edges: np.ndarray, color: str) -> None:
    """One rectangle for each run of marked cells in a row."""
    for i, row in enumerate(cells):
        spans = []
        for marked, run in groupby(enumerate(row.tolist()), key=lambda cell: cell[1]):
            columns = [j for j, _ in run]
            if marked:
                start, end = edges[columns[0]], edges[columns[-1] + 1]
                spans.append((start, end - start))
        if spans:
            axes.broken_barh(spans, (i - 0.5, 1.0), facecolor=color, edgecolor="none")


def _one_round(axes: Axes, values: np.ndarray, modules: Sequence[str], name: str) -> None:
    dress(axes, name)
    y = np.arange(len(modules))
    positive = values > 0
    if positive.any():
        axes.set_xscale("log")
        low, high = _log_limits(values[positive])
        axes.set_xlim(low / 1.2, high * 1.2)
        log_ticks(axes.xaxis, low, high)
    else:
        axes.set_xlim(0, 1)
        axes.set_xticks([])
    axes.plot(values[positive], y[positive], "o", color=GLOBAL, markersize=4.5)
    left = axes.get_xlim()[0]
    for rows, text in ((values == 0, "exactly 0"), (np.isnan(values), "undefined")):
        for i in y[rows]:
            axes.annotate(
                text, (left, i), (4, 0), textcoords="offset points", va="center", fontsize=SMALL,
                color=MUTED,
            )  # fmt: skip
    axes.set_ylim(len(modules) - 0.5, -0.5)
    _name_rows(axes, modules)


def _name_rows(axes: Axes, modules: Sequence[str]) -> None:
    labels = module_labels(modules)
    step = -(-len(modules) // _MOST_LABELS)
    size = SMALL if len(modules) <= 24 else SMALL - 1
    ticks = range(0, len(modules), step)
    axes.set_yticks(list(ticks), [plain(labels[i], 30) for i in ticks], fontsize=size)
