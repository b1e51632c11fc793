"""How one run learns: accuracy and loss against rounds, accuracy against bytes."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedcore.errors import FedcoreError
from fedcore.reports.formatting import rate
from fedcore.reports.plots.labels import EndLabel, label_ends
from fedcore.reports.plots.style import (
    GLOBAL,
    LOCAL,
    MUTED,
    TARGET_DASH,
    dress,
    freeze,
    line_style,
    new_figure,
    whole_numbers,
)
from fedcore.reports.record import RunRecord


def accuracy_by_round(record: RunRecord) -> Figure:
    """Held-out accuracy above, held-out and training loss below, against rounds completed.

    Raises:
        FedcoreError: no round was evaluated.
    """
    points = _accuracies(record)
    losses = [
        ("held-out", GLOBAL, [(r.done, r.loss) for r in record.rounds if r.loss is not None]),
        (
            "training",
            LOCAL,
            [(r.done, v) for r in record.rounds if (v := r.train_loss) is not None],
        ),
    ]
    losses = [curve for curve in losses if curve[2]]
    figure = new_figure(4.2 if losses else 2.6)
    panels = figure.subplots(2 if losses else 1, 1, sharex=True, squeeze=False)[:, 0]
    upper = dress(panels[0], y="held-out accuracy")
    style = line_style(len(points))
    upper.plot(*zip(*points, strict=True), color=GLOBAL, **style)
    whole_numbers(upper)
    if losses:
        lower = dress(panels[1], y="loss")
        ends = []
        for name, color, curve in losses:
            lower.plot(*zip(*curve, strict=True), color=color, **line_style(len(curve)))
            ends.append(EndLabel(*curve[-1], name, color))
        lower.set_ylim(0, 1.06 * max(value for _, _, curve in losses for _, value in curve))
        freeze(lower)
        label_ends(lower, ends)
    panels[-1].set_xlabel("rounds completed")
    references = _reference_lines(upper, record)
    label_ends(upper, [EndLabel(*points[-1], rate(points[-1][1]), GLOBAL), *references])
    return figure


def accuracy_by_bytes(record: RunRecord) -> Figure:
    """Held-out accuracy against the bytes sent so far, up and down, by all clients.

    Adapters alone, and adapters with the head where one travels.

    Raises:
        FedcoreError: no round was evaluated, or nothing was sent.
    """
    accuracies = [accuracy for _, accuracy in _accuracies(record)]
    sent = [record.cumulated[r.index] for r in record.evaluated]
    adapter = [(up.adapter + down.adapter) / 1e6 for up, down in sent]
    everything = [(up.total + down.total) / 1e6 for up, down in sent]
    if not everything[-1]:
        raise FedcoreError(f"{record.folder}: nothing was sent, so there is no traffic to draw")
    figure = new_figure(2.8)
    axes = dress(
        figure.subplots(), "sent so far, up and down, all clients (MB)", "held-out accuracy"
    )
    ends = []
    if adapter[-1]:
        axes.plot(adapter, accuracies, color=GLOBAL, **line_style(len(adapter)))
        ends.append(EndLabel(adapter[-1], accuracies[-1], "adapter", GLOBAL))
    if everything != adapter:
        axes.plot(everything, accuracies, color=LOCAL, linestyle="--", linewidth=1.2)
        name = "adapter + head" if adapter[-1] else "head"
        ends.append(EndLabel(everything[-1], accuracies[-1], name, LOCAL))
    axes.set_xlim(left=0)
    references = _reference_lines(axes, record)
    label_ends(axes, [*ends, *references])
    return figure


def _accuracies(record: RunRecord) -> list[tuple[int, float]]:
    points = [(r.done, r.accuracy) for r in record.rounds if r.accuracy is not None]
    if not points:
        raise FedcoreError(f"{record.folder}: no round was evaluated, so there is no accuracy")
    return points


def _reference_lines(axes: Axes, record: RunRecord) -> list[EndLabel]:
    """The target and the majority rate, and the axes' final limits."""
    lines = [
        (record.summary.target_accuracy, "target", TARGET_DASH),
        (record.partition.majority_rate, "most frequent class", (0, (1, 2))),
    ]
    known = [(value, name, dash) for value, name, dash in lines if value is not None]
    for value, _, dash in known:
        axes.axhline(value, color=MUTED, linewidth=0.9, linestyle=dash)
    freeze(axes)
    end = axes.get_xlim()[1]
    return [EndLabel(end, value, f"{name} {rate(value)}", MUTED) for value, name, _ in known]
