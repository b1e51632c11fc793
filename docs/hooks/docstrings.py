"""Docstrings as the site shows them: roles become links, doctests become code.

The docstrings are Google's, with the roles that Sphinx and most editors understand
(``:func:`aggregate```); Markdown does not know these.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(?P<short>~?)(?P<name>[\w.]+)`")
_EXAMPLE = re.compile(r"^([ \t]*)Example:$", re.MULTILINE)
_LITERAL = re.compile(r"::$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring of a package once the whole package is known."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Walk all modules, classes and functions."""
        _rewrite(pkg)


def _rewrite(found: griffe.Object) -> None:
    if found.docstring is not None:
        text = _ROLE.sub(lambda role: _link(found, role), found.docstring.value)
        # Griffe reads doctests in a section of this name alone.
        text = _EXAMPLE.sub(r"\1Examples:", text)
        found.docstring.value = _LITERAL.sub(":", text)
    for member in found.members.values():
        if not member.is_alias:
            _rewrite(member)  # type: ignore[arg-type]


def _link(found: griffe.Object, role: re.Match[str]) -> str:
    """A link to what the role names if the site shows it, otherwise just its name."""
    name = role["name"]
    shown = name.rpartition(".")[2] if role["short"] else name
    try:
        path = found.resolve(name)
    except griffe.NameResolutionError:
        path = name
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
