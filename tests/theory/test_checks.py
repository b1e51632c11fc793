"""Every check comes out as its verdict says, on fewer cases than the command draws."""

import math

import pytest

from fedcore_theory.catalog import all_checks


@pytest.mark.parametrize("check", all_checks(), ids=lambda check: check.id)
def test_it_comes_out_as_its_verdict_says(check):
    outcome = check.run(min(check.repetitions, 2))
    failed = [one for one in outcome.measured if not one.holds]
    assert outcome.holds, failed
    assert outcome.samples
    # Whoever writes a bound may leave nothing of it open.
    assert all(math.isfinite(one.value) for one in outcome.measured)


@pytest.mark.parametrize("check", all_checks(), ids=lambda check: check.id)
def test_it_says_what_a_reader_needs(check):
    for words in (check.title, check.claim, check.source, check.assumptions, check.data):
        assert words
        assert not words.endswith(" ")
    assert check.verdict in ("holds", "erratum", "artefact")
    assert check.finding or check.verdict == "holds"
