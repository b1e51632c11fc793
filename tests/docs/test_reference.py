"""The reference pages say what the code says."""

from __future__ import annotations

import re

import pytest

from tests.docs.reference_pages import (
    BEGIN,
    CLI_PAGE,
    END,
    RECIPE_PAGE,
    cli_markdown,
    recipe_keys,
)
from tests.docs.tools import installed, stand_in


def test_the_command_line_is_what_the_page_says(tmp_path, monkeypatch):
    if not installed():
        monkeypatch.syspath_prepend(str(stand_in(tmp_path)))
    page = CLI_PAGE.read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    found = page.split(BEGIN)[1].split(END)[0]
    assert found.strip() == cli_markdown().strip(), "run python -m tests.docs.reference_pages"


@pytest.fixture(scope="module")
def rows():
    page = RECIPE_PAGE.read_text(encoding="utf-8")
    found = re.findall(r"^\| `([\w.]+)` \| (.*?) \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    return {key: (values, default, meaning) for key, values, default, meaning in found}


@pytest.mark.parametrize(("key", "values", "default"), list(recipe_keys()))
def test_the_page_has_the_key(key, values, default, rows):
    assert key in rows, f"docs/reference/recipe.md needs a row | `{key}` | {values} | {default} |"
    assert rows[key][:2] == (values, default)
    assert rows[key][2].strip(), f"{key} needs a meaning"


def test_the_page_has_no_other_key(rows):
    assert set(rows) == {key for key, _, _ in recipe_keys()}
