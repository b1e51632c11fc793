"""Prose is written as the field writes it: see ``prose.py`` for the word list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import pytest

from tests.packaging.prose import PATTERNS, Hit, find_hits, name_hits, phrase_hits, report

CHECKED = [*(pattern.name for pattern in PATTERNS), "names"]


def test_no_phrase_of_the_list_is_written() -> None:
    hits = find_hits()
    assert not hits, report(hits)


def grouped(hits: Sequence[Hit]) -> dict[str, list[Hit]]:
    """Pattern to hits; they are sorted by it."""
    return {name: list(group) for name, group in groupby(hits, lambda hit: hit.pattern)}


def patterns(text: str, name: str = "page.md") -> list[str]:
    return [hit.pattern for hit in phrase_hits(name, text)]


WRONG: Mapping[str, Sequence[str]] = {
    "per": ("one weight a client", "4 bytes a number", "a line a round", "one a file"),
    "is no": ("text_column is no template", "these are no gradients", "must be no folder"),
    "told": ("a client that told nothing", "the statistics they tell of"),
    "settled": ("the fit has settled",),
    "likeness": ("mixed by likeness of the models",),
    "cut": ("gradients cut to norm 1", "the cut to rank r", "no update to cut"),
    "turn": ("turned towards the last broadcast", "one client's turn", "a half turn"),
    "goes on": ("a run goes on where it stopped", "is gone on with"),
    "unless given": ("all unless given", "unless otherwise said"),
    "asked for": ("lora_A was not asked for",),
    "order": ("the server's order of a round",),
    "nothing of": ("the client holds nothing of this run",),
    "allows to": ("such a delta allows to publish one",),
    "thousand million": ("four thousand million trials",),
    "workbench": ("the workbench of this process",),
}
RIGHT = (
    "one weight per client; pass a number; the rows a client holds; a row a client's noise hid",
    "there is no template, it is no longer one and is no better; there may be no round",
    "models that can be told apart, or told from noise",
    "the last line was cut off and the sample cut into parts; a relative cut-off",
    "in turn, turned off, turns the adapters of a round into one, turns the check red",
    "a run that is still going on",
    "`is no` and ``one weight a client`` are quoted",
    "pages may say that a resumed run has the same bits",
)


@pytest.mark.parametrize("pattern", list(WRONG))
def test_a_pattern_finds_what_it_is_for(pattern: str) -> None:
    for text in WRONG[pattern]:
        assert patterns(text) == [pattern], text
        assert patterns(text.replace(" ", "\n").capitalize()) == [pattern], text


def test_every_pattern_has_its_example() -> None:
    assert {*WRONG, "same bits"} == {pattern.name for pattern in PATTERNS}


@pytest.mark.parametrize("text", RIGHT)
def test_what_is_right_is_left_alone(text: str) -> None:
    assert not patterns(text)


CODE = '''"""What a client
tells of its data."""

told = {"told": 1, "cut": 2}  # the fit has
# settled
raise ValueError(
    f"all {count} uploads are "
    f"the same bits; see {name}"
)
'''


def test_code_is_read_as_people_read_it() -> None:
    """Docstrings, comments and messages with their lines; neither names nor single words."""
    assert [(hit.pattern, hit.line, hit.phrase) for hit in phrase_hits("code.py", CODE)] == [
        ("settled", 5, "settled"),
        ("told", 2, "tells"),
        ("same bits", 8, "same bits"),
    ]


def test_a_format_is_no_prose() -> None:
    assert patterns("seed = derive_seed(seed, 'secure sum')", "code.py") == []


def test_targets_are_named_by_what_they_hold() -> None:
    code = """
class Client:
    held: int = 0
    def run(self):
        found, self.kept = 1, 2
        for kept in told: pass
        return [own for own in found]
"""
    assert [(hit.line, hit.phrase) for hit in sorted(name_hits("code.py", code))] == [
        (5, "found"),
        (6, "kept"),
        (7, "own"),
    ]
