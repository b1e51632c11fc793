"""What is done with a block: run, or looked at where it cannot run here."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
import traceback
from collections.abc import Mapping
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator

from fedcore.recipes import SITES, load_recipe
from tests.docs.commands import check_command, command_lines
from tests.docs.pages import OUTPUT, Evaluator, read_page
from tests.transports.nvflare_stand_in import install

BASE = "bbc-news-fast"
"""The recipe that the fragments on the pages are read over."""

SECONDS = 240


def blocks_of(page: Any, environment: Mapping[str, str]) -> Document:
    """The page's blocks; evaluating them in order runs the page in the working directory."""
    run: dict[str, Evaluator] = {
        "python": PythonEvaluator(),
        "sh": partial(_run_shell, environment),
        "console": partial(_run_session, environment),
        "toml": _read_recipe,
        **dict.fromkeys(OUTPUT, _look_at_output),
    }
    check: dict[str, Evaluator] = {"python": _look_at_python, "sh": _look_at_shell}
    return read_page(page, run, check)


class BlockError(AssertionError):
    """A block that fails, as ``page:line: what``."""


def evaluate(example: Example) -> None:
    """Run or check one block.

    Raises:
        BlockError: with the line of the page.
    """
    try:
        example.evaluate()
    except BlockError:
        raise
    except Exception as error:
        here = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == example.path]
        line = getattr(error, "lineno", None) or (here[-1].lineno if here else example.line)
        _fail(example, f"{type(error).__name__}: {error}", line, error)


def _fail(
    example: Example, what: str, line: int | None = None, cause: Exception | None = None
) -> NoReturn:
    raise BlockError(f"{example.path}:{line or example.line}: {what}") from cause


def _shell(script: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def _run_shell(environment: Mapping[str, str], example: Example) -> None:
    # Bash counts from the block's first line, on which the trap stands too.
    done = _shell("trap 'echo \"$LINENO $BASH_COMMAND\"' ERR; " + example.parsed, environment)
    if done.returncode:
        *_, last = done.stdout.splitlines() or [""]
        number = re.match(r"\d+", last)
        line = example.line + int(number[0] if number else 0)
        _fail(example, f"exit status {done.returncode}\n{done.stdout[-4000:]}", line)


def _run_session(environment: Mapping[str, str], example: Example) -> None:
    """Commands after ``$``, each with all that it prints; ``...`` stands for anything."""
    parts = ("\n" + example.parsed).split("\n$ ")
    if parts[0].strip():
        _fail(example, "a console block begins with a command")
    for part in parts[1:]:
        command, _, expected = part.replace("\\\n", " ").partition("\n")
        got = _shell(command, environment).stdout
        flags = ELLIPSIS | NORMALIZE_WHITESPACE
        if not OutputChecker().check_output(expected.strip() + "\n", got.strip() + "\n", flags):
            _fail(example, f"{command} printed\n{got[-4000:]}")


def _read_recipe(example: Example) -> None:
    """A recipe, or a part of one; what has a title is there for the blocks that follow."""
    settings = _dotted(tomllib.loads(example.parsed))
    base: str | Path = BASE
    if "data.sites" in settings or settings.get("data.source") == SITES:
        # What the base recipe says of its data does not go with sites.
        base = Path("nothing.toml")
        base.write_text("", encoding="utf-8")
    load_recipe(base, settings)
    title = example.region.lexemes["title"]
    if title:
        Path(title).write_text(example.parsed, encoding="utf-8")


def _dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping) and key != "rates"
        found |= _dotted(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


def _look_at_shell(example: Example) -> None:
    for line in command_lines(example.parsed):
        try:
            check_command(line)
        except Exception as error:
            _fail(example, f"{line}: {error}")


def _look_at_python(example: Example) -> None:
    """Its syntax, and whether what it imports of ours is there."""
    install()
    for node in ast.walk(ast.parse(example.parsed)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("fedcore"):
            module = import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    _fail(example, f"{node.module} has no {alias.name}")


_LOOKS_LIKE_CODE = ("$ ", "pip ", "import ", "from ", "python ")


def _look_at_output(example: Example) -> None:
    """Output and equations are not run, so code must not hide there."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        if line.startswith("fedcore "):
            check_command(next(command_lines(line)))
        if line.startswith(_LOOKS_LIKE_CODE):
            _fail(example, f"{line!r} looks like code; say which language it is")
