"""Who holds what: training examples by client and class, as a picture."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedcore.errors import FedcoreError
from fedcore.reports.plots.labels import EndLabel, label_ends, plain, short_names
from fedcore.reports.plots.style import GLOBAL, INK, PALETTE, SMALL, dress, freeze, new_figure
from fedcore.reports.record import RunRecord

_MOST_TICKS = 40
_MOST_COUNTS = 16
HELD_OUT = PALETTE[4]


def partition_picture(record: RunRecord) -> Figure:
    """A bubble for each client and class, with an area in proportion to the training examples.

    Above: each client's training and held-out examples.

    Raises:
        FedcoreError: the partition has no clients or no classes.
    """
    parts = record.partition
    counts = np.array(parts.class_counts, dtype=float).reshape(len(parts.client_ids), -1)
    if not counts.size:
        raise FedcoreError(f"{record.folder}: the partition has no clients or no classes")
    clients, classes = counts.shape
    few = clients <= _MOST_COUNTS
    rows = max(1.2, min(0.36 if few else 0.21, 9 / classes) * classes)
    figure = new_figure(rows + 2.0)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1.1, rows))
    _sizes(dress(upper, y="examples"), counts.sum(1), np.array(parts.test_counts).sum(1))
    dress(lower)
    # The largest bubble is as wide as its cell's narrower side; among many it may overlap a little.
    cell = min(72 * (figure.get_figwidth() - 1.8) / clients, 72 * rows / classes)
    cell *= 0.92 if few else 1.5
    x, y = np.meshgrid(np.arange(clients), np.arange(classes), indexing="ij")
    nonzero = counts > 0
    area = cell**2 * counts / counts.max()
    lower.scatter(x[nonzero], y[nonzero], s=area[nonzero], color=GLOBAL, alpha=0.75, linewidth=0)
    if few:
        _write_counts(lower, counts, area)
    prefix, names = short_names(parts.client_ids)
    step = -(-clients // _MOST_TICKS)
    labels = [plain(names[i], 14) for i in range(0, clients, step)]
    turned = sum(len(label) + 1 for label in labels) > 90
    ticks = list(range(0, clients, step))
    lower.set_xticks(ticks, labels, rotation=90 if turned else 0, fontsize=SMALL)
    size = SMALL if classes <= 30 else SMALL * 30 / classes
    lower.set_yticks(range(classes), [plain(n, 24) for n in parts.label_names], fontsize=size)
    lower.set_ylim(classes - 0.5, -0.5)
    lower.set_xlim(-0.6, clients - 0.4)
    lower.set_xlabel(f"client ({plain(prefix)}…)" if prefix else "client")
    return figure


def _sizes(axes: Axes, train: np.ndarray, test: np.ndarray) -> None:
    x = np.arange(len(train))
    axes.bar(x, train, width=0.7, color=GLOBAL)
    axes.bar(x, test, bottom=train, width=0.7, color=HELD_OUT)
    axes.grid(axis="x", visible=False)
    axes.tick_params(labelbottom=False, bottom=False)
    axes.set_xlim(-0.6, len(train) - 0.4)
    freeze(axes)
    end = axes.get_xlim()[1]
    train_label = EndLabel(end, train[-1] / 2, f"training {int(train.sum())}", GLOBAL)
    held_out = EndLabel(end, train[-1] + test[-1] / 2, f"held out {int(test.sum())}", HELD_OUT)
    label_ends(axes, [train_label, held_out])


def _write_counts(axes: Axes, counts: np.ndarray, area: np.ndarray) -> None:
    """The number in its bubble, or beside one that is too small for it."""
    for (i, j), count in np.ndenumerate(counts):
        if not count:
            continue
        text = f"{int(count)}"
        radius = float(np.sqrt(area[i, j])) / 2
        inside = 2 * radius > 5.5 * len(text) + 3
        axes.annotate(
            text,
            (i, j),
            (0 if inside else radius + 1.5, 0),
            textcoords="offset points",
            ha="center" if inside else "left",
            va="center",
            fontsize=SMALL - 1,
            color="white" if inside else INK,
        )
