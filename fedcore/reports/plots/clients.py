"""How the clients fare: the spread over rounds, and each client's global against its own model."""

from __future__ import annotations

from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedcore.errors import FedcoreError
from fedcore.federation.measures import Measure
from fedcore.federation.records import Round
from fedcore.reports.plots.labels import EndLabel, label_ends, plain, short_names
from fedcore.reports.plots.style import (
    GLOBAL,
    LOCAL,
    MUTED,
    SMALL,
    dress,
    freeze,
    line_style,
    new_figure,
    whole_numbers,
)
from fedcore.reports.record import RunRecord

_MOST_TICKS = 40


def client_spread(record: RunRecord) -> Figure:
    """Worst, mean and best client over rounds, and all clients in the last evaluated round.

    Every quality is on the client's own held-out shard; the mean is unweighted.

    Raises:
        FedcoreError: no client was evaluated.
    """
    rounds = record.client_evaluated
    if not rounds:
        raise FedcoreError(f"{record.folder}: no client was evaluated, so there is no spread")
    figure = new_figure(4.9)
    upper, lower = figure.subplots(2, 1)
    name = record.measure.name
    _over_rounds(dress(upper, "rounds completed", f"client {name}"), record)
    axes = dress(lower, y=f"client {name}")
    _by_client(axes, rounds[-1][0], record.measure)
    axes.set_xlabel(f"{axes.get_xlabel()}, by {name}")
    return figure


def _over_rounds(axes: Axes, record: RunRecord) -> None:
    measure, rounds = record.measure, record.client_evaluated
    done = [r.done for r, _ in rounds]
    low = [min(qualities) for _, qualities in rounds]
    high = [max(qualities) for _, qualities in rounds]
    worst, best = (high, low) if measure.lower_is_better else (low, high)
    mean = [fmean(qualities) for _, qualities in rounds]
    alone = all(c.global_quality(measure) is None for r, _ in rounds for c in r.clients)
    color = LOCAL if alone else GLOBAL
    axes.fill_between(done, low, high, color=color, alpha=0.15, linewidth=0)
    axes.vlines(done, low, high, color=color, alpha=0.35, linewidth=0.8)
    axes.plot(done, mean, color=color, **line_style(len(done)))
    whose = "own models" if alone else "global model"
    ends = [
        EndLabel(done[-1], best[-1], "best client", color),
        EndLabel(done[-1], mean[-1], f"mean, {whose}", color),
        EndLabel(done[-1], worst[-1], "worst client", color),
    ]
    if len(rounds[-1][1]) == 1:
        ends = [EndLabel(done[-1], mean[-1], whose, color)]
    own_models = [(r.done, [c.local_quality(measure) for c in r.clients]) for r, _ in rounds]
    local = [(d, fmean(known)) for d, v in own_models if (known := [a for a in v if a is not None])]
    if local and not alone:
        # A single point makes no line to be seen.
        dot = "s" if len(local) == 1 else ""
        x, y = zip(*local, strict=True)
        axes.plot(x, y, color=LOCAL, linestyle="--", linewidth=1.2, marker=dot, markersize=3.5)
        ends.append(EndLabel(*local[-1], "mean, own models", LOCAL))
    whole_numbers(axes)
    freeze(axes)
    label_ends(axes, ends)


def _by_client(axes: Axes, last: Round, measure: Measure) -> None:
    qualities = [
        (c.client, c.global_quality(measure), c.local_quality(measure)) for c in last.clients
    ]
    shown = [entry for entry in qualities if entry[1:] != (None, None)]
    shown.sort(key=lambda entry: (_either(*entry[1:]), entry[0]))
    prefix, names = short_names([client for client, _, _ in shown])
    for x, (_, there, local) in enumerate(shown):
        if there is not None and local is not None:
            axes.plot([x, x], [there, local], color=MUTED, linewidth=1.0, zorder=2)
    size = 5.0 if len(shown) <= 30 else 3.5
    ends = []
    for values, marker, color, name in (
        ([there for _, there, _ in shown], "o", GLOBAL, "global model"),
        ([local for _, _, local in shown], "s", LOCAL, "own model"),
    ):
        points = [(x, value) for x, value in enumerate(values) if value is not None]
        if points:
            hollow = "none" if marker == "s" else color
            axes.plot(
                *zip(*points, strict=True),
                marker,
                color=color,
                markerfacecolor=hollow,
                markersize=size,
                zorder=3,
            )
            ends.append(EndLabel(len(shown) - 0.5, points[-1][1], name, color))
    step = -(-len(shown) // _MOST_TICKS)
    ticks = range(0, len(shown), step)
    labels = [plain(names[i], 14) for i in ticks]
    turned = sum(len(label) + 1 for label in labels) > 90
    axes.set_xticks(list(ticks), labels, rotation=90 if turned else 0, fontsize=SMALL)
    axes.grid(axis="x", visible=False)
    axes.set_xlim(-0.5, len(shown) - 0.5)
    start = f" ({plain(prefix)}…)" if prefix else ""
    axes.set_xlabel(f"clients{start} after round {last.done}")
    freeze(axes)
    label_ends(axes, ends)


def _either(there: float | None, own: float | None) -> float:
    return (own or 0.0) if there is None else there
