"""What a round costs as the clients, the rank, the width or the modules grow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.rounds import MEAN, SKETCHED, TRUNCATED, Operands, our_rounds
from bench.timing import Clock, take_turns
from bench.workloads import Setting, Workload
from fedcore.reports.plots.labels import EndLabel, label_ends
from fedcore.reports.plots.style import (
    INK,
    MUTED,
    NORMAL,
    PALETTE,
    SMALL,
    TARGET_DASH,
    dress,
    freeze,
    new_figure,
)

MIDDLE = Workload("", modules=16, width=2048, rank=8, clients=16)
"""Where the four lines of growing size cross."""

SIZES: dict[str, tuple[int, ...]] = {
    "clients": (4, 8, 16, 32, 64),
    "rank": (2, 4, 8, 16, 32),
    "width": (512, 1024, 2048, 4096, 8192),
    "modules": (4, 8, 16, 32, 64),
}
_LETTERS = {"clients": "N", "rank": "r", "width": "k", "modules": "L"}
_LINES = {
    MEAN: ("weighted mean", PALETTE[2], "D"),
    SKETCHED: ("sketched round", PALETTE[0], "o"),
    TRUNCATED: ("truncated round", PALETTE[1], "s"),
}


@dataclass(frozen=True)
class Size:
    """The round whose ``axis`` is ``value`` while all else stays in the middle."""

    axis: str
    value: int
    workload: Workload

    @property
    def name(self) -> str:
        """What is shown while it is measured."""
        return f"cost at {self.workload.shape}"


@dataclass(frozen=True)
class CostPoint:
    """The median seconds of one operation at one size."""

    op: str
    size: Size
    seconds: float


def _with(middle: Workload, axis: str, value: int) -> Workload:
    changed: dict[str, Any] = {axis: value}
    return replace(middle, **changed)


def sizes(setting: Setting) -> list[Size]:
    """Every size of every axis; the two smallest on a tiny round where the setting is small."""
    middle = replace(MIDDLE, modules=2, width=256) if setting.small else MIDDLE
    return [
        Size(axis, value, _with(middle, axis, value))
        for axis, values in SIZES.items()
        for value in (values[:2] if setting.small else values)
    ]


def cost_points(
    found: Iterable[Size], device: torch.device, clock: Clock, repeats: int
) -> list[CostPoint]:
    """A mean and both FLoRG rounds in fp32 at every size."""
    points = []
    for size in found:
        rounds = our_rounds(Operands(size.workload, *size.workload.uploads(device)))
        timings = take_turns({op: ours.call for op, ours in rounds.items()}, clock, repeats)
        points += [CostPoint(op, size, timing.seconds) for op, timing in timings.items()]
    return points


def cost_figure(points: Sequence[CostPoint]) -> Figure:
    """Four panels of time against one size each, both logarithmic, with guides of slope 1."""
    figure = new_figure(4.8)
    panels = figure.subplots(2, 2, sharey=True)
    ends = [
        _draw(axes, axis, [point for point in points if point.size.axis == axis])
        for axes, axis in zip(panels.flat, SIZES, strict=True)
    ]
    figure.supxlabel(
        f"dashed: in proportion to the size. One size grows; the others stay at {_middle(points)}.",
        fontsize=SMALL,
        color=MUTED,
    )
    freeze(panels[0, 0])
    for place, (axes, labels) in enumerate(zip(panels.flat, ends, strict=True)):
        if place % 2:
            label_ends(axes, labels)
        else:
            axes.set_ylabel("ms per round", fontsize=NORMAL, color=INK)
    return figure


def _middle(points: Sequence[CostPoint]) -> str:
    """The sizes that the panels share: each as it is where another one grows."""
    clients = next(p.size.workload for p in points if p.size.axis != "clients").clients
    other = next(p.size.workload for p in points if p.size.axis == "clients")
    return replace(other, clients=clients).shape


def _draw(axes: Axes, axis: str, points: Sequence[CostPoint]) -> list[EndLabel]:
    """The lines of one panel and their names."""
    dress(axes, f"{axis} {_LETTERS[axis]}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    values = sorted({point.size.value for point in points})
    ends = []
    for op, (name, color, marker) in _LINES.items():
        y = [1e3 * point.seconds for point in points if point.op == op]
        axes.plot(values, y, color=color, marker=marker, markersize=3.5, linewidth=1.5, zorder=3)
        # Through the middle, where the four panels show the same round.
        middle = len(values) // 2
        guide = [y[middle] * value / values[middle] for value in values]
        axes.plot(values, guide, color=MUTED, linewidth=0.8, linestyle=TARGET_DASH, zorder=2)
        ends.append(EndLabel(values[-1], y[-1], name, color))
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(values[0] / 1.2, values[-1] * 1.2)
    return ends
