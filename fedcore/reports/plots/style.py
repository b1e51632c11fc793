"""How figures look.

Figures are plain ``matplotlib.figure.Figure`` objects: no pyplot, no global state. Everything is
drawn in a few fixed colours, so that a page can replace them by its own.
"""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

INK, MUTED, RULE, PAPER = "#22272e", "#6b7581", "#dde2e8", "#fefefe"
# Okabe and Ito's palette without black and yellow, which vanish on a dark or a light page.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
LETTERS = ("#00629a", "#b84f00", "#007a58", "#a34c7d", "#946600", "#23759f")
"""The palette, darkened until small type can be read on white."""

DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
TARGET_DASH = (0, (4, 3))
MARKERS = ("o", "s", "D", "^", "v", "P")
GLOBAL, LOCAL = PALETTE[0], PALETTE[1]

WIDTH = 6.6
"""Inches: the text width of a page."""

SMALL, NORMAL = 8.0, 9.0


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, drawn by Agg, with constrained layout."""
    figure = Figure(
        figsize=(width, height),
        layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06),
        facecolor="none",
    )
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, x: str = "", y: str = "", title: str = "") -> Axes:
    """Labels, light rules, no box; every size is set here, so that no rcParams matter."""
    axes.set_facecolor("none")
    axes.set_xlabel(x, fontsize=NORMAL, color=INK)
    axes.set_ylabel(y, fontsize=NORMAL, color=INK)
    if title:
        axes.set_title(title, fontsize=NORMAL, color=INK, loc="left")
    axes.tick_params(labelsize=SMALL, colors=MUTED, labelcolor=INK, length=3, width=0.6)
    axes.tick_params(which="minor", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
        spine.set_linewidth(0.6)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def whole_numbers(axes: Axes) -> None:
    """Only whole numbers, rounds or clients, on the x axis."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))


def log_ticks(axis: Axis, low: float, high: float) -> None:
    """Ticks for a logarithmic axis from ``low`` to ``high``: 1, 2, 5, or only powers of ten."""
    steps = (1.0,) if high / low > 200 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps, numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: scientific_tick(value)))


def scientific_tick(value: float) -> str:
    """``0.02``, ``3``, ``1e-7``: as short as it gets."""
    return f"{value:.0e}".replace("e-0", "e-") if value < 1e-3 else f"{value:g}"


def line_style(points: int) -> dict[str, Any]:
    """A line with a dot at each of its points, while they are few enough to be told apart."""
    return {"linewidth": 1.5, "marker": "o" if points <= 60 else "", "markersize": 3.5}


def freeze(axes: Axes) -> None:
    """Fix the limits at what has been drawn so far; :func:`label_ends` needs that."""
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())


def series_style(method: int, setting: int) -> dict[str, Any]:
    """Colour by method, dash and marker by setting; no two alike for 108 methods or 3 settings."""
    tour = method // len(PALETTE)
    shift = setting + tour // len(DASHES)
    return {
        "color": PALETTE[method % len(PALETTE)],
        "linestyle": DASHES[(tour + setting) % len(DASHES)],
        "marker": MARKERS[(method + shift) % len(MARKERS)],
    }
