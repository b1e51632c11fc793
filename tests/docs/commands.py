"""Command lines that are not run: whether what they name exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import typer.main

from fedcore.cli import _build
from fedcore.methods import find_method
from fedcore.recipes import load_recipe, parse_settings, shipped_recipes
from tests.docs.tools import PYPROJECT

ELSEWHERE = (
    *("flower-superlink", "flower-supernode", "flwr", "rsync", "vllm", "llama-server"),
    *("make", "python", "export"),
)
"""Programs that are not ours; nothing is known of their arguments."""


def command_lines(source: str) -> Iterator[str]:
    """The commands of a shell block: comments are left out, continued lines joined."""
    for line in source.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield shlex.join(words)


def check_command(line: str) -> None:
    """Parse one command line without running it.

    Raises:
        ValueError: an extra that does not exist, or a program that nobody knows.
        click.ClickException: an option or argument that ``fedcore`` does not take.
        FedcoreError: a recipe, recipe key or method that does not exist.
    """
    words = shlex.split(line)
    if words[0] == "pip":
        _check_pip(words)
    elif words[0].rpartition("/")[2] == "fedcore":
        _check_fedcore(words[1:])
    elif words[0] not in ELSEWHERE:
        raise ValueError(f"{line!r}: {words[0]} is neither ours nor among {ELSEWHERE}")


def _check_pip(words: list[str]) -> None:
    if words[1] != "install":
        raise ValueError(f"{shlex.join(words)!r} is no pip install")
    known = PYPROJECT["project"]["optional-dependencies"]
    for word in words[2:]:
        found = re.fullmatch(r"(?:fedcore-lora|\.)\[([a-z,]+)\]", word)
        for extra in found.group(1).split(",") if found else ():
            if extra not in known:
                raise ValueError(f"{word}: pyproject.toml has the extras {', '.join(known)}")


def _check_fedcore(words: list[str]) -> None:
    command: Any = typer.main.get_command(_build())
    context = command.make_context("fedcore", list(words))
    while isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    given = context.params
    if command.name in ("run", "compare") and given.get("recipe"):
        _check_recipe(given)
    if command.name == "aggregate":
        find_method(given["method"])


def _check_recipe(given: dict[str, Any]) -> None:
    recipe = given["recipe"]
    own = recipe not in shipped_recipes() and Path(recipe).suffix == ".toml"
    settings = parse_settings(given["set_"] or [])
    named = {"method.name": given.get("method"), "engine": given.get("engine")}
    settings |= {key: value for key, value in named.items() if value is not None}
    load_recipe("bbc-news-fast" if own else recipe, settings)
    for name in filter(None, (given.get("methods") or "").split(",")):
        if name != "all":
            find_method(name)
