"""The page of claims speaks of every check."""

import re
from pathlib import Path

import pytest

from fedcore_theory.catalog import all_checks

PAGE = Path(__file__).resolve().parents[2] / "docs" / "theory.md"


@pytest.fixture(scope="module")
def named():
    return set(re.findall(r"`([A-Z]+\d*x?)`", PAGE.read_text(encoding="utf-8")))


@pytest.mark.parametrize("check", all_checks(), ids=lambda check: check.id)
def test_it_names_the_check(check, named):
    assert check.id in named


def test_it_names_no_other(named):
    letters = {check.id.rstrip("0123456789x") for check in all_checks()}
    ids = {name for name in named if re.fullmatch(r"[A-Z]+\d+x?", name)}
    own = {name for name in ids if name.rstrip("0123456789x") in letters}
    assert own <= {check.id for check in all_checks()}
