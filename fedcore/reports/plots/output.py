"""Figures as PNG files and as SVG elements that follow a light or a dark page."""

from __future__ import annotations

import io
import re

import matplotlib
from matplotlib.figure import Figure

from fedcore.reports.plots.style import INK, LETTERS, MUTED, PALETTE, PAPER, RULE

PNG_DPI = 200

_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    RULE: "--rule",
    PAPER: "--paper",
    **{color: f"--series-{i}" for i, color in enumerate(PALETTE)},
    **{color: f"--letters-{i}" for i, color in enumerate(LETTERS)},
}


def to_png(figure: Figure) -> bytes:
    """The figure as PNG on white paper."""
    buffer = io.BytesIO()
    figure.savefig(
        buffer, format="png", dpi=PNG_DPI, facecolor="white", metadata={"Software": None}
    )
    return buffer.getvalue()


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element to stand in a page.

    Text becomes outlines, so that it looks the same everywhere; the element refers to nothing
    outside, and its ids start with ``name``, so that several can stand in one page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        absent = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=absent)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", text, count=5)
    text = re.sub(r'(\bid="|href="#|url\(#)', lambda match: f"{match[0]}{name}-", text)
    # The ground of a hatch is an attribute, in which a page's variables would mean nothing.
    text = re.sub(r'fill="(#[0-9a-f]{6})"', r'style="fill: \1"', text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable}, {color})")
    return text
