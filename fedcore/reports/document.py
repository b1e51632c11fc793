"""A page as data, and its one template: an HTML file that refers to nothing outside itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path

from matplotlib.figure import Figure

from fedcore.data.folders import write_files
from fedcore.errors import missing_extra
from fedcore.reports.grid import Grid
from fedcore.reports.plots import to_png, to_svg

try:
    from jinja2 import Environment, StrictUndefined, Template
    from markupsafe import Markup
except ImportError as error:
    raise missing_extra("jinja2", "run") from error


@dataclass(frozen=True)
class Picture:
    """A figure, its name as a file and as a prefix of ids, and the caption under it."""

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class PageSection:
    """What stands under one heading, in the order of the attributes; all of it is plain text.

    Attributes:
        terms: name to text, a paragraph each.
        notes: a list of sentences.
        folded: titles and the long texts behind them.
        parts: sections under smaller headings, each with an ``anchor``, its id.
    """

    title: str = ""
    terms: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    tables: Sequence[Grid] = ()
    pictures: Sequence[Picture] = ()
    folded: Sequence[tuple[str, str]] = ()
    parts: Sequence[PageSection] = ()
    anchor: str = ""


@dataclass(frozen=True)
class Page:
    """A page from top to bottom; all of it is plain text.

    Attributes:
        kind: what sort of page this is, above its title.
        outcome: the page in one sentence.
        facts: a strip of numbers, name to (value, remark).
        notes: the caveats.
        tab: the title that a browser shows, unless it is ``title``.
    """

    kind: str
    title: str
    outcome: str
    sections: Sequence[PageSection]
    facts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    tab: str = ""


def render(page: Page) -> str:
    """The whole HTML file; figures are drawn in the page's own colours."""
    return _template().render(page=page, style=_resource("page.css"))


def write_page(page: Page, path: Path, beside: Mapping[str, bytes] | None = None) -> Path:
    """Write ``path`` with the figures of its sections in ``plots/`` beside it; returns it.

    Args:
        beside: further files that belong to the page, by name; all are written or none.
    """
    pictures = (shown for section in page.sections for shown in section.pictures)
    plots = {f"plots/{picture.name}.png": to_png(picture.figure) for picture in pictures}
    write_files(path.parent, {path.name: render(page).encode(), **plots, **(beside or {})})
    return path


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters["svg"] = lambda picture: Markup(to_svg(picture.figure, picture.name))
    return environment.from_string(_resource("page.html.j2"))


def _resource(name: str) -> str:
    return files("fedcore.reports").joinpath(name).read_text(encoding="utf-8")
