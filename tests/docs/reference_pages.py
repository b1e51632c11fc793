"""What the reference pages have to say: the command line's options and the recipe's keys.

``python -m tests.docs.reference_pages`` writes the page of the command line anew; the recipe's keys
have a meaning beside them, which a person writes.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click
import typer.main
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedcore.cli import _build
from fedcore.recipes import Recipe
from tests.docs.pages import ROOT

CLI_PAGE = ROOT / "docs" / "reference" / "cli.md"
RECIPE_PAGE = ROOT / "docs" / "reference" / "recipe.md"
BEGIN, END = "<!-- commands -->", "<!-- end of commands -->"

_WORDS = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}


def commands(command: Any, path: str = "fedcore") -> Iterator[tuple[str, Any]]:
    """Every command with its full name; groups are what their commands are."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from commands(command.get_command(context, name), f"{path} {name}")
    else:
        yield path, command


def cli_markdown() -> str:
    """A section a command: its help, and a table of arguments and options."""
    parts = []
    for name, command in commands(typer.main.get_command(_build())):
        text = " ".join((command.help or "").split())
        said = _helps(command)
        rows = [_row(one, said[one.name]) for one in command.params if one.name != "help"]
        table = ["| argument or option | value | default | meaning |", "|---|---|---|---|", *rows]
        parts += [f"## `{name}`", "", text, "", *(table if rows else ["No options."]), ""]
    return "\n".join(parts).rstrip() + "\n"


def _helps(command: Any) -> dict[str, str]:
    """Parameter to its help, from the annotations: releases of click lose that of arguments."""
    hints = get_type_hints(command.callback.__wrapped__, include_extras=True)
    return {
        name: hint.__metadata__[0].help or "" for name, hint in hints.items() if name != "return"
    }


def _row(parameter: Any, meaning: str) -> str:
    option = isinstance(parameter, click.Option)
    names = [*parameter.opts, *parameter.secondary_opts] if option else [parameter.name.upper()]
    flag = option and parameter.is_flag
    value = "" if flag else parameter.type.name.replace(" range", "")
    if not flag and parameter.multiple if option else parameter.nargs == -1:
        value += ", may be repeated" if option else ", one or more"
    default = parameter.default
    if flag or default is None or callable(default) or "UNSET" in str(default):
        default = "needed" if parameter.required else ""
    shown = " ".join(meaning.split()).replace("|", "\\|")
    written = f"`{default}`" if default not in ("", "needed") else default
    return f"| `{'`, `'.join(names)}` | {value} | {written} | {shown} |"


def recipe_keys(
    model: type[BaseModel] = Recipe, prefix: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Every key of a recipe with its values and its default, as the page words them."""
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from recipe_keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", values_of(field), default_of(field)


def values_of(field: FieldInfo) -> str:
    """What a key may be, with its bounds."""
    bounds = []
    for rule in field.metadata:
        for kind, sign in ((Ge, "≥"), (Gt, ">"), (Le, "≤"), (Lt, "<")):
            if isinstance(rule, kind):
                bounds.append(f"{sign} {getattr(rule, kind.__name__.lower()):g}")
    return " ".join([_type(field.annotation), ", ".join(bounds)]).strip()


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return ", ".join(_type(one) for one in inner if one is not type(None))
    if origin is tuple:
        choice = get_origin(inner[0]) is Literal
        return f"list of {_type(inner[0])}" + "s" * (not choice)
    if origin is dict:
        return "table of numbers" if inner[1] is float else "table"
    return _WORDS[annotation]


def default_of(field: FieldInfo) -> str:
    """A key's default in TOML's notation; a dash where the key may be left out."""
    value = field.get_default(call_default_factory=True)
    if value is None or value in ({}, ""):
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return "`[" + ", ".join(f'"{one}"' for one in value) + "]`"
    return f"`{value}`" if isinstance(value, str | int) else f"`{value:g}`"


if __name__ == "__main__":
    head, _, rest = CLI_PAGE.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    CLI_PAGE.write_text(f"{head}{BEGIN}\n\n{cli_markdown()}\n{END}{tail}", encoding="utf-8")
