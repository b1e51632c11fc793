"""Jobs that can be run by name."""

from fedcore.recipes.loading import (
    load_recipe,
    parse_recipe,
    parse_settings,
    parse_value,
    recipe_digest,
    shipped_recipes,
    to_toml,
    with_settings,
)
from fedcore.recipes.schema import Recipe
from fedcore.recipes.sections import SITES

__all__ = [
    "SITES",
    "Recipe",
    "load_recipe",
    "parse_recipe",
    "parse_settings",
    "parse_value",
    "recipe_digest",
    "shipped_recipes",
    "to_toml",
    "with_settings",
]
