"""The pieces of a page: one HTML file that refers to nothing outside itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from fedcore.reports.plots import to_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure, its name as a file and as a prefix of ids, and the caption under it."""

    name: str
    caption: str
    figure: Figure


def document(title: str, body: Iterable[str]) -> str:
    """The whole file; ``body`` is HTML, ``title`` plain text."""
    style = files("fedcore.reports").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def header(kind: str, title: str, sentence: str) -> str:
    """What this page is about."""
    return (
        f'<header>\n<p class="kind">{escape(kind)}</p>\n<h1>{escape(title)}</h1>\n'
        f'<p class="outcome">{escape(sentence)}</p>\n</header>'
    )


def facts(values: Mapping[str, tuple[str, str]]) -> str:
    """A strip of numbers: name to (value, remark)."""
    items = "\n".join(
        f"<div><dt>{escape(name)}</dt>"
        f"<dd>{escape(value)} <small>{escape(remark)}</small></dd></div>"
        for name, (value, remark) in values.items()
    )
    return f'<dl class="facts">\n{items}\n</dl>'


def notes(sentences: Sequence[str]) -> str:
    """The caveats."""
    items = "\n".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<ul class="notes">\n{items}\n</ul>' if sentences else ""


def section(title: str) -> str:
    """A heading."""
    return f"<h2>{escape(title)}</h2>"


def picture(shown: Picture) -> str:
    """A figure drawn in the page's own colours."""
    svg = to_svg(shown.figure, shown.name)
    label = escape(shown.caption, quote=True)
    return (
        f'<figure role="img" aria-label="{label}">\n{svg}'
        f"<figcaption>{escape(shown.caption)}</figcaption>\n</figure>"
    )


def folded(title: str, text: str) -> str:
    """Long text behind its title."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
