"""Recipes by name, from TOML files, with keys set on the way."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ValidationError

from fedcore.data.folders import read_regular
from fedcore.errors import FedcoreError, unknown_name
from fedcore.federation.seals import digest_of_content
from fedcore.recipes.schema import Recipe
from fedcore.recipes.sections import MethodSection


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = files("fedcore.recipes")
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def load_recipe(name: str | Path, settings: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by name or from a TOML file, with dotted keys overridden by ``settings``.

    Raises:
        FedcoreError: one line; an unknown recipe, key or method comes with the nearest valid names.
    """
    values = _read(name)
    for key, value in (settings or {}).items():
        _set(values, key, value)
    return _recipe(values)


def parse_recipe(text: str) -> Recipe:
    """A recipe from TOML text, as :func:`to_toml` writes it.

    Raises:
        FedcoreError: as :func:`load_recipe`.
    """
    try:
        return _recipe(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise FedcoreError(f"the recipe's text: {error}") from error


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """``recipe`` with dotted keys set anew.

    Raises:
        FedcoreError: as :func:`load_recipe`.
    """
    values = recipe.plain()
    for key, value in settings.items():
        _set(values, key, value)
    return _recipe(values)


def parse_settings(assignments: Sequence[str]) -> dict[str, Any]:
    """``["rounds=6", "adapter.layers=[4,5]"]`` as keys and values; what is not TOML is a string.

    Raises:
        FedcoreError: an assignment without ``=``.
    """
    settings = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise FedcoreError(f"{assignment!r} is not of the form key=value")
        settings[key.strip()] = parse_value(text.strip())
    return settings


def parse_value(text: str) -> Any:
    """One value in TOML's notation; anything else is taken as a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def to_toml(recipe: Recipe) -> str:
    """The recipe with every key written out; reading it back gives an equal recipe."""
    return tomli_w.dumps(recipe.plain())


def recipe_digest(recipe: Path | Recipe) -> str:
    """The SHA-256 of what a recipe's TOML file says, or would say, however it is written.

    What is left out is left out here too: a key that a later version adds changes no hash.

    Raises:
        FedcoreError: the file cannot be read.
    """
    values = tomllib.loads(to_toml(recipe)) if isinstance(recipe, Recipe) else _read(recipe)
    return digest_of_content(values)


def _read(name: str | Path) -> dict[str, Any]:
    path = Path(name)
    try:
        if path.suffix == ".toml" or path.is_file():
            if not path.exists():
                raise FedcoreError(f"there is no recipe file {path}")
            text = read_regular(path).decode("utf-8")
        elif str(name) in shipped_recipes():
            text = (files("fedcore.recipes") / f"{name}.toml").read_text(encoding="utf-8")
        else:
            raise unknown_name("recipe", str(name), shipped_recipes())
        return tomllib.loads(text)
    except FedcoreError:
        raise
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FedcoreError(f"recipe {name}: {error}") from error
    except OSError as error:
        raise FedcoreError(f"recipe {name} cannot be read: {error.strerror}") from error


def _recipe(values: dict[str, Any]) -> Recipe:
    _check_keys(Recipe, values, "")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise FedcoreError(_first_problem(error)) from error


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    table = values
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise FedcoreError(f"recipe key {key}: {section} is not a section")
    table[last] = value


def _check_keys(model: type[BaseModel], values: Mapping[str, Any], prefix: str) -> None:
    """Every key must be known; pydantic would say so too, but not which name is near."""
    for key, value in values.items():
        if key not in model.model_fields:
            if model is MethodSection:
                continue
            raise unknown_name("recipe key", f"{prefix}{key}", _all_keys(Recipe, ""))
        inner = model.model_fields[key].annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            if not isinstance(value, Mapping):
                raise FedcoreError(f"recipe key {prefix}{key} is a section, not a value: {value!r}")
            _check_keys(inner, value, f"{prefix}{key}.")


def _all_keys(model: type[BaseModel], prefix: str) -> list[str]:
    keys = []
    for key, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += _all_keys(inner, f"{prefix}{key}.")
        else:
            keys.append(f"{prefix}{key}")
    return keys


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, FedcoreError):
        return str(cause)
    where = ".".join(str(part) for part in problem["loc"])
    return f"recipe key {where}: {problem['msg']}; got {problem['input']!r}"
