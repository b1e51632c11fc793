"""The table of other frameworks: each claim of ours has a test."""

import re
from pathlib import Path

from fedcore.methods.registry import method_classes

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "peers.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("|") and not line.startswith("|-")
]


def test_every_claim_has_a_test_and_every_absence_has_none():
    header, *rows = ROWS
    assert header[-2:] == ["here", "test"]
    assert len(rows) > 10
    for row in rows:
        name, ours, test = row[0], row[-2], row[-1]
        assert len(row) == len(header), name
        if ours == "no":
            assert test == "–", name
            continue
        (file,) = re.findall(r"`(tests/[\w/]+\.py)`", test)
        assert "\ndef test_" in (ROOT / file).read_text(), f"{name}: {file}"


def test_the_number_of_methods_is_counted():
    (count,) = re.findall(r"\[(\d+)\]\(methods\.md\)", PAGE)
    assert int(count) == len(method_classes())
