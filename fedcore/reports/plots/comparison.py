"""Methods side by side: quality against rounds and bytes, and where each ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedcore.errors import FedcoreError
from fedcore.reports.comparison import RunGroup, common_target, group_measure
from fedcore.reports.formatting import rate
from fedcore.reports.intervals import estimate
from fedcore.reports.plots.labels import EndLabel, label_ends, plain
from fedcore.reports.plots.style import (
    INK,
    MUTED,
    PAPER,
    SMALL,
    TARGET_DASH,
    dress,
    freeze,
    log_ticks,
    new_figure,
    series_style,
    whole_numbers,
)
from fedcore.reports.record import RunRecord

MOST_DIRECT = 6
"""More curves than this get a legend and no bands."""


@dataclass(frozen=True)
class _Curve:
    """A group's quality over the rounds that all of its runs evaluated."""

    group: RunGroup
    style: dict[str, Any]
    x: tuple[float, ...]
    quality: tuple[float, ...]
    band: tuple[tuple[float | None, float | None], ...]


def compared_by_round(groups: Sequence[RunGroup]) -> Figure:
    """Mean held-out quality against rounds; the band is the 95% Student-t interval over seeds.

    Raises:
        FedcoreError: no run is finished and evaluated.
    """
    curves = _curves(groups, lambda run, index: float(index + 1))
    figure = new_figure(_height(curves))
    axes = dress(figure.subplots(), "rounds completed", _held_out(groups))
    _draw(axes, curves)
    whole_numbers(axes)
    _finish(axes, groups, curves)
    return figure


def compared_by_bytes(groups: Sequence[RunGroup]) -> Figure:
    """Mean held-out quality against the adapter bytes sent by all clients, up and down.

    A method that sends no adapter is a horizontal line at its final quality. The axis is
    logarithmic once one method sends ten times what another does.

    Raises:
        FedcoreError: no run is finished and evaluated, or none sends an adapter.
    """
    curves = _curves(groups, _adapter_megabytes)
    sending = [curve for curve in curves if curve.x[-1] > 0]
    if not sending:
        raise FedcoreError("no run sends an adapter, so there is no adapter traffic to draw")
    totals = [curve.x[-1] for curve in sending]
    figure = new_figure(_height(curves))
    axes = dress(
        figure.subplots(), "adapter traffic, up and down, all clients (MB)", _held_out(groups)
    )
    if max(totals) >= 10 * min(totals):
        axes.set_xscale("log")
        sending = [_from_first_byte(curve) for curve in sending]
        log_ticks(axes.xaxis, min(curve.x[0] for curve in sending), max(totals))
    else:
        axes.set_xlim(left=0, right=max(totals) * 1.04)
    silent = [_as_level(curve, axes) for curve in curves if curve.x[-1] == 0]
    _draw(axes, sending)
    for curve in silent:
        axes.axhline(curve.quality[-1], color=curve.style["color"], linestyle=":")
    _finish(axes, groups, [*sending, *silent])
    return figure


def final_quality(groups: Sequence[RunGroup]) -> Figure:
    """Final held-out quality of every run, with mean and 95% Student-t interval per group.

    A group of one run has a hollow dot and no interval.

    Raises:
        FedcoreError: no run is finished.
    """
    finals = []
    for style, group in zip(_styles(groups), groups, strict=True):
        seeds = [a for run in group.runs if (a := run.quality) is not None]
        if seeds:
            finals.append((style["color"], group.label, seeds, estimate(seeds)))
    if not finals:
        name = group_measure(groups).name
        raise FedcoreError(f"no run is finished, so there is no final {name} to draw")
    finals.sort(key=lambda item: item[3].mean or 0.0)
    figure = new_figure(0.9 + 0.3 * max(len(finals), 2))
    axes = dress(figure.subplots(), f"final {_held_out(groups)}")
    for y, (color, _, seeds, result) in enumerate(finals):
        mean, low, high = result.mean or 0.0, result.low, result.high
        text, fill = f"{rate(mean)}, one run", PAPER
        if low is not None and high is not None:
            axes.plot([low, high], [y, y], color=color, linewidth=2.2)
            axes.plot(seeds, [y - 0.24] * len(seeds), "|", color=color, markersize=5, alpha=0.8)
            text, fill = rate(mean), color
        axes.plot([mean], [y], "o", color=color, markerfacecolor=fill, markersize=6.5)
        beside = axes.get_yaxis_transform()
        axes.text(1.02, y, text, transform=beside, va="center", fontsize=SMALL, color=INK)
    names = [plain(label, 44) for _, label, _, _ in finals]
    axes.set_yticks(range(len(finals)), names, fontsize=SMALL)
    axes.set_ylim(-0.6, len(finals) - 0.4)
    axes.grid(axis="y", visible=False)
    return figure


def _styles(groups: Sequence[RunGroup]) -> list[dict[str, Any]]:
    methods = list(dict.fromkeys(group.method for group in groups))
    settings = list(dict.fromkeys(repr(group.settings) for group in groups))
    return [
        series_style(methods.index(group.method), settings.index(repr(group.settings)))
        for group in groups
    ]


def _curves(
    groups: Sequence[RunGroup], position: Callable[[RunRecord, int], float]
) -> list[_Curve]:
    curves = []
    for style, group in zip(_styles(groups), groups, strict=True):
        runs = [{r.index: quality for r, quality in run.evaluated} for run in group.runs]
        indices = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
        if indices:
            x = tuple(fmean([position(run, index) for run in group.runs]) for index in indices)
            estimates = [estimate([run[index] for run in runs]) for index in indices]
            means = tuple(e.mean for e in estimates if e.mean is not None)
            curves.append(_Curve(group, style, x, means, tuple((e.low, e.high) for e in estimates)))
    if not curves:
        raise FedcoreError("no run is finished and evaluated, so there is no quality to draw")
    return curves


def _adapter_megabytes(run: RunRecord, index: int) -> float:
    up, down = run.cumulated[index]
    return (up.adapter + down.adapter) / 1e6


def _from_first_byte(curve: _Curve) -> _Curve:
    """The curve without the points before any traffic, which a logarithmic axis cannot show."""
    start = next(i for i, x in enumerate(curve.x) if x > 0)
    return replace(curve, x=curve.x[start:], quality=curve.quality[start:], band=curve.band[start:])


def _as_level(curve: _Curve, axes: Axes) -> _Curve:
    """The end of a curve without adapter traffic, named at the right-hand edge."""
    style = {**curve.style, "linestyle": ":", "marker": ""}
    return replace(curve, style=style, x=(axes.get_xlim()[1],), quality=curve.quality[-1:], band=())


def _height(curves: Sequence[_Curve]) -> float:
    return max(3.4, 0.9 + 0.18 * len(curves))


def _draw(axes: Axes, curves: Sequence[_Curve]) -> None:
    for curve in curves:
        ends = zip(curve.x, curve.band, strict=True)
        banded = [(x, low, high) for x, (low, high) in ends if low is not None and high is not None]
        if banded and len(curves) <= MOST_DIRECT:
            x, low, high = (list(column) for column in zip(*banded, strict=True))
            axes.fill_between(x, low, high, color=curve.style["color"], alpha=0.12, linewidth=0)
        axes.plot(curve.x, curve.quality, **curve.style, markersize=3, linewidth=1.4)


def _finish(axes: Axes, groups: Sequence[RunGroup], curves: Sequence[_Curve]) -> None:
    """Target line, limits, and the names of the curves: at their ends, or many in a legend."""
    target = common_target(groups)
    if target is not None:
        axes.axhline(target, color=MUTED, linewidth=0.9, linestyle=TARGET_DASH)
    # An interval may pass what is possible; the picture stops there.
    measure = group_measure(groups)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, measure.least - 0.02), min(high, measure.most + 0.02))
    freeze(axes)
    right = axes.get_xlim()[1]
    ordered = sorted(curves, key=lambda curve: -curve.quality[-1])
    if len(curves) > MOST_DIRECT:
        handles = [
            Line2D([], [], **curve.style, markersize=3, label=plain(_name(curve)))
            for curve in ordered
        ]
        if target is not None:
            label = f"target {rate(target)}"
            handles.append(Line2D([], [], color=MUTED, linestyle=TARGET_DASH, label=label))
        axes.legend(
            handles=handles,
            loc="center left",
            bbox_to_anchor=(1.02, 0.5),
            frameon=False,
            fontsize=SMALL,
            labelcolor=INK,
            handlelength=3,
        )
        return
    ends = [
        EndLabel(curve.x[-1], curve.quality[-1], _name(curve), curve.style["color"])
        for curve in ordered
    ]
    if target is not None:
        ends.append(EndLabel(right, target, f"target {rate(target)}", MUTED))
    label_ends(axes, ends)


def _held_out(groups: Sequence[RunGroup]) -> str:
    return f"held-out {group_measure(groups).name}"


def _name(curve: _Curve) -> str:
    silent = " (no adapter sent)" if curve.style["linestyle"] == ":" else ""
    return f"{curve.group.label}{silent}"
