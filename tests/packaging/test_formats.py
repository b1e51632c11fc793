"""Formats stay what they were: words of seeds, files, messages, tensors, JSON, recipe keys, flags.

``formats.json`` holds them as they were in version 0.1. A change that is meant is added to its
``added`` or ``removed``, as the line that this test prints, with the reason; the rest of the file
is not edited.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.packaging.formats import collect, flat

GOLDEN = json.loads(Path(__file__).with_name("formats.json").read_text(encoding="utf-8"))


def test_formats_are_those_of_the_first_version_and_what_was_added_with_a_reason(
    tmp_path: Path,
) -> None:
    first, now = flat(GOLDEN["formats"]), flat(collect(tmp_path))
    added, removed = set(GOLDEN["added"]), set(GOLDEN["removed"])
    problems = {
        "is gone": first - removed - now,
        "is new": now - first - added,
        "is listed under added and is not there": added - now,
        "is listed under added and is not new": added & first,
        "is listed under removed and is there": removed & now,
        "is listed under removed and never was": removed - first,
    }
    report = [f"{line}: {what}" for what, lines in problems.items() for line in sorted(lines)]
    assert not report, "\n".join(["formats differ:", *report])
    assert all({**GOLDEN["added"], **GOLDEN["removed"]}.values()), "every change has a reason"
