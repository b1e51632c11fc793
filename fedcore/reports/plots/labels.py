"""Names in figures: short, literal, and next to what they name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from fedcore.reports.plots.style import LETTERS, PALETTE, SMALL


def plain(text: str, length: int = 40) -> str:
    """``text`` on one line of up to ``length`` characters, without matplotlib's mathematics."""
    line = " ".join(text.split())
    line = line if len(line) <= length else line[: length - 1] + "…"
    return line.replace("$", r"\$")


def short_names(names: Sequence[str]) -> tuple[str, list[str]]:
    """The prefix that all ``names`` share, up to a separator, and the names without it.

    Example:
        >>> short_names(["client-03", "client-11"])
        ('client-', ['03', '11'])
    """
    shared = 0
    if len(names) > 1:
        first, last = min(names), max(names)
        while shared < len(first) and first[shared] == last[shared]:
            shared += 1
    prefix = min(names, default="")[:shared]
    cut = max(prefix.rfind(mark) for mark in "-_./: ") + 1
    return prefix[:cut], [name[cut:] or name for name in names]


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions moved apart as little as needed to stand ``gap`` apart, in the same order;
    of equal ones the first stands highest.

    Neighbours that are too close become a block around the mean of what they wanted; if ``low`` to
    ``high`` is too short for all, they stand evenly in it.

    Example:
        >>> spread([0.5, 0.5], 0.25, 0.0, 1.0)
        [0.625, 0.375]
    """
    if not positions:
        return []
    gap = min(gap, (high - low) / max(len(positions) - 1, 1))
    order = sorted(range(len(positions)), key=lambda i: (positions[i], -i))
    blocks: list[tuple[float, int]] = []
    for i in order:
        # A block is (start, members); merging keeps the mean of what its members wanted.
        start, size = min(max(positions[i], low), high), 1
        while blocks and blocks[-1][0] + blocks[-1][1] * gap > start:
            before, members = blocks.pop()
            start = (before * members + (start - members * gap) * size) / (members + size)
            size += members
            start = min(max(start, low), high - (size - 1) * gap)
        blocks.append((start, size))
    placed = [start + j * gap for start, size in blocks for j in range(size)]
    moved = [0.0] * len(positions)
    for i, position in zip(order, placed, strict=True):
        moved[i] = position
    return moved


def lettering(color: str) -> str:
    """The colour for type that names something drawn in ``color``."""
    return LETTERS[PALETTE.index(color)] if color in PALETTE else color


@dataclass(frozen=True)
class EndLabel:
    """The name of a line, wanted at its last point."""

    x: float
    y: float
    text: str
    color: str


def label_ends(axes: Axes, labels: Sequence[EndLabel], size: float = SMALL) -> None:
    """Name lines to the right of the axes, at the height of their ends, without overlaps.

    The limits of the axes must be final. A label that had to move, or whose line ends early, gets a
    thin leader to its point.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    # Of the figure's height about a fifth goes to the axis labels; 1.35 is a line's leading.
    share = axes.get_position().height * 0.9
    gap = 1.35 * size / (72 * figure.get_figheight() * share)
    to_fraction = axes.transData + axes.transAxes.inverted()
    ends = [to_fraction.transform((label.x, label.y)) for label in labels]
    heights = spread([float(y) for _, y in ends], gap, 0.0, 1.0)
    for label, (x, y), height in zip(labels, ends, heights, strict=True):
        led = abs(height - y) > gap / 3 or x < 0.94
        leader = {
            "arrowstyle": "-",
            "color": label.color,
            "linewidth": 0.6,
            "alpha": 0.6,
            "relpos": (0, 0.5),
        }
        axes.annotate(
            plain(label.text),
            xy=(label.x, label.y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            fontsize=size,
            color=lettering(label.color),
            annotation_clip=False,
            arrowprops={**leader, "shrinkA": 1, "shrinkB": 3} if led else None,
        )
