"""How one run learns: quality and loss against rounds, quality against bytes."""

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


def quality_by_round(record: RunRecord) -> Figure:
    """Held-out quality above, held-out and training loss below, against rounds completed.

    Raises:
        FedcoreError: no round was evaluated.
    """
    points = _qualities(record)
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
    upper = dress(panels[0], y=f"held-out {record.measure.name}")
    style = line_style(len(points))
    upper.plot(*zip(*points, strict=True), color=GLOBAL, **style)
    whole_numbers(upper)
    if losses:
        lower = dress(panels[1], y="loss")
        ends = []
        for name, color, curve in losses:
            lower.plot(*zip(*curve, strict=True), color=color, **line_style(len(curve)))
            ends.append(EndLabel(*curve[-1], name, color))
        if not record.measure.lower_is_better:
            # From zero, which a loss approaches; that of a language model moves far above it.
            lower.set_ylim(0, 1.06 * max(value for _, _, curve in losses for _, value in curve))
        freeze(lower)
        label_ends(lower, ends)
    panels[-1].set_xlabel("rounds completed")
    references = _reference_lines(upper, record)
    label_ends(upper, [EndLabel(*points[-1], rate(points[-1][1]), GLOBAL), *references])
    return figure


def quality_by_bytes(record: RunRecord) -> Figure:
    """Held-out quality against the bytes sent so far, up and down, by all clients.

    Adapters alone, and adapters with the head where one travels.

    Raises:
        FedcoreError: no round was evaluated, or nothing was sent.
    """
    qualities = [quality for _, quality in _qualities(record)]
    sent = [record.cumulated[r.index] for r, _ in record.evaluated]
    adapter = [(up.adapter + down.adapter) / 1e6 for up, down in sent]
    everything = [(up.total + down.total) / 1e6 for up, down in sent]
    if not everything[-1]:
        raise FedcoreError(f"{record.folder}: nothing was sent, so there is no traffic to draw")
    figure = new_figure(2.8)
    axes = dress(
        figure.subplots(),
        "sent so far, up and down, all clients (MB)",
        f"held-out {record.measure.name}",
    )
    ends = []
    if adapter[-1]:
        axes.plot(adapter, qualities, color=GLOBAL, **line_style(len(adapter)))
        ends.append(EndLabel(adapter[-1], qualities[-1], "adapter", GLOBAL))
    if everything != adapter:
        axes.plot(everything, qualities, color=LOCAL, linestyle="--", linewidth=1.2)
        name = "adapter + head" if adapter[-1] else "head"
        ends.append(EndLabel(everything[-1], qualities[-1], name, LOCAL))
    axes.set_xlim(left=0)
    references = _reference_lines(axes, record)
    label_ends(axes, [*ends, *references])
    return figure


def _qualities(record: RunRecord) -> list[tuple[int, float]]:
    points = [(r.done, quality) for r, quality in record.evaluated]
    if not points:
        name = record.measure.name
        raise FedcoreError(f"{record.folder}: no round was evaluated, so there is no {name}")
    return points


def _reference_lines(axes: Axes, record: RunRecord) -> list[EndLabel]:
    """The target and the majority rate, and the axes' final limits."""
    lines = [
        (record.target, "target", TARGET_DASH),
        (record.majority_rate, "most frequent class", (0, (1, 2))),
    ]
    known = [(value, name, dash) for value, name, dash in lines if value is not None]
    for value, _, dash in known:
        axes.axhline(value, color=MUTED, linewidth=0.9, linestyle=dash)
    freeze(axes)
    end = axes.get_xlim()[1]
    return [EndLabel(end, value, f"{name} {rate(value)}", MUTED) for value, name, _ in known]
